//! Moving bytes between the program and the host until the program has ended.
//!
//! ```text
//!   host ── Stdin ──▶ link's buffer ──▶ buffer ──▶ pipe or terminal ──▶ program
//!        ◀─ Credit ────────────────────────┘ as it is emptied              │
//!        ◀─ Stdout, Stderr ── link's buffer ◀── pipes or terminal ◀────────┘
//! ```
//!
//! Nothing is read that has no place: a host that takes nothing stops the program's output, a program that reads nothing stops the
//! host's credit.

use civic_loader::{Exit, FromGuest, Malformed, Output, Stage, Step, ToGuest};
use rustix::event::PollFlags;
use rustix::io::{Errno, read, write};
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Signal, WaitStatus};

use crate::channel::Lost;
use crate::failure::{Ending, Failure};
use crate::freeze::Frozen;
use crate::link::{Buffer, Link, Watched};
use crate::program::Program;
use crate::{room, sys};

/// Credit is given back in pieces of this part of all that there is, or when there is nothing left to be read.
const CREDIT_PARTS: usize = 4;
/// Bytes that a pipe of a program holds which reads or writes much.
const PIPE: usize = 256 << 10;
/// While output streams, the host is asked once in so many rounds whether it has something to say: a hypercall for nothing costs as much as one
/// that takes output.
const DEAF_ROUNDS: u8 = 7;
/// How often to see whether the program has ended where nothing tells, in milliseconds.
const LOOK_MS: u64 = 20;

const OUTPUTS: [Output; 2] = [Output::Stdout, Output::Stderr];

/// A program and its host.
pub struct Relay<'r, 'l> {
    link: &'r mut Link<'l>,
    program: Program,
    frozen: &'r mut Frozen,
    /// Input that the program has not read. Its size is the credit that there is altogether.
    stdin: Buffer<'r>,
    /// Credit to be given back.
    owed: u32,
    /// What the program has read so far.
    read: usize,
    /// There is not all the room for input yet that there can be.
    may_grow: bool,
    /// The pipes of output are as large as they get.
    wide: bool,
    /// Rounds until the host is asked again.
    deaf: u8,
    end: InputEnd,
    /// The program's terminal has nobody at its other end now: it is ready all the time, and gives nothing.
    hung_up: bool,
    exit: Option<Exit>,
}

/// How far the end of the input has come.
#[derive(PartialEq)]
enum InputEnd {
    Far,
    FromHost,
    ToProgram,
}

impl<'r, 'l> Relay<'r, 'l> {
    /// Between the two; `stdin` is as large as the credit that the host was given.
    pub fn new(link: &'r mut Link<'l>, program: Program, stdin: Buffer<'r>, frozen: &'r mut Frozen) -> Self {
        Self {
            link,
            program,
            frozen,
            stdin,
            owed: 0,
            read: 0,
            may_grow: true,
            wide: false,
            deaf: 0,
            end: InputEnd::Far,
            hung_up: false,
            exit: None,
        }
    }

    /// Runs until the program has ended and all that it has written is on its way. Processes that it leaves behind are not waited for.
    pub fn run(mut self) -> Result<Exit, Ending<'static>> {
        let ending = self.relay();
        if self.exit.is_none() {
            match ending {
                Ok(_) => {}
                // Nobody would hear of it.
                Err(Ending::Failed(_)) => self.program.signal(Signal::KILL),
                // As from a terminal whose line is cut.
                Err(Ending::Lost) => self.program.signal(Signal::HUP),
            }
        }
        ending
    }

    fn relay(&mut self) -> Result<Exit, Ending<'static>> {
        loop {
            let mut moved = self.link.send()?;
            self.deaf = if moved { self.deaf.saturating_sub(1) } else { 0 };
            if self.deaf == 0 {
                let heard = self.link.recv()?;
                self.deaf = if heard { 0 } else { DEAF_ROUNDS };
                moved |= heard;
            }
            self.obey()?;
            moved |= self.feed();
            self.repay()?;
            moved |= self.look()?;
            for output in OUTPUTS {
                moved |= self.take(output);
            }
            if let Some(exit) = self.exit
                && OUTPUTS.iter().all(|output| self.program.output(*output).is_none())
            {
                return Ok(exit);
            }
            if !moved {
                self.wait();
            }
        }
    }

    /// Does what the host says.
    fn obey(&mut self) -> Result<(), Ending<'static>> {
        let failure = |text| Failure::without_errno(Step::Protocol, text);
        while let Some((frame, len)) = self.link.frame()? {
            match ToGuest::decode(frame)? {
                ToGuest::Launch(_) => return Err(failure("the monitor launched a second program").into()),
                ToGuest::Stdin(_) if self.end != InputEnd::Far => {
                    return Err(failure("the monitor sent input after the input's end").into());
                }
                ToGuest::Stdin(bytes) => civic_loader::Sink::put(&mut self.stdin, bytes)
                    .map_err(|_| failure("the monitor sent more input than it had credit for"))?,
                ToGuest::StdinEnd if self.end == InputEnd::Far => self.end = InputEnd::FromHost,
                ToGuest::StdinEnd => {}
                ToGuest::Signal(signal) => {
                    let signal = sys::signal(signal).ok_or(Malformed::Field("signal"))?;
                    if self.exit.is_none() {
                        self.program.signal(signal);
                    }
                }
                ToGuest::WindowSize(size) => self.program.resize(size),
                ToGuest::Thaw => self.frozen.thaw(self.link)?,
            }
            self.link.done(len);
        }
        Ok(())
    }

    /// Gives the program its input; whether any went.
    fn feed(&mut self) -> bool {
        let waiting = self.stdin.waiting();
        if waiting.is_empty() {
            if self.end == InputEnd::FromHost && self.program.end_stdin() {
                self.end = InputEnd::ToProgram;
            }
            return false;
        }
        let written = match self.program.stdin() {
            Some(fd) if self.exit.is_none() => write(fd, waiting),
            _ => Err(Errno::PIPE),
        };
        let count = match written {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // Nobody reads it any more.
            Err(_) => {
                let len = waiting.len();
                self.program.close_stdin();
                len
            }
        };
        self.stdin.gone(count);
        self.owed += count as u32;
        self.read += count;
        if self.may_grow && self.read >= self.stdin.len() {
            self.grow();
        }
        count > 0
    }

    /// Has more input come at a time: the host need not wait for what it sent last to be read.
    fn grow(&mut self) {
        self.may_grow = false;
        let before = self.stdin.len();
        let Some(more) = room::more() else { return };
        self.stdin.move_to(more);
        self.owed += (self.stdin.len() - before) as u32;
        if let Some(fd) = self.program.stdin() {
            // A terminal has no such size.
            let _ = fcntl_setpipe_size(fd, PIPE);
        }
    }

    fn repay(&mut self) -> Result<(), Lost> {
        let piece = (self.stdin.len() / CREDIT_PARTS) as u32;
        if (self.owed >= piece || self.owed > 0 && self.stdin.waiting().is_empty()) && self.link.has_room() {
            self.link.tell(FromGuest::Credit(core::mem::take(&mut self.owed)))?;
        }
        Ok(())
    }

    /// Sees whether the program has ended, just now.
    fn look(&mut self) -> Result<bool, Lost> {
        if self.exit.is_some() {
            return Ok(false);
        }
        self.exit = self.program.ended().map(exit);
        if self.exit.is_some() {
            self.link.tell(FromGuest::Stage { stage: Stage::Exited, tsc: sys::rdtsc() })?;
        }
        Ok(self.exit.is_some())
    }

    /// Takes what the program has written, if the host wants it; whether there was any.
    fn take(&mut self, output: Output) -> bool {
        if !self.link.wants_output() {
            return false;
        }
        let Some(fd) = self.program.output(output) else {
            return false;
        };
        self.hung_up = false;
        let mut wanted = 0;
        match self.link.output(output, |room| {
            wanted = room.len();
            read(fd, room)
        }) {
            Ok(count @ 1..) => {
                if count == wanted && !self.wide {
                    self.wide = true;
                    let _ = fcntl_setpipe_size(fd, PIPE);
                }
                return true;
            }
            Err(Errno::INTR) => {}
            // Others may have it open, but the program will write no more.
            Err(Errno::AGAIN) if self.exit.is_none() => {}
            Err(Errno::IO) if self.exit.is_none() => self.hung_up = true,
            _ => self.program.close_output(output),
        }
        false
    }

    fn wait(&mut self) {
        let mut watched = Watched::new();
        match self.program.pidfd() {
            Some(pidfd) if self.exit.is_none() => watched.add(pidfd, PollFlags::IN),
            Some(_) => {}
            None => watched.limit(LOOK_MS),
        }
        if let Some(stdin) = self.program.stdin()
            && (!self.stdin.waiting().is_empty() || self.end == InputEnd::FromHost)
            && !self.hung_up
        {
            watched.add(stdin, PollFlags::OUT);
        }
        if self.link.wants_output() && !self.hung_up {
            OUTPUTS
                .iter()
                .filter_map(|output| self.program.output(*output))
                .for_each(|output| watched.add(output, PollFlags::IN));
        }
        self.link.wait(watched);
    }
}

fn exit(status: WaitStatus) -> Exit {
    match status.terminating_signal() {
        Some(signal) => Exit::Signal { signal: signal as u8, core: status.as_raw() & 0x80 != 0 },
        None => Exit::Code(status.exit_status().unwrap_or_default() as u8),
    }
}
