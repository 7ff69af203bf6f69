//! One connection: a stream socket on the host, and what the guest knows of it.
//!
//! ```text
//!              RESPONSE               both SHUTDOWNs said           RST or time
//!   Requested ──────────▶ Open ─────────────────────────▶ Closing ─────────────▶ gone
//!   (by the host)           │ the guest shut down both
//!                           └──▶ Orphan: no longer the guest's; ends when the host took the rest
//! ```
//!
//! Flow control (virtio 1.2 §5.10.6.3): each side says how large its buffer is and how much it has passed on; the other never
//! has more under way. What the guest sends goes straight to the socket, and what that does not take into `backlog`, which
//! is our buffer. To the guest goes only what it has room for: the rest stays in the socket, and holds the host's program back.
//!
//! Sockets are watched edge-triggered: `readable` and `writable` hold until the socket said that it would block. For room they are
//! watched only then: a program that reads would otherwise wake the device each time it does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, NO_MORE, NO_RECEIVE, NO_SEND, Op};
use crate::virtio::areas::{Areas, receive_stream};

/// The buffer that each connection has for what the guest sends.
pub const BUF_ALLOC: u32 = 256 << 10;
/// Room is told when so much has been made: Linux, too, tells it when there would be less than the largest of its packets.
const TELL_CREDIT: u32 = BUF_ALLOC - (64 << 10);
/// Most bytes taken from a socket at once.
const MAX_BURST: usize = 256 << 10;
/// Least bytes that room is looked for: what one receive buffer of Linux holds.
const MIN_BURST: usize = 4 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The host wants it, the guest has not answered.
    Requested,
    /// Bytes flow.
    Open,
    /// The guest was told that nothing more comes or is taken, and is to confirm it.
    Closing,
    /// The guest is through with it; the host has not taken all.
    Orphan,
}

/// What comes of a connection after something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Lives,
    /// It ends, and the guest must be told.
    Broken,
    /// It ends, and the guest knows.
    Gone,
    /// The guest ended it in good order, and waits for the confirmation. It is gone or, with bytes left for the host, an orphan.
    Closed,
}

/// What is to go to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// A packet without data: its operation and flags.
    Say(Op, u32),
    /// Data, if the socket has any; at most so many bytes.
    Data(usize),
}

/// The guest's receive buffer, as far as we know.
#[derive(Debug, Default)]
struct Outward {
    /// Bytes sent so far. All counts are modulo 2^32.
    sent: u32,
    /// The buffer's size.
    room: u32,
    /// Bytes that it has passed on.
    passed_on: u32,
    /// There has been no room for long.
    late: bool,
    /// It was asked for news since then.
    asked: bool,
}

impl Outward {
    /// Takes the news that each packet brings.
    fn learn(&mut self, header: &Header) {
        (self.room, self.passed_on) = (header.buf_alloc, header.fwd_cnt);
        self.late &= self.credit() == 0;
        self.asked &= self.late;
    }

    /// How many bytes may be sent.
    fn credit(&self) -> u32 {
        self.room.saturating_sub(self.sent.wrapping_sub(self.passed_on))
    }
}

/// A connection. It knows neither its ports nor the others.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    stage: Stage,
    readable: bool,
    /// Its end was seen, and may have been read past unless it is read until that comes.
    ending: bool,
    writable: bool,
    /// REQUEST or RESPONSE, until it was said.
    opening: Option<Op>,
    outward: Outward,
    /// From the guest, for the host. It keeps its memory, at most [`BUF_ALLOC`] rounded up: who needed it needs it again.
    backlog: VecDeque<u8>,
    /// Bytes of the guest's passed on so far.
    forwarded: u32,
    /// What the guest knows of it.
    told: u32,
    /// The guest asked for it.
    news_wanted: bool,
    /// How many bytes the next reading looks for.
    burst: usize,
    /// The guest sends no more, or receives no more.
    guest_ended: bool,
    guest_deaf: bool,
    /// The host's program sends no more, or receives no more.
    host_ended: bool,
    host_deaf: bool,
    /// The host's program was told that the guest sends no more.
    end_passed_on: bool,
    /// Flags of the SHUTDOWNs that the guest got.
    said: u32,
}

impl Connection {
    fn new(stream: UnixStream, stage: Stage, opening: Op) -> Self {
        Self {
            stream,
            stage,
            readable: false,
            ending: false,
            writable: true,
            opening: Some(opening),
            outward: Outward::default(),
            backlog: VecDeque::new(),
            forwarded: 0,
            told: 0,
            news_wanted: false,
            burst: MIN_BURST,
            guest_ended: false,
            guest_deaf: false,
            host_ended: false,
            host_deaf: false,
            end_passed_on: false,
            said: 0,
        }
    }

    /// One that the guest asked for with `request`, and that `stream` serves.
    pub fn from_guest(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream, Stage::Open, Op::Response);
        connection.outward.learn(request);
        connection
    }

    /// One that the program behind `stream` asked for.
    pub fn from_host(stream: UnixStream) -> Self {
        Self::new(stream, Stage::Requested, Op::Request)
    }

    /// Whether the guest has heard of it.
    pub fn known(&self) -> bool {
        self.opening != Some(Op::Request)
    }

    /// Whether it goes on without the guest, until the host took the rest.
    pub fn orphaned(&self) -> bool {
        self.stage == Stage::Orphan && !self.backlog.is_empty()
    }

    /// What is to be watched for at its socket.
    pub fn interest(&self) -> EventSet {
        let always = EventSet::IN | EventSet::READ_HANG_UP;
        if self.writable { always } else { always | EventSet::OUT }
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Takes a packet of the guest's.
    pub fn receive(&mut self, op: Op, header: &Header, data: Areas<'_>) -> Outcome {
        self.outward.learn(header);
        match (op, self.stage) {
            (Op::Reset, _) if self.guest_ended => self.let_go(Outcome::Gone),
            (Op::Reset, _) => Outcome::Gone,
            (Op::Response, Stage::Requested) => self.granted(header.dst_port),
            (_, Stage::Requested) | (Op::Request | Op::Response, _) => Outcome::Broken,
            (Op::Shutdown, _) => self.guest_shuts_down(header.flags),
            (Op::Data, _) => self.forward(data),
            (Op::CreditUpdate, _) => Outcome::Lives,
            (Op::CreditRequest, _) => {
                self.news_wanted = true;
                Outcome::Lives
            }
        }
    }

    /// The guest took the connection: the program is told its port.
    fn granted(&mut self, port: u32) -> Outcome {
        let text = format!("OK {port}\n");
        match send_bytes(&self.stream, text.as_bytes()) {
            // Nothing was written to the socket before.
            Ok(len) if len == text.len() => {
                self.stage = Stage::Open;
                Outcome::Lives
            }
            _ => Outcome::Broken,
        }
    }

    fn forward(&mut self, mut data: Areas<'_>) -> Outcome {
        let room = BUF_ALLOC as usize - self.backlog.len();
        if self.guest_ended || data.len() > room {
            return Outcome::Broken;
        }
        while !data.is_empty() && self.writable && self.backlog.is_empty() && !self.host_deaf {
            let sent = data.send_stream(self.stream.as_fd());
            if let Some(len) = self.sent(sent) {
                data.take(len);
            }
        }
        if self.host_deaf {
            self.forwarded = self.forwarded.wrapping_add(data.len() as u32);
        } else if !data.is_empty() {
            self.keep(data);
        }
        Outcome::Lives
    }

    /// Puts `data` at the backlog's end.
    fn keep(&mut self, mut data: Areas<'_>) {
        let start = self.backlog.len();
        self.backlog.resize(start + data.len(), 0);
        let (front, back) = self.backlog.as_mut_slices();
        let (end, behind) = (start.min(front.len()), start.saturating_sub(front.len()));
        data.take(front.len() - end).copy_to(&mut front[end..]);
        data.copy_to(&mut back[behind..]);
    }

    /// Counts what the socket took, or takes note of why it did not.
    fn sent(&mut self, result: io::Result<usize>) -> Option<usize> {
        match result {
            Ok(len) => {
                self.forwarded = self.forwarded.wrapping_add(len as u32);
                Some(len)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                None
            }
            // EPIPE and ECONNRESET; others say no less that it takes nothing.
            Err(_) => {
                self.host_goes_deaf();
                None
            }
        }
    }

    fn host_goes_deaf(&mut self) {
        self.host_deaf = true;
        self.forwarded = self.forwarded.wrapping_add(self.backlog.len() as u32);
        self.backlog = VecDeque::new();
    }

    /// Sends of the backlog what the socket takes, and after its last byte the end if the guest sends no more.
    fn flush(&mut self) {
        while !self.backlog.is_empty() && self.writable {
            let sent = send_bytes(&self.stream, self.backlog.as_slices().0);
            if let Some(len) = self.sent(sent) {
                self.backlog.drain(..len);
            }
        }
        if self.backlog.is_empty() && self.guest_ended && !self.end_passed_on {
            self.end_passed_on = true;
            // It fails where nobody is left to see it.
            let _ = shutdown(self.stream.as_raw_fd(), Shutdown::Write);
        }
    }

    fn guest_shuts_down(&mut self, flags: u32) -> Outcome {
        self.guest_ended |= flags & NO_SEND != 0;
        if flags & NO_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // The program learns it by its next write.
            let _ = shutdown(self.stream.as_raw_fd(), Shutdown::Read);
        }
        if self.guest_ended {
            self.flush();
        }
        if self.guest_ended && self.guest_deaf { self.let_go(Outcome::Closed) } else { Outcome::Lives }
    }

    /// The guest is through with it.
    fn let_go(&mut self, outcome: Outcome) -> Outcome {
        if !self.backlog.is_empty() {
            self.stage = Stage::Orphan;
        }
        outcome
    }

    /// Takes what epoll says of the socket.
    pub fn event(&mut self, events: EventSet) -> Outcome {
        let broken = EventSet::HANG_UP | EventSet::ERROR;
        self.ending |= events.intersects(EventSet::READ_HANG_UP | broken);
        self.readable |= self.ending || events.contains(EventSet::IN);
        if events.intersects(broken) {
            self.host_goes_deaf();
        }
        if events.contains(EventSet::OUT) {
            self.writable = true;
            self.flush();
        }
        match self.stage {
            // Its program did not wait for the answer.
            Stage::Requested if self.host_deaf => Outcome::Broken,
            Stage::Orphan if self.backlog.is_empty() => Outcome::Gone,
            _ => Outcome::Lives,
        }
    }

    /// What is to go to the guest next.
    pub fn due(&self) -> Option<Due> {
        match (self.stage, self.opening) {
            (Stage::Orphan, _) | (Stage::Requested, None) => return None,
            (_, Some(op)) => return Some(Due::Say(op, 0)),
            _ => {}
        }
        if self.readable && !self.host_ended && !self.guest_deaf {
            match self.outward.credit() {
                0 if self.outward.late && !self.outward.asked => return Some(Due::Say(Op::CreditRequest, 0)),
                0 => {}
                credit => return Some(Due::Data(self.burst.min(credit as usize))),
            }
        }
        if self.news_wanted || self.forwarded.wrapping_sub(self.told) >= TELL_CREDIT {
            return Some(Due::Say(Op::CreditUpdate, 0));
        }
        let flags = if self.host_ended { NO_SEND } else { 0 } | if self.host_deaf { NO_RECEIVE } else { 0 };
        (flags & !self.said != 0).then_some(Due::Say(Op::Shutdown, flags))
    }

    /// Whether there is data for the guest and it has no room. It should say when it has: asking at once would make two packets,
    /// two interrupts and a kick of what is none with a guest that reads.
    pub fn starves(&self) -> bool {
        let open = self.stage == Stage::Open && self.opening.is_none();
        open && self.readable
            && !self.host_ended
            && !self.guest_deaf
            && self.outward.credit() == 0
            && !self.outward.late
    }

    /// The guest had time to say that it has room.
    pub fn lose_patience(&mut self) {
        self.outward.late = self.outward.credit() == 0;
    }

    /// A packet that was due, without data, is on its way.
    pub fn said(&mut self, op: Op, flags: u32) {
        match op {
            Op::Request | Op::Response => self.opening = None,
            Op::CreditRequest => self.outward.asked = true,
            Op::Shutdown => {
                self.said |= flags;
                if self.said == NO_MORE {
                    self.stage = Stage::Closing;
                }
            }
            _ => {}
        }
    }

    /// Reads data for the guest, at most as much as was due, into `room`; returns how many bytes came.
    pub fn read<'a>(&mut self, room: impl Iterator<Item = VolatileSlice<'a>>, most: usize) -> usize {
        match receive_stream(self.stream.as_fd(), room, most) {
            Ok((0, _)) => self.host_ended = true,
            Ok((len, full)) => {
                self.outward.sent = self.outward.sent.wrapping_add(len as u32);
                // Less than fits was all there is; an end or more to come is a later event's, or was seen before.
                self.readable = full || self.ending;
                self.burst = if full { (2 * self.burst).min(MAX_BURST) } else { len.max(MIN_BURST) };
                return len;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // ECONNRESET: it closed without reading all. What it sent before has been read.
            Err(_) => {
                self.host_ended = true;
                self.host_goes_deaf();
            }
        }
        0
    }

    /// Puts into the header of a packet to the guest what each tells: the buffer and what left it.
    pub fn stamp(&mut self, header: &mut Header) {
        (header.buf_alloc, header.fwd_cnt) = (BUF_ALLOC, self.forwarded);
        self.told = self.forwarded;
        self.news_wanted = false;
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn send_bytes(stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match send(stream.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}
