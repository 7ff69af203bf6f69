//! Frames to the monitor and from it, over a channel.

use civic_loader::{Frame, FromGuest, Full, HEADER, Malformed, Output, Sink, split};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::BorrowedFd;

use crate::channel::{Channel, Lost};
use crate::time::{Deadline, timespec};

/// How long the host may take nothing at all while the loader has to wait for that, in milliseconds. With output alone it never has to.
const PATIENCE_MS: u64 = 60_000;
/// The times between two looks at a channel that has nothing to wait at, in milliseconds: just after something came or went, and at most.
const TICK_MS: (u64, u64) = (1, 20);
/// So many looks are "just after": a host that is asked for more needs some milliseconds.
const JUST_AFTER: u8 = 30;
/// How long nobody looks at anything at most, in milliseconds.
const LOOK_MS: u64 = 500;
/// Bytes of the buffer that output leaves to other frames.
const RESERVED: usize = 2048;
/// Output is read when there is room for so much.
const WORTHWHILE: usize = 4096;

/// Whole pages.
#[repr(C, align(4096))]
pub struct Pages<const N: usize>([[u8; 4096]; N]);

impl<const N: usize> Pages<N> {
    /// Zeroes.
    pub const fn new() -> Self {
        Self([[0; 4096]; N])
    }

    /// All of their bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.0.as_flattened_mut()
    }

    /// An empty buffer.
    pub fn buffer(&mut self) -> Buffer<'_> {
        Buffer { bytes: self.bytes(), start: 0, end: 0 }
    }
}

/// Bytes that wait, first come, first gone.
pub struct Buffer<'a> {
    bytes: &'a mut [u8],
    start: usize,
    end: usize,
}

impl<'a> Buffer<'a> {
    /// An empty one.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, start: 0, end: 0 }
    }

    /// How much may wait.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What waits, waits there from now on, where there is at least as much room.
    pub fn move_to(&mut self, bytes: &'a mut [u8]) {
        let waiting = &self.bytes[self.start..self.end];
        if let Some(place) = bytes.get_mut(..waiting.len()) {
            place.copy_from_slice(waiting);
            *self = Self { start: 0, end: waiting.len(), bytes };
        }
    }

    /// What waits.
    pub fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// How much more there is room for.
    pub fn free(&self) -> usize {
        self.bytes.len() - self.waiting().len()
    }

    /// Where more goes; see [`Buffer::added`].
    pub fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        &mut self.bytes[self.end..]
    }

    /// The first `count` bytes of the room wait now.
    pub fn added(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// Only the first `count` bytes wait.
    fn cut(&mut self, count: usize) {
        self.end = self.end.min(self.start + count);
    }

    /// The first `count` bytes wait no more.
    pub fn gone(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }
}

impl Sink for Buffer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Full> {
        // What waits is moved only when it must be.
        let room = match self.bytes.len() - self.end < bytes.len() {
            true => self.room(),
            false => &mut self.bytes[self.end..],
        };
        room.get_mut(..bytes.len()).ok_or(Full)?.copy_from_slice(bytes);
        self.added(bytes.len());
        Ok(())
    }
}

/// The monitor, as the loader sees it.
pub struct Link<'a> {
    channel: &'a mut dyn Channel,
    from_host: Buffer<'a>,
    to_host: Buffer<'a>,
    tick_ms: u64,
    /// Looks for nothing since something came or went.
    idle: u8,
}

impl<'a> Link<'a> {
    /// Over `channel`; each buffer has room for a greatest frame and [`RESERVED`] bytes.
    pub fn new(channel: &'a mut dyn Channel, from_host: Buffer<'a>, to_host: Buffer<'a>) -> Self {
        Self { channel, from_host, to_host, tick_ms: TICK_MS.0, idle: 0 }
    }

    /// Says something other than output. Waits for the host if there is no room for it.
    pub fn tell(&mut self, frame: FromGuest<'_>) -> Result<(), Lost> {
        let mut deadline = Deadline::after_ms(PATIENCE_MS);
        loop {
            let len = self.to_host.waiting().len();
            match frame.encode(&mut self.to_host) {
                Ok(()) => return Ok(()),
                Err(Full) if len == 0 => return Err(Lost),
                Err(Full) => self.to_host.cut(len),
            }
            self.push(&mut deadline)?;
        }
    }

    /// Sends all that waits.
    pub fn flush(&mut self) -> Result<(), Lost> {
        let mut deadline = Deadline::after_ms(PATIENCE_MS);
        while !self.to_host.waiting().is_empty() {
            self.push(&mut deadline)?;
        }
        Ok(())
    }

    fn push(&mut self, deadline: &mut Deadline) -> Result<(), Lost> {
        if self.send()? {
            *deadline = Deadline::after_ms(PATIENCE_MS);
        } else if deadline.passed() {
            return Err(Lost);
        } else {
            self.wait_for(Watched::new(), PollFlags::empty());
        }
        Ok(())
    }

    /// Whether there is room for something small besides output, so that telling it does not wait.
    pub fn has_room(&self) -> bool {
        self.to_host.free() >= RESERVED / 2
    }

    /// Whether output should be read for the host: it takes what it gets.
    pub fn wants_output(&self) -> bool {
        self.to_host.free() >= HEADER + WORTHWHILE + RESERVED
    }

    /// Says what `read` puts into the room that it is given; it gives the count, or why there is none.
    pub fn output<E>(&mut self, output: Output, read: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<usize, E> {
        let room = self.to_host.room();
        let len = room.len().saturating_sub(RESERVED);
        let Some((header, room)) = room[..len].split_first_chunk_mut::<HEADER>() else {
            return Ok(0);
        };
        let len = room.len().min(civic_loader::MAX_PAYLOAD);
        let count = read(&mut room[..len])?;
        if count > 0 {
            *header = output.header(count as u32);
            self.to_host.added(HEADER + count);
        }
        Ok(count)
    }

    /// Sends what waits, as far as the host takes it now; whether it took anything.
    pub fn send(&mut self) -> Result<bool, Lost> {
        if self.to_host.waiting().is_empty() {
            return Ok(false);
        }
        let count = self.channel.send(self.to_host.waiting())?;
        self.to_host.gone(count);
        Ok(self.moved(count))
    }

    /// Fetches what the host has to say; whether it had anything.
    pub fn recv(&mut self) -> Result<bool, Lost> {
        let room = self.from_host.room();
        if room.is_empty() {
            return Ok(false);
        }
        let count = self.channel.recv(room)?;
        self.from_host.added(count);
        Ok(self.moved(count))
    }

    fn moved(&mut self, count: usize) -> bool {
        if count > 0 {
            (self.tick_ms, self.idle) = (TICK_MS.0, 0);
        }
        count > 0
    }

    /// The next frame that was fetched, and what to give [`Link::done`].
    pub fn frame(&self) -> Result<Option<(Frame<'_>, usize)>, Malformed> {
        split(self.from_host.waiting())
    }

    /// The bytes of the next frame, which has so many, in `place`. It was dealt with.
    pub fn take<'p>(&mut self, len: usize, place: &'p mut [u8]) -> &'p [u8] {
        let place = &mut place[..len];
        place.copy_from_slice(&self.from_host.waiting()[..len]);
        self.done(len);
        place
    }

    /// The frame was dealt with.
    pub fn done(&mut self, len: usize) {
        self.from_host.gone(len);
    }

    /// Waits until the channel takes more of what waits, or has more to say, or one of `watched` is ready; or for a while.
    pub fn wait<'w>(&'w mut self, watched: Watched<'w>) {
        self.wait_for(watched, PollFlags::IN);
    }

    fn wait_for<'w>(&'w mut self, mut watched: Watched<'w>, mut flags: PollFlags) {
        flags.set(PollFlags::OUT, !self.to_host.waiting().is_empty());
        match self.channel.fd() {
            Some(fd) => watched.add(fd, flags),
            None => {
                watched.limit(self.tick_ms);
                self.idle = self.idle.saturating_add(1);
                if self.idle > JUST_AFTER {
                    self.tick_ms = (self.tick_ms * 2).min(TICK_MS.1);
                }
            }
        }
        watched.wait();
    }
}

/// What a wait may end with.
pub struct Watched<'fd> {
    fds: [Option<(BorrowedFd<'fd>, PollFlags)>; 6],
    limit_ms: u64,
}

impl<'fd> Watched<'fd> {
    /// Nothing but the time after which to look again anyway.
    pub fn new() -> Self {
        Self { fds: [None; 6], limit_ms: LOOK_MS }
    }

    /// And `fd`, when it is ready as `flags` say.
    pub fn add(&mut self, fd: BorrowedFd<'fd>, flags: PollFlags) {
        if let Some(place) = self.fds.iter_mut().find(|place| place.is_none()) {
            *place = Some((fd, flags));
        }
    }

    /// And after so many milliseconds.
    pub fn limit(&mut self, ms: u64) {
        self.limit_ms = self.limit_ms.min(ms);
    }

    fn wait(self) {
        let limit = Some(timespec(self.limit_ms));
        // Whoever waits looks at everything afterwards, so that it does not matter why it ended.
        let _ = match self.fds[0] {
            None => poll(&mut [], limit.as_ref()),
            Some(first) => {
                // The first again where there is none.
                let mut set = self.fds.map(|fd| {
                    let (fd, flags) = fd.unwrap_or(first);
                    PollFd::from_borrowed_fd(fd, flags)
                });
                poll(&mut set, limit.as_ref())
            }
        };
    }
}
