//! One pair of queues: frames between the guest and one entrance of the wire, on a thread of their own.
//!
//! Receiving reads long frames straight into receive buffers. How long a frame is shows only afterwards, so buffers are taken for one as
//! long as the last ones were, and what does not fit goes to `rest` and is copied from there into more buffers. When the guest
//! has not given enough, the frame is held until it has: the only one, the others stay in the link's queue, where the host
//! counts what it drops.
//!
//! Readiness is edge-triggered: `readable` remembers that the link was not yet read dry.
//!
//! A turn serves a bounded number of frames of one direction, then the worker looks at everything else.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use nix::unistd::read;
use vm_memory::GuestMemoryMmap;

use super::super::Interrupt;
use super::super::rate::RateLimiter;
use super::super::ring::{Ring, Side};
use super::super::worker::{Fault, Handler};
use super::card::{Card, Way};
use super::frame::{Outgoing, Stock};
use super::link::FrameLink;
use super::{MAX_FRAME, NET_HEADER, NUM_BUFFERS};
use crate::counters::Counter;

/// Frames of one direction before the worker looks at its commands and the other direction.
const TURN: usize = 64;
/// The driver is told of what was done after so many frames or bytes: small frames by the batch, large ones while the next is on
/// its way.
const TELL_FRAMES: usize = 16;
const TELL_BYTES: usize = 64 << 10;

/// Frames that are expected to be no longer are read into `rest` and copied: so little costs less to copy than a vectored call
/// does to set up. Measured with `net::tests::bench`: 0.75 against 1.0 µs for 60 bytes, about even for 1500.
const COPIED: usize = 4096;

/// Tokens of what the thread watches.
const LINK: u16 = 0;
const RX_RATE: u16 = 1;
const TX_RATE: u16 = 2;
const SWITCH: u16 = 3;

/// A direction's rate, and where it stands.
pub struct Pace {
    limiter: RateLimiter,
    /// The bytes of the operation that may go ahead and did not yet.
    granted: Option<u64>,
    /// It was refused, and the timer runs.
    waits: bool,
}

impl Pace {
    pub fn new(limiter: RateLimiter) -> Self {
        Self { limiter, granted: None, waits: false }
    }

    /// Whether a frame of about `bytes` may pass; one that may not adds to `delays`.
    fn allows(&mut self, bytes: usize, delays: &Counter) -> bool {
        if self.granted.is_none() && !self.waits {
            self.granted = self.limiter.take(bytes as u64).then_some(bytes as u64);
            self.waits = self.granted.is_none();
            delays.add(u64::from(self.waits));
        }
        !self.waits
    }

    /// A frame of `bytes` passed.
    fn passed(&mut self, bytes: usize) {
        if let Some(granted) = self.granted.take() {
            self.limiter.settle(granted, bytes as u64);
        }
    }

    fn expired(&mut self) {
        self.limiter.expired();
        self.waits = false;
    }
}

/// What a pair's thread works on.
pub struct PairHandler {
    pub pair: usize,
    pub receive: Ring,
    pub transmit: Ring,
    pub card: Arc<Card>,
    pub interrupt: Arc<dyn Interrupt>,
    /// A frame may spread over several receive buffers.
    pub mergeable: bool,
    pub rx_rate: Option<Pace>,
    pub tx_rate: Option<Pace>,
    link: Arc<dyn FrameLink>,
    /// It was not yet read until it would block.
    readable: bool,
    /// The link would not take the next frame: it says when it does.
    blocked: bool,
    /// How long the next frame is likely to be.
    expected: usize,
    /// The mirror has frames of which its thread was not told.
    mirrored: bool,
    /// Room for what of a frame exceeds the buffers taken for it.
    rest: Box<[u8]>,
}

/// What became of a wish for buffers.
#[derive(PartialEq, Eq)]
enum Stocked {
    Enough,
    /// The driver has not given enough yet.
    Short,
    /// All that it can ever give would not do.
    Never,
}

/// How a turn of receiving ended.
#[derive(PartialEq, Eq)]
enum Turn {
    /// Something will say when to go on: the link, the driver, a timer.
    Waits,
    /// There may be more to do.
    Over,
}

impl PairHandler {
    pub fn new(
        pair: usize,
        (receive, transmit): (Ring, Ring),
        card: &Arc<Card>,
        interrupt: &Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            pair,
            receive,
            transmit,
            card: Arc::clone(card),
            interrupt: Arc::clone(interrupt),
            mergeable: false,
            rx_rate: None,
            tx_rate: None,
            link: Arc::clone(&card.links[pair]),
            readable: true,
            blocked: false,
            expected: NET_HEADER,
            mirrored: false,
            rest: vec![0; MAX_FRAME].into_boxed_slice(),
        }
    }
}

impl Handler for PairHandler {
    fn sources(&self) -> Vec<(RawFd, u16)> {
        let timer = |pace: &Option<Pace>, token| pace.as_ref().map(|pace| (pace.limiter.as_raw_fd(), token));
        let switch = (self.pair == 0).then(|| (self.card.switch.changed.as_raw_fd(), SWITCH));
        let link = Some((self.link.fd().as_raw_fd(), LINK));
        [link, timer(&self.rx_rate, RX_RATE), timer(&self.tx_rate, TX_RATE), switch].into_iter().flatten().collect()
    }

    fn kicked(&mut self, position: usize) -> Result<(), Fault> {
        if position == 0 { self.receive_frames() } else { self.send_frames() }
    }

    fn ready(&mut self, token: u16) -> Result<(), Fault> {
        match token {
            RX_RATE => {
                self.rx_rate.iter_mut().for_each(Pace::expired);
                self.receive_frames()
            }
            TX_RATE => {
                self.tx_rate.iter_mut().for_each(Pace::expired);
                self.send_frames()
            }
            SWITCH => {
                // Ready for output is no news.
                if self.card.switch.changed.read().is_ok() {
                    self.interrupt.config();
                }
                Ok(())
            }
            _ => {
                self.readable = true;
                self.receive_frames()?;
                if self.blocked { self.send_frames() } else { Ok(()) }
            }
        }
    }

    fn rings(&self) -> Vec<&Ring> {
        vec![&self.receive, &self.transmit]
    }
}

/// Receiving.
impl PairHandler {
    fn receive_frames(&mut self) -> Result<(), Fault> {
        let card = Arc::clone(&self.card);
        let mut way = card.way(self.pair);
        self.receive.ignore_kicks()?;
        if !way.in_use {
            return Ok(());
        }
        let ram = self.receive.ram();
        let mut stock = Stock::default();
        let turn = self.receive_turn(&ram, &mut stock, &mut way);
        // With any kick that a shortage needs already asked for: it has to come with the next buffer, not with one that is there.
        self.receive.put_back(stock.len() as u16);
        self.tell()?;
        if turn? == Turn::Over { self.receive.kick_self() } else { Ok(()) }
    }

    fn receive_turn<'a>(
        &mut self,
        ram: &'a GuestMemoryMmap,
        stock: &mut Stock<'a>,
        way: &mut Way,
    ) -> Result<Turn, Fault> {
        let (mut frames, mut bytes) = (0, 0);
        for _ in 0..TURN {
            let delivered = if !self.card.switch.is_up() {
                self.lose_frame(way)
            } else if way.held.is_empty() {
                self.receive_frame(ram, stock, way)?
            } else {
                self.deliver_held(ram, stock, way)?
            };
            let Some(len) = delivered else { return Ok(Turn::Waits) };
            (frames, bytes) = (frames + 1, bytes + len);
            if frames == TELL_FRAMES || bytes >= TELL_BYTES {
                (frames, bytes) = (0, 0);
                self.tell()?;
            }
        }
        Ok(Turn::Over)
    }

    /// Tells the driver, and the mirror, of frames that came.
    fn tell(&mut self) -> Result<(), Fault> {
        let told = self.receive.notify();
        if std::mem::take(&mut self.mirrored) {
            self.card.mirror.wake(self.pair);
        }
        told?;
        Ok(())
    }

    /// Receives one frame, and delivers or drops it; returns its length, or none when there is a reason to wait.
    fn receive_frame<'a>(
        &mut self,
        ram: &'a GuestMemoryMmap,
        stock: &mut Stock<'a>,
        way: &mut Way,
    ) -> Result<Option<usize>, Fault> {
        if !self.readable || self.stock_up(ram, stock, 1, true)? != Stocked::Enough {
            return Ok(None);
        }
        if self.expected > COPIED {
            // As many as are there and likely to be needed: too few are no harm.
            self.stock_up(ram, stock, self.expected, false)?;
        }
        let expected = self.expected - NET_HEADER;
        if let Some(pace) = &mut self.rx_rate
            && !pace.allows(expected, &self.card.counters.rx_delays)
        {
            return Ok(None);
        }
        let Some((len, direct)) = self.read(stock) else { return Ok(None) };
        if !(NET_HEADER + 1..=MAX_FRAME).contains(&len) {
            self.card.counters.rx_drops.add(1);
            return Ok(Some(len));
        }
        if let Some(pace) = &mut self.rx_rate {
            pace.passed(len - NET_HEADER);
        }
        self.expected = len.max(self.expected - self.expected / 8);
        if self.card.mirror.is_fed() {
            self.mirror(stock, len, direct);
        }
        if direct < len {
            let rest = len - direct;
            match self.stock_up(ram, stock, len, true)? {
                Stocked::Enough => stock.write(direct, &self.rest[..rest]),
                Stocked::Short => {
                    way.held = stock.read(direct);
                    way.held.extend(&self.rest[..rest]);
                    return Ok(None);
                }
                Stocked::Never => {
                    self.card.counters.rx_drops.add(1);
                    return Ok(Some(len));
                }
            }
        }
        self.deliver(stock, len)?;
        Ok(Some(len))
    }

    /// Copies a frame for the mirror: `direct` bytes from the stock, what is left of `len` from `rest`.
    fn mirror(&mut self, stock: &Stock<'_>, len: usize, direct: usize) {
        self.card.mirror.take(self.pair, len, |bytes| {
            let (front, back) = bytes.split_at_mut(direct);
            stock.copy_to(front);
            back.copy_from_slice(&self.rest[..back.len()]);
        });
        self.mirrored = true;
    }

    fn deliver_held<'a>(
        &mut self,
        ram: &'a GuestMemoryMmap,
        stock: &mut Stock<'a>,
        way: &mut Way,
    ) -> Result<Option<usize>, Fault> {
        let len = way.held.len();
        match self.stock_up(ram, stock, len, true)? {
            Stocked::Enough => {
                stock.write(0, &way.held);
                self.deliver(stock, len)?;
            }
            Stocked::Short => return Ok(None),
            Stocked::Never => self.card.counters.rx_drops.add(1),
        }
        way.held.clear();
        Ok(Some(len))
    }

    /// Takes buffers until `room` bytes fit; `wait` to have the driver kick when there are too few.
    fn stock_up<'a>(
        &mut self,
        ram: &'a GuestMemoryMmap,
        stock: &mut Stock<'a>,
        room: usize,
        wait: bool,
    ) -> Result<Stocked, Fault> {
        let most = if self.mergeable { usize::from(self.receive.size()) } else { 1 };
        while stock.room() < room {
            if stock.len() == most {
                return Ok(Stocked::Never);
            }
            let mut parts = 0;
            let taken = self.receive.walk(ram, |side, part| {
                if side == Side::Writable {
                    stock.push_part(part);
                    parts += 1;
                }
            })?;
            match taken {
                Some(head) if stock.push_buffer(head, parts) < NET_HEADER => {
                    return Err(Fault(format!("receive buffer {head} has no room for a header")));
                }
                Some(_) => {}
                None if wait && self.receive.await_kick()? => {}
                None => return Ok(Stocked::Short),
            }
        }
        Ok(Stocked::Enough)
    }

    /// Gives the first `len` bytes of the stock to the driver as a frame.
    fn deliver(&mut self, stock: &mut Stock<'_>, len: usize) -> Result<(), Fault> {
        let buffers = stock.count_for(len) as u16;
        stock.write(NUM_BUFFERS, &buffers.to_le_bytes());
        self.receive.used_together(stock.fill(len))?;
        self.card.counters.rx_frames.add(1);
        self.card.counters.rx_bytes.add((len - NET_HEADER) as u64);
        Ok(())
    }

    /// Reads a frame that goes nowhere; returns its length if there was one.
    fn lose_frame(&mut self, way: &mut Way) -> Option<usize> {
        let held = std::mem::take(&mut way.held);
        let len = if held.is_empty() { self.read(&mut Stock::default())?.0 } else { held.len() };
        self.card.counters.rx_drops.add(1);
        Some(len)
    }

    /// Reads a message into `stock` and, from where that ends, `rest`; returns its length and what went into the stock.
    fn read(&mut self, stock: &mut Stock<'_>) -> Option<(usize, usize)> {
        if self.readable && !self.card.is_gone() {
            let got = loop {
                let fd = self.link.fd();
                let got = match self.expected > COPIED {
                    true => stock.receive(fd, &mut self.rest),
                    false => read(fd, &mut self.rest).map(|len| (len, 0)).map_err(io::Error::from),
                };
                if !got.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {
                    break got;
                }
            };
            match got {
                // The far side was closed.
                Ok((0, _)) => {
                    self.readable = false;
                    self.card.counters.errors.add(1);
                }
                Ok(got) => return Some(got),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(e) => {
                    self.readable = false;
                    self.card.failed("cannot receive", &e);
                }
            }
        }
        None
    }
}

/// Sending.
impl PairHandler {
    fn send_frames(&mut self) -> Result<(), Fault> {
        let sent = self.send_turn();
        // Also where the next frame is broken: what was sent before is done.
        let told = self.transmit.notify();
        sent.and(told)
    }

    fn send_turn(&mut self) -> Result<(), Fault> {
        let ram = self.transmit.ram();
        let mut frame = Outgoing::default();
        let (mut frames, mut bytes) = (0, 0);
        self.blocked = false;
        self.transmit.ignore_kicks()?;
        for _ in 0..TURN {
            frame.clear();
            let taken = self.transmit.walk(&ram, |side, part| {
                if side == Side::Readable {
                    frame.push(part);
                }
            })?;
            let Some(head) = taken else {
                self.transmit.notify()?;
                if self.transmit.await_kick()? {
                    continue;
                }
                return Ok(());
            };
            if !self.send(&frame) {
                self.transmit.put_back(1);
                return Ok(());
            }
            self.transmit.used(head, 0)?;
            (frames, bytes) = (frames + 1, bytes + frame.len());
            if frames == TELL_FRAMES || bytes >= TELL_BYTES {
                (frames, bytes) = (0, 0);
                self.transmit.notify()?;
            }
        }
        self.transmit.kick_self()
    }

    /// Sends one frame with its header, or drops it; false when it has to wait.
    fn send(&mut self, frame: &Outgoing<'_>) -> bool {
        let counters = &self.card.counters;
        let sound = (NET_HEADER + 1..=MAX_FRAME).contains(&frame.len());
        if !sound || self.card.is_gone() || !self.card.switch.is_up() {
            counters.tx_drops.add(1);
            return true;
        }
        let len = frame.len() - NET_HEADER;
        if let Some(pace) = &mut self.tx_rate
            && !pace.allows(len, &counters.tx_delays)
        {
            return false;
        }
        match frame.send(self.link.fd()) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                return false;
            }
            Ok(()) => {
                counters.tx_frames.add(1);
                counters.tx_bytes.add(len as u64);
            }
            // The interface is down (EIO), or the frame is nonsense (EINVAL).
            Err(e) => {
                counters.tx_drops.add(1);
                self.card.failed("cannot send", &e);
            }
        }
        if let Some(pace) = &mut self.tx_rate {
            pace.passed(len);
        }
        true
    }
}
