//! All connections of a device, and whose turn it is. It knows the sockets and the packets, and nothing of rings.
//!
//! ```text
//!  host's programs ── CONNECT ──▶ handshakes ──▶ ┌─────────────┐ ──▶ next(): a packet, or whose data
//!  host's sockets ◀── data ────────────────────▶ │ connections │
//!  PATH_<port> ◀── REQUEST ───────────────────── └─────────────┘ ◀── packet(): one of the guest's
//! ```
//!
//! All sockets, the listener and the timer are in one epoll set, edge-triggered; that set is what the worker watches. Ids are
//! never used twice, so an event of a socket that is gone finds nothing.
//!
//! Everything is bounded: connections, handshakes, what each holds, and RSTs that wait. When too many of these wait for receive
//! buffers, no packet is taken until the guest has given some (virtio 1.2 §5.10.6.1 says so of replies).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Due, Outcome, Stage};
use super::deadlines::Deadlines;
use super::handshake::{Asked, Handshake};
use super::listener::VsockListener;
use super::packet::{HEADER, HOST_CID, Header, Op, Ports, STREAM};
use super::{Limits, VsockCounters};
use crate::virtio::OncePerReset;
use crate::virtio::areas::Areas;

/// The first of the ports from which connections into the guest are made; the last is the one before VMADDR_PORT_ANY.
pub const FIRST_PORT: u32 = 0xc000_0000;
const LAST_PORT: u32 = u32::MAX - 1;
/// RSTs that wait for receive buffers when no more packets are taken.
const MAX_RESETS: usize = 256;
/// Events taken at once, and how often in one turn.
const EVENTS: usize = 64;
const LOOKS: usize = 8;
/// How long the listener rests when the process has no descriptor left.
const REST: Duration = Duration::from_secs(1);
/// How long a guest may leave unsaid that it has room again before it is asked. Linux says so by itself.
const CREDIT_PATIENCE: Duration = Duration::from_millis(50);

/// What a stream is watched for at first.
const STREAM_EVENTS: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP);

/// Ids of what is no connection.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_ID: u64 = 2;

/// What goes to the guest next.
#[derive(Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// This packet.
    Packet(Header),
    /// What the connection's socket has, at most so many bytes.
    Data { id: u64, max: usize },
}

struct Entry {
    connection: Connection,
    ports: Ports,
    /// The stage for which its deadline was set.
    stage: Stage,
    /// Its deadline is for the guest's news of room.
    starves: bool,
    /// What its socket is watched for.
    watched: EventSet,
}

impl Entry {
    /// The header of a packet without data saying `op`, as of now.
    fn header(&mut self, cid: u64, op: Op) -> Header {
        let mut header = Header::to_guest(cid, self.ports, op);
        self.connection.stamp(&mut header);
        header
    }
}

/// See the module's documentation.
pub struct Switchboard {
    cid: u64,
    listener: Arc<VsockListener>,
    limits: Limits,
    counters: Arc<VsockCounters>,
    next_port: Arc<AtomicU32>,
    epoll: Epoll,
    deadlines: Deadlines,
    next_id: u64,
    handshakes: HashMap<u64, Handshake>,
    connections: HashMap<u64, Entry>,
    /// All but orphans.
    by_ports: HashMap<Ports, u64>,
    /// Connections of which something is to go to the guest, and which of them was the last to send.
    waiting: BTreeSet<u64>,
    last: u64,
    resets: VecDeque<Header>,
    /// Programs may wait to be accepted.
    acceptable: bool,
    complained: OncePerReset,
}

impl Switchboard {
    /// One without connections.
    ///
    /// # Errors
    /// When the host has no epoll set or timer to give.
    pub fn new(
        cid: u64,
        listener: Arc<VsockListener>,
        limits: Limits,
        counters: Arc<VsockCounters>,
        next_port: Arc<AtomicU32>,
    ) -> io::Result<Self> {
        let (epoll, deadlines) = (Epoll::new()?, Deadlines::new()?);
        watch(&epoll, ControlOperation::Add, listener.as_fd().as_raw_fd(), EventSet::IN, LISTENER)?;
        watch(&epoll, ControlOperation::Add, deadlines.as_raw_fd(), EventSet::IN, TIMER)?;
        Ok(Self {
            cid,
            listener,
            limits,
            counters,
            next_port,
            epoll,
            deadlines,
            next_id: FIRST_ID,
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            waiting: BTreeSet::new(),
            last: 0,
            resets: VecDeque::new(),
            acceptable: false,
            complained: OncePerReset::default(),
        })
    }

    /// Takes in what happened to sockets and timer; true when there may be more of it.
    ///
    /// # Errors
    /// When the host's epoll or timer fails, for which it has no reason.
    pub fn look(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); EVENTS];
        let mut more = true;
        for _ in 0..LOOKS {
            let count = match self.epoll.wait(0, &mut events) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in &events[..count] {
                self.event(event.data(), event.event_set());
            }
            more = count == EVENTS;
            if !more {
                break;
            }
        }
        self.accept();
        self.deadlines.arm()?;
        Ok(more)
    }

    /// Sets the timer after packets changed what is waited for.
    ///
    /// # Errors
    /// As [`Switchboard::look`].
    pub fn arm(&mut self) -> io::Result<()> {
        self.deadlines.arm()
    }

    fn event(&mut self, id: u64, events: EventSet) {
        match id {
            LISTENER => self.acceptable = true,
            TIMER => self.deadlines_pass(),
            _ => {
                if let Some(entry) = self.connections.get_mut(&id) {
                    let outcome = entry.connection.event(events);
                    self.conclude(id, outcome);
                } else if let Some(handshake) = self.handshakes.get_mut(&id) {
                    handshake.events |= events;
                    match handshake.look() {
                        Asked::Port(port) => self.connect_to_guest(id, port),
                        // The rest of the line will not come.
                        Asked::NotYet if !handshake.events.contains(EventSet::READ_HANG_UP) => {}
                        Asked::NotYet | Asked::Nonsense => self.refuse_handshake(id),
                    }
                }
            }
        }
    }

    fn deadlines_pass(&mut self) {
        self.deadlines.went_off();
        let now = Instant::now();
        while let Some(id) = self.deadlines.take_passed(now) {
            match id {
                LISTENER => self.acceptable = true,
                id if self.handshakes.contains_key(&id) => self.refuse_handshake(id),
                id => match self.connections.get_mut(&id) {
                    Some(entry) if entry.starves => {
                        entry.starves = false;
                        entry.connection.lose_patience();
                        self.settle(id);
                    }
                    _ => self.break_off(id),
                },
            }
        }
    }

    /// Takes in programs that connected to the listener.
    fn accept(&mut self) {
        while self.acceptable && self.handshakes.len() < self.limits.handshakes {
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    self.acceptable = false;
                    if e.kind() != io::ErrorKind::WouldBlock {
                        // EMFILE and the like. Those that wait cause no other event.
                        self.deadlines.set(LISTENER, Some(Instant::now() + REST));
                        self.complain(&format!("cannot accept a connection: {e}"));
                    }
                    return;
                }
            };
            let id = self.new_id();
            if let Err(e) = watch_stream(&self.epoll, &stream, id) {
                self.counters.refused.add(1);
                self.complain(&format!("cannot watch a connection: {e}"));
                continue;
            }
            self.handshakes.insert(id, Handshake::new(stream));
            self.deadlines.set(id, Some(Instant::now() + self.limits.patience));
        }
    }

    fn refuse_handshake(&mut self, id: u64) {
        self.deadlines.set(id, None);
        if self.handshakes.remove(&id).is_some() {
            self.counters.refused.add(1);
        }
    }

    /// The program of handshake `id` wants to get to `port` of the guest.
    fn connect_to_guest(&mut self, id: u64, port: u32) {
        let Some(host) = self.free_port(port).filter(|_| self.make_room()) else {
            return self.refuse_handshake(id);
        };
        if let Some(Handshake { stream, events }) = self.handshakes.remove(&id) {
            let ports = Ports { guest: port, host };
            self.insert(id, ports, Connection::from_host(stream), Stage::Requested);
            self.event(id, events);
        }
    }

    /// A port of the host's that no connection to `guest` has.
    fn free_port(&self, guest: u32) -> Option<u32> {
        // One of more ports than there can be connections is free.
        for _ in 0..=self.limits.connections {
            let host = self.next_port.load(Ordering::Relaxed);
            let next = if host < LAST_PORT { host + 1 } else { FIRST_PORT };
            self.next_port.store(next, Ordering::Relaxed);
            if !self.by_ports.contains_key(&Ports { guest, host }) {
                return Some(host);
            }
        }
        None
    }

    /// Whether there may be one more connection, if need be in place of the oldest that the guest no longer has.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < self.limits.connections {
            return true;
        }
        let orphans = self.connections.iter().filter(|(_, entry)| entry.connection.orphaned());
        let oldest = orphans.map(|(id, _)| *id).min();
        oldest.inspect(|id| drop(self.remove(*id))).is_some()
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn insert(&mut self, id: u64, ports: Ports, connection: Connection, stage: Stage) {
        self.by_ports.insert(ports, id);
        self.connections.insert(id, Entry { connection, ports, stage, starves: false, watched: STREAM_EVENTS });
        let deadline = (stage == Stage::Requested).then(|| Instant::now() + self.limits.patience);
        self.deadlines.set(id, deadline);
        self.settle(id);
    }

    fn remove(&mut self, id: u64) -> Option<Entry> {
        self.deadlines.set(id, None);
        self.waiting.remove(&id);
        let entry = self.connections.remove(&id)?;
        if self.by_ports.get(&entry.ports) == Some(&id) {
            self.by_ports.remove(&entry.ports);
        }
        Some(entry)
    }

    /// Acts on what became of connection `id`.
    fn conclude(&mut self, id: u64, outcome: Outcome) {
        match outcome {
            Outcome::Lives => self.settle(id),
            Outcome::Broken => self.break_off(id),
            Outcome::Gone => self.retire(id),
            Outcome::Closed => {
                if let Some(entry) = self.connections.get(&id) {
                    self.resets.push_back(Header::to_guest(self.cid, entry.ports, Op::Reset));
                }
                self.retire(id);
            }
        }
    }

    /// Notes whether connection `id` has something for the guest, and what it waits for.
    fn settle(&mut self, id: u64) {
        let Some(entry) = self.connections.get_mut(&id) else { return };
        match entry.connection.due() {
            Some(_) => self.waiting.insert(id),
            None => self.waiting.remove(&id),
        };
        let stage = entry.connection.stage();
        if stage != entry.stage {
            if entry.stage == Stage::Requested && stage == Stage::Open {
                self.counters.connections.add(1);
            }
            entry.stage = stage;
            let deadline = (stage == Stage::Closing).then(|| Instant::now() + self.limits.patience);
            self.deadlines.set(id, deadline);
            entry.starves = false;
        }
        // Where room came and went meanwhile, it passes too early, which is no harm.
        if !entry.starves && entry.connection.starves() {
            entry.starves = true;
            self.deadlines.set(id, Some(Instant::now() + CREDIT_PATIENCE));
        }
        let interest = entry.connection.interest();
        if interest != entry.watched {
            entry.watched = interest;
            // It tells at once what is so by now.
            let fd = entry.connection.as_fd().as_raw_fd();
            if let Err(e) = watch(&self.epoll, ControlOperation::Modify, fd, interest, id) {
                self.complain(&format!("cannot watch a connection: {e}"));
                self.break_off(id);
            }
        }
    }

    /// Ends connection `id` and tells the guest, if it ever heard of it.
    fn break_off(&mut self, id: u64) {
        let Some(entry) = self.remove(id) else { return };
        let counters = &self.counters;
        let counter = if entry.stage == Stage::Requested { &counters.refused } else { &counters.resets };
        counter.add(1);
        if entry.connection.known() {
            self.resets.push_back(Header::to_guest(self.cid, entry.ports, Op::Reset));
        }
    }

    /// Ends connection `id` for the guest, and for the host when it has taken all.
    fn retire(&mut self, id: u64) {
        if self.connections.get(&id).is_some_and(|entry| entry.connection.orphaned()) {
            if let Some(entry) = self.connections.get(&id) {
                self.by_ports.remove(&entry.ports);
            }
            self.settle(id);
        } else {
            self.remove(id);
        }
    }

    /// Whether there is room for what a packet of the guest's may cause.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet of the guest's: a header and what follows it.
    pub fn packet(&mut self, mut packet: Areas<'_>) {
        let mut bytes = [0; HEADER];
        if packet.take(HEADER).copy_to(&mut bytes) < HEADER {
            return self.complain("the guest sends packets without a header");
        }
        let header = Header::parse(&bytes);
        self.counters.tx_packets.add(1);
        if header.src_cid != self.cid {
            // An answer would go to an address that is not the guest's.
            return self.complain("the guest sends packets from another's address");
        }
        let known = self.by_ports.get(&header.ports()).copied();
        let op = Op::from_number(header.op);
        let sound = header.dst_cid == HOST_CID && header.kind == STREAM;
        match (op, known) {
            (Some(Op::Reset), None) => {}
            (Some(Op::Reset), Some(_)) if !sound => {}
            (Some(Op::Request), _) if sound => self.request(&header, known),
            (Some(op), Some(id)) if sound && (header.len as usize <= packet.len() || op == Op::Reset) => {
                let data = if op == Op::Data { packet.take(header.len as usize) } else { Areas::default() };
                self.packet_of(id, op, &header, data);
            }
            (_, known) => {
                if sound && let Some(id) = known {
                    self.complain("the guest sends packets that are none of the protocol's");
                    self.counters.resets.add(1);
                    self.remove(id);
                }
                self.resets.push_back(header.refusal());
            }
        }
    }

    fn packet_of(&mut self, id: u64, op: Op, header: &Header, data: Areas<'_>) {
        let Some(entry) = self.connections.get_mut(&id) else { return };
        let len = data.len();
        let outcome = entry.connection.receive(op, header, data);
        match (op, entry.stage) {
            (Op::Data, _) if outcome == Outcome::Lives => self.counters.tx_bytes.add(len as u64),
            (Op::Reset, Stage::Requested) => self.counters.refused.add(1),
            (Op::Reset, Stage::Open) => self.counters.resets.add(1),
            _ => {}
        }
        self.conclude(id, outcome);
    }

    /// The guest wants a connection; `known` has its ports.
    fn request(&mut self, header: &Header, known: Option<u64>) {
        let closing = |id: &u64| self.connections.get(id).is_some_and(|entry| entry.stage == Stage::Closing);
        let over = known.is_none_or(|id| closing(&id));
        if let Some(id) = known {
            // Either it is all but over, or the guest has forgotten it.
            self.remove(id);
        }
        let stream = if over && self.make_room() { self.listener.connect(header.dst_port).ok() } else { None };
        let id = self.new_id();
        match stream.filter(|stream| watch_stream(&self.epoll, stream, id).is_ok()) {
            Some(stream) => {
                self.counters.connections.add(1);
                self.insert(id, header.ports(), Connection::from_guest(stream, header), Stage::Open);
            }
            None => {
                self.counters.refused.add(1);
                self.resets.push_back(header.refusal());
            }
        }
    }

    /// Whether something may have to go to the guest.
    pub fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.waiting.is_empty()
    }

    /// What goes to the guest next. Connections take turns.
    pub fn next(&mut self) -> Option<Outgoing> {
        if let Some(header) = self.resets.pop_front() {
            return Some(Outgoing::Packet(header));
        }
        let id = self.waiting.range(self.last + 1..).chain(&self.waiting).next().copied()?;
        self.last = id;
        match self.connections.get(&id)?.connection.due()? {
            Due::Data(max) => Some(Outgoing::Data { id, max }),
            Due::Say(op, flags) => {
                let entry = self.connections.get_mut(&id)?;
                let header = Header { flags, ..entry.header(self.cid, op) };
                entry.connection.said(op, flags);
                self.settle(id);
                Some(Outgoing::Packet(header))
            }
        }
    }

    /// Reads data of connection `id`, at most `most` bytes, into `room`; returns how many bytes came, and the header for packets of
    /// them, but for their lengths.
    pub fn read<'a>(&mut self, id: u64, room: impl Iterator<Item = VolatileSlice<'a>>, most: usize) -> (Header, usize) {
        let Some(entry) = self.connections.get_mut(&id) else { return (Header::default(), 0) };
        let len = entry.connection.read(room, most);
        let header = if len > 0 { entry.header(self.cid, Op::Data) } else { Header::default() };
        self.counters.rx_bytes.add(len as u64);
        self.settle(id);
        (header, len)
    }

    /// Counts packets that went to the guest.
    pub fn delivered(&self, packets: usize) {
        self.counters.rx_packets.add(packets as u64);
    }

    fn complain(&self, what: &str) {
        if self.complained.first() {
            warn!(cid = self.cid, "vsock: {what}");
        }
    }
}

impl AsRawFd for Switchboard {
    /// What becomes readable with every event that [`Switchboard::look`] is to take in.
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

fn watch(epoll: &Epoll, how: ControlOperation, fd: RawFd, events: EventSet, id: u64) -> io::Result<()> {
    epoll.ctl(how, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, id))
}

fn watch_stream(epoll: &Epoll, stream: &UnixStream, id: u64) -> io::Result<()> {
    watch(epoll, ControlOperation::Add, stream.as_raw_fd(), STREAM_EVENTS, id)
}
