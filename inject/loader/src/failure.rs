//! Failing, in words for an operator.

use core::fmt::{self, Write};

use civic_loader::{FromGuest, Malformed, Step};
use rustix::io::Errno;

use crate::channel::Lost;

/// Why there is no program, or none any more.
pub struct Failure<'a> {
    step: Step,
    errno: i32,
    before: &'static str,
    subject: &'a [u8],
    after: &'static str,
}

impl<'a> Failure<'a> {
    /// `text` in doing `step`, for the system's reason.
    pub fn new(step: Step, errno: Errno, text: &'static str) -> Self {
        Self { errno: errno.raw_os_error(), ..Self::without_errno(step, text) }
    }

    /// `text` in doing `step`.
    pub fn without_errno(step: Step, text: &'static str) -> Self {
        Self { step, errno: 0, before: text, subject: &[], after: "" }
    }

    /// The same, with `subject` and `after` added to the text.
    pub fn about(self, subject: &'a [u8], after: &'static str) -> Self {
        Self { subject, after, ..self }
    }

    /// What another process has told.
    pub fn told(step: Step, errno: i32, text: &'a str) -> Self {
        Self { step, errno, before: "", subject: text.as_bytes(), after: "" }
    }

    /// For the host, with its text in `text`.
    pub fn frame<'t>(&self, text: &'t mut Text) -> FromGuest<'t> {
        // A text that is too long is cut.
        let _ = write!(text, "{}{}{}", self.before, Lossy(self.subject), self.after);
        FromGuest::Failed { step: self.step, errno: self.errno, text: text.as_str() }
    }
}

/// Why there is nothing more to do.
pub enum Ending<'a> {
    /// The host is to be told.
    Failed(Failure<'a>),
    /// There is no host.
    Lost,
}

impl<'a> From<Failure<'a>> for Ending<'a> {
    fn from(failure: Failure<'a>) -> Self {
        Self::Failed(failure)
    }
}

impl From<Lost> for Ending<'_> {
    fn from(Lost: Lost) -> Self {
        Self::Lost
    }
}

impl From<Malformed> for Ending<'_> {
    fn from(malformed: Malformed) -> Self {
        let (text, subject) = match malformed {
            Malformed::Field(field) => ("the monitor sent a message without a valid ", field),
            Malformed::Kind(_) => ("the monitor sent a message of an unknown kind", ""),
            Malformed::Header | Malformed::TooLong(_) => ("the monitor sent what is not a message", ""),
        };
        Failure::without_errno(Step::Protocol, text).about(subject.as_bytes(), "").into()
    }
}

/// A text that is written piece by piece. What has no place in it is cut off.
pub struct Text {
    bytes: [u8; 1024],
    len: usize,
}

impl Text {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { bytes: [0; 1024], len: 0 }
    }

    /// What was written.
    pub fn as_str(&self) -> &str {
        // It was written in whole characters.
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl Write for Text {
    #[inline(never)]
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let taken = &text[..text.floor_char_boundary(self.bytes.len() - self.len)];
        self.bytes[self.len..][..taken.len()].copy_from_slice(taken.as_bytes());
        self.len += taken.len();
        if taken.len() == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

/// Bytes as a text, whatever they are.
pub struct Lossy<'a>(pub &'a [u8]);

impl fmt::Display for Lossy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.utf8_chunks().try_for_each(|chunk| {
            f.write_str(chunk.valid())?;
            if chunk.invalid().is_empty() { Ok(()) } else { f.write_char(char::REPLACEMENT_CHARACTER) }
        })
    }
}
