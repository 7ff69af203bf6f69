//! Receive buffers that were taken from the ring and not given back yet, for packets to the guest: made once for many.
//!
//! ```text
//!  buffer:  │ 44 bytes: header │ data │      each may lie in several areas
//! ```

use std::collections::VecDeque;

use vm_memory::VolatileSlice;

use super::packet::{HEADER, Header};

/// A chain of the receive queue.
struct Buffer {
    head: u16,
    header_parts: usize,
    data_parts: usize,
    /// Bytes of data that it holds.
    room: usize,
}

/// The buffers, in order.
#[derive(Default)]
pub struct Buffers<'a> {
    buffers: VecDeque<Buffer>,
    headers: VecDeque<VolatileSlice<'a>>,
    data: VecDeque<VolatileSlice<'a>>,
    room: usize,
    taking: Taking,
}

/// The buffer whose areas are being added.
#[derive(Default)]
struct Taking {
    header: usize,
    header_parts: usize,
    data_parts: usize,
    room: usize,
}

impl<'a> Buffers<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes of data that fit into all of them.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Adds an area to the buffer that is being taken.
    pub fn push_part(&mut self, part: VolatileSlice<'a>) {
        let taking = &mut self.taking;
        let missing = HEADER - taking.header;
        if missing == 0 {
            taking.data_parts += 1;
            taking.room += part.len();
            self.data.push_back(part);
            return;
        }
        match part.split_at(missing) {
            Ok((header, data)) => {
                (taking.header, taking.header_parts) = (HEADER, taking.header_parts + 1);
                self.headers.push_back(header);
                if !data.is_empty() {
                    self.push_part(data);
                }
            }
            Err(_) => {
                taking.header += part.len();
                taking.header_parts += 1;
                self.headers.push_back(part);
            }
        }
    }

    /// The areas added since the last time are the buffer `head`; false if they have no room for a packet with data.
    #[must_use]
    pub fn push_buffer(&mut self, head: u16) -> bool {
        let Taking { header_parts, data_parts, room, .. } = std::mem::take(&mut self.taking);
        self.buffers.push_back(Buffer { head, header_parts, data_parts, room });
        self.room += room;
        room > 0
    }

    /// The areas for data.
    pub fn data(&self) -> impl Iterator<Item = VolatileSlice<'a>> + '_ {
        self.data.iter().copied()
    }

    /// Writes a packet without data into the first buffer and takes that out, with how much of it is filled.
    pub fn fill_one(&mut self, header: &Header) -> Option<(u16, u32)> {
        let buffer = self.buffers.pop_front()?;
        Some(self.finish(&buffer, header, 0))
    }

    /// Makes packets with this header of the first `len` bytes of data, which were written, and takes their buffers out, with how
    /// much of each is filled.
    pub fn fill(&mut self, header: Header, mut len: usize) -> impl Iterator<Item = (u16, u32)> {
        std::iter::from_fn(move || {
            if len == 0 {
                return None;
            }
            let buffer = self.buffers.pop_front()?;
            let filled = len.min(buffer.room);
            len -= filled;
            Some(self.finish(&buffer, &header, filled))
        })
    }

    fn finish(&mut self, buffer: &Buffer, header: &Header, filled: usize) -> (u16, u32) {
        let bytes = Header { len: filled as u32, ..*header }.bytes();
        let mut done = 0;
        for part in self.headers.drain(..buffer.header_parts) {
            part.copy_from(&bytes[done..done + part.len()]);
            done += part.len();
        }
        self.data.drain(..buffer.data_parts);
        self.room -= buffer.room;
        (buffer.head, (HEADER + filled) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn ram() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    #[test]
    fn packets_are_laid_over_buffers_of_any_shape() {
        let ram = ram();
        let mut buffers = Buffers::default();
        for (head, parts) in [(7, &[(0, 50)][..]), (8, &[(100, 20), (120, 30), (200, 4)]), (9, &[(300, 44), (400, 5)])]
        {
            for &(at, len) in parts {
                buffers.push_part(ram.get_slice(GuestAddress(at), len).unwrap());
            }
            assert!(buffers.push_buffer(head));
        }
        assert_eq!((buffers.len(), buffers.room()), (3, 6 + 10 + 5));
        assert_eq!(buffers.data().map(|part| part.len()).collect::<Vec<_>>(), [6, 6, 4, 5]);
        let header = Header { src_cid: 2, fwd_cnt: 0x0102_0304, ..Header::default() };
        assert_eq!(buffers.fill(header, 9).collect::<Vec<_>>(), [(7, 50), (8, 47)]);
        assert_eq!((buffers.len(), buffers.room(), buffers.data().count()), (1, 5, 1));
        let read = |at: &[(u64, usize)]| {
            let mut bytes = Vec::new();
            for &(at, len) in at {
                bytes.resize(bytes.len() + len, 0);
                let start = bytes.len() - len;
                ram.read_slice(&mut bytes[start..], GuestAddress(at)).unwrap();
            }
            Header::parse(bytes[..].try_into().unwrap())
        };
        assert_eq!(read(&[(0, 44)]), Header { len: 6, ..header });
        assert_eq!(read(&[(100, 20), (120, 24)]), Header { len: 3, ..header });
        assert_eq!(buffers.fill_one(&header), Some((9, 44)));
        assert_eq!(buffers.fill_one(&header), None);
        assert_eq!((buffers.room(), buffers.data().count()), (0, 0));
    }

    #[test]
    fn a_buffer_has_room_for_a_header_and_a_byte() {
        let ram = ram();
        for parts in [&[][..], &[(0, 43)], &[(0, 44)], &[(0, 20), (20, 24)]] {
            let mut buffers = Buffers::default();
            for &(at, len) in parts {
                buffers.push_part(ram.get_slice(GuestAddress(at), len).unwrap());
            }
            assert!(!buffers.push_buffer(0), "{parts:?}");
        }
    }
}
