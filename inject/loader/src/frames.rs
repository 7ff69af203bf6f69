//! The frames: one enum for each direction, each with `encode` and `decode`.

use core::str;

use crate::bytes::{Count, Reader};
use crate::{Full, HEADER, Launch, MAX_PAYLOAD, Malformed, Sink};

/// A frame that nobody has looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    kind: u8,
    payload: &'a [u8],
}

/// The frame that `bytes` begin with, and how many bytes it takes; `None` if it is not whole yet.
///
/// # Errors
/// When no more bytes would make it one. There is no way to find the next.
pub fn split(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, Malformed> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let [kind, 0, 0, 0, len @ ..] = *header else {
        return Err(Malformed::Header);
    };
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_PAYLOAD {
        return Err(Malformed::TooLong(len));
    }
    Ok(rest.get(..len).map(|payload| (Frame { kind, payload }, HEADER + len)))
}

fn header(kind: u8, len: u32) -> [u8; HEADER] {
    let [a, b, c, d] = len.to_le_bytes();
    [kind, 0, 0, 0, a, b, c, d]
}

/// What comes after a header.
trait Payload {
    fn put(&self, out: &mut impl Sink) -> Result<(), Full>;
}

fn encode(kind: u8, payload: &impl Payload, out: &mut impl Sink) -> Result<(), Full> {
    let mut len = Count::default();
    payload.put(&mut len)?;
    if len.0 > MAX_PAYLOAD {
        return Err(Full);
    }
    out.put(&header(kind, len.0 as u32))?;
    payload.put(out)
}

/// Where output of the program came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Its standard output, or its terminal.
    Stdout,
    /// Its standard error.
    Stderr,
}

impl Output {
    /// The header of a frame of `len` bytes of it, for who has the bytes in place already.
    pub fn header(self, len: u32) -> [u8; HEADER] {
        header(if self == Self::Stdout { STDOUT } else { STDERR }, len)
    }
}

const HELLO: u8 = 1;
const STAGE: u8 = 2;
const STDOUT: u8 = 3;
const STDERR: u8 = 4;
const CREDIT: u8 = 5;
const EXITED: u8 = 6;
const FAILED: u8 = 7;
const WARNING: u8 = 8;

const LAUNCH: u8 = 16;
const STDIN: u8 = 17;
const STDIN_END: u8 = 18;
const SIGNAL: u8 = 19;
const WINDOW_SIZE: u8 = 20;
const THAW: u8 = 21;

/// How far the loader has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// It runs.
    Started = 1,
    /// It knows what to do.
    Configured,
    /// The guest's processes stand still, if they are to.
    Frozen,
    /// The program's root is there.
    Mounted,
    /// The program's network is there, if it is to have one.
    NetworkUp,
    /// The program runs.
    Execed,
    /// The program has ended.
    Exited,
}

impl Stage {
    const ALL: [Self; 7] =
        [Self::Started, Self::Configured, Self::Frozen, Self::Mounted, Self::NetworkUp, Self::Execed, Self::Exited];
}

/// What the loader was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Understanding the host.
    Protocol = 1,
    /// Freezing the guest's processes.
    Freeze,
    /// Leaving the guest's mounts alone.
    Namespace,
    /// Finding and mounting the store.
    Store,
    /// Making the program's root.
    Root,
    /// Bringing up the network.
    Network,
    /// Making the program's terminal or pipes.
    Terminal,
    /// Making the program's process: its user, its priority, its folder.
    Process,
    /// Executing the program's file.
    Exec,
}

impl Step {
    const ALL: [Self; 9] = [
        Self::Protocol,
        Self::Freeze,
        Self::Namespace,
        Self::Store,
        Self::Root,
        Self::Network,
        Self::Terminal,
        Self::Process,
        Self::Exec,
    ];
}

/// How the program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(u8),
    /// By a signal.
    Signal {
        /// Its number.
        signal: u8,
        /// Whether there is a core dump of it.
        core: bool,
    },
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// In characters.
    pub rows: u16,
    /// In characters.
    pub columns: u16,
    /// Its width in pixels, 0 if nobody knows.
    pub width: u16,
    /// Its height in pixels, 0 if nobody knows.
    pub height: u16,
}

impl WindowSize {
    pub(crate) fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        [self.rows, self.columns, self.width, self.height].into_iter().try_for_each(|n| out.put(&n.to_le_bytes()))
    }

    pub(crate) fn read(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let mut number = || from.u16("window size");
        Ok(Self { rows: number()?, columns: number()?, width: number()?, height: number()? })
    }
}

/// What the loader says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromGuest<'a> {
    /// The first frame.
    Hello {
        /// [`VERSION`](crate::VERSION).
        version: u16,
        /// So many bytes of input can be sent.
        credit: u32,
    },
    /// It has come so far.
    Stage {
        /// How far.
        stage: Stage,
        /// The guest's time stamp counter at that moment.
        tsc: u64,
    },
    /// Output of the program, or of its terminal.
    Stdout(&'a [u8]),
    /// The program's other output.
    Stderr(&'a [u8]),
    /// So many more bytes of input can be sent.
    Credit(u32),
    /// The program has ended. The last frame.
    Exited(Exit),
    /// There is no program, or none any more that the loader could serve. The last frame.
    Failed {
        /// In doing what.
        step: Step,
        /// The system's reason, 0 if it is not the system's.
        errno: i32,
        /// What, in an operator's words; without the system's reason.
        text: &'a str,
    },
    /// Something that was wanted could not be done, and the program runs without it.
    Warning(&'a str),
}

impl<'a> FromGuest<'a> {
    /// Writes it, as a whole frame.
    ///
    /// # Errors
    /// When it is too long for one, or `out` is full.
    pub fn encode(&self, out: &mut impl Sink) -> Result<(), Full> {
        encode(self.kind(), self, out)
    }

    /// From a frame.
    ///
    /// # Errors
    /// When it is not such a frame.
    pub fn decode(frame: Frame<'a>) -> Result<Self, Malformed> {
        let mut from = Reader(frame.payload);
        let text = |bytes| str::from_utf8(bytes).map_err(|_| Malformed::Field("text"));
        let this = match frame.kind {
            HELLO => Self::Hello { version: from.u16("version")?, credit: from.u32("credit")? },
            STAGE => {
                let stage = from.u8("stage")?;
                let stage = Stage::ALL.into_iter().find(|s| *s as u8 == stage).ok_or(Malformed::Field("stage"))?;
                Self::Stage { stage, tsc: u64::from_le_bytes(from.array("time stamp")?) }
            }
            STDOUT => Self::Stdout(from.rest()),
            STDERR => Self::Stderr(from.rest()),
            CREDIT => Self::Credit(from.u32("credit")?),
            EXITED => Self::Exited(match from.array("exit status")? {
                [0, code, 0] => Exit::Code(code),
                [1, signal, core @ 0..=1] => Exit::Signal { signal, core: core == 1 },
                _ => return Err(Malformed::Field("exit status")),
            }),
            FAILED => {
                let step = from.u8("step")?;
                let step = Step::ALL.into_iter().find(|s| *s as u8 == step).ok_or(Malformed::Field("step"))?;
                Self::Failed { step, errno: i32::from_le_bytes(from.array("errno")?), text: text(from.rest())? }
            }
            WARNING => Self::Warning(text(from.rest())?),
            kind => return Err(Malformed::Kind(kind)),
        };
        from.end("end").map(|()| this)
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Hello { .. } => HELLO,
            Self::Stage { .. } => STAGE,
            Self::Stdout(_) => STDOUT,
            Self::Stderr(_) => STDERR,
            Self::Credit(_) => CREDIT,
            Self::Exited(_) => EXITED,
            Self::Failed { .. } => FAILED,
            Self::Warning(_) => WARNING,
        }
    }
}

impl Payload for FromGuest<'_> {
    fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        match self {
            Self::Hello { version, credit } => {
                out.put(&version.to_le_bytes())?;
                out.put(&credit.to_le_bytes())
            }
            Self::Stage { stage, tsc } => {
                out.put(&[*stage as u8])?;
                out.put(&tsc.to_le_bytes())
            }
            Self::Stdout(bytes) | Self::Stderr(bytes) => out.put(bytes),
            Self::Credit(more) => out.put(&more.to_le_bytes()),
            Self::Exited(Exit::Code(code)) => out.put(&[0, *code, 0]),
            Self::Exited(Exit::Signal { signal, core }) => out.put(&[1, *signal, u8::from(*core)]),
            Self::Failed { step, errno, text } => {
                out.put(&[*step as u8])?;
                out.put(&errno.to_le_bytes())?;
                out.put(text.as_bytes())
            }
            Self::Warning(text) => out.put(text.as_bytes()),
        }
    }
}

/// What the monitor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToGuest<'a> {
    /// What to run, and how. The first frame.
    Launch(Launch<'a>),
    /// Input for the program; no more than there is credit for.
    Stdin(&'a [u8]),
    /// The input's end.
    StdinEnd,
    /// A signal for the program's process group.
    Signal(u8),
    /// The terminal's new size.
    WindowSize(WindowSize),
    /// The guest's processes may go on.
    Thaw,
}

impl<'a> ToGuest<'a> {
    /// Writes it, as a whole frame.
    ///
    /// # Errors
    /// When it is too long for one, or `out` is full.
    pub fn encode(&self, out: &mut impl Sink) -> Result<(), Full> {
        encode(self.kind(), self, out)
    }

    /// From a frame.
    ///
    /// # Errors
    /// When it is not such a frame.
    pub fn decode(frame: Frame<'a>) -> Result<Self, Malformed> {
        let mut from = Reader(frame.payload);
        let this = match frame.kind {
            LAUNCH => Self::Launch(Launch::read(&mut from)?),
            STDIN => Self::Stdin(from.rest()),
            STDIN_END => Self::StdinEnd,
            SIGNAL => Self::Signal(from.u8("signal")?),
            WINDOW_SIZE => Self::WindowSize(WindowSize::read(&mut from)?),
            THAW => Self::Thaw,
            kind => return Err(Malformed::Kind(kind)),
        };
        from.end("end").map(|()| this)
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Launch(_) => LAUNCH,
            Self::Stdin(_) => STDIN,
            Self::StdinEnd => STDIN_END,
            Self::Signal(_) => SIGNAL,
            Self::WindowSize(_) => WINDOW_SIZE,
            Self::Thaw => THAW,
        }
    }
}

impl Payload for ToGuest<'_> {
    fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        match self {
            Self::Launch(launch) => launch.put(out),
            Self::Stdin(bytes) => out.put(bytes),
            Self::Signal(signal) => out.put(&[*signal]),
            Self::WindowSize(size) => size.put(out),
            Self::StdinEnd | Self::Thaw => Ok(()),
        }
    }
}
