//! The header before every packet of the rx and tx queues, `struct virtio_vsock_hdr` (virtio 1.2 §5.10.6).
//!
//! Parsing takes any bytes: what a header's fields mean, and whether they may, is judged where they are used.

/// The header's length in bytes.
pub const HEADER: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// The only type of socket that is offered: streams.
pub const STREAM: u16 = 1;
/// SHUTDOWN: who says it receives no more.
pub const NO_RECEIVE: u32 = 1;
/// SHUTDOWN: who says it sends no more.
pub const NO_SEND: u32 = 2;
/// SHUTDOWN: both.
pub const NO_MORE: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Ends a connection at once, or says that there is none.
    Reset = 3,
    /// Ends one or both of its directions.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Says how much room there is; every packet does, this one nothing else.
    CreditUpdate = 6,
    /// Asks for that.
    CreditRequest = 7,
}

impl Op {
    /// The operation numbered `number`.
    pub fn from_number(number: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        all.into_iter().find(|op| *op as u16 == number)
    }
}

/// The two ports that name a connection: with one guest on one side and the host on the other, the addresses say nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// In the guest.
    pub guest: u32,
    /// On the host.
    pub host: u32,
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's address.
    pub src_cid: u64,
    /// The receiver's.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's.
    pub dst_port: u32,
    /// Bytes of data after the header.
    pub len: u32,
    /// The type of socket.
    pub kind: u16,
    /// The operation's number.
    pub op: u16,
    /// The operation's flags.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has received and passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header that `bytes` are.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(front(&mut rest)),
            dst_cid: u64::from_le_bytes(front(&mut rest)),
            src_port: u32::from_le_bytes(front(&mut rest)),
            dst_port: u32::from_le_bytes(front(&mut rest)),
            len: u32::from_le_bytes(front(&mut rest)),
            kind: u16::from_le_bytes(front(&mut rest)),
            op: u16::from_le_bytes(front(&mut rest)),
            flags: u32::from_le_bytes(front(&mut rest)),
            buf_alloc: u32::from_le_bytes(front(&mut rest)),
            fwd_cnt: u32::from_le_bytes(front(&mut rest)),
        }
    }

    /// The header as the other side reads it.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// A packet from the host to the guest `cid` in the connection named `ports`, saying `op`.
    pub fn to_guest(cid: u64, ports: Ports, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op as u16,
            ..Self::default()
        }
    }

    /// The RST that answers this packet of the guest's: of whatever type and to whomever it was sent.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }

    /// The connection that this packet of the guest's belongs to.
    pub fn ports(&self) -> Ports {
        Ports { guest: self.src_port, host: self.dst_port }
    }
}

/// Takes the first bytes, of which there are enough.
fn front<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    let (head, tail) = rest.split_at(N);
    bytes.copy_from_slice(head);
    *rest = tail;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 52,
            len: 0x11,
            kind: STREAM,
            op: Op::Data as u16,
            flags: 0x22,
            buf_alloc: 0x33,
            fwd_cnt: 0x44,
        };
        let bytes = header.bytes();
        assert_eq!(bytes[0..16], [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..28], [4, 3, 2, 1, 52, 0, 0, 0, 0x11, 0, 0, 0]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[32..44], [0x22, 0, 0, 0, 0x33, 0, 0, 0, 0x44, 0, 0, 0]);
        let refusal = header.refusal();
        assert_eq!((refusal.src_cid, refusal.dst_port, refusal.op, refusal.len), (2, 0x0102_0304, 3, 0));
        assert_eq!((1..=7).map(|op| Op::from_number(op).unwrap() as u16).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
        assert!(Op::from_number(0).is_none() && Op::from_number(8).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_come_back(bytes in prop::array::uniform32(any::<u8>()), tail: [u8; 12]) {
            let bytes: [u8; HEADER] = [&bytes[..], &tail].concat().try_into().unwrap();
            prop_assert_eq!(Header::parse(&bytes).bytes(), bytes);
        }
    }
}
