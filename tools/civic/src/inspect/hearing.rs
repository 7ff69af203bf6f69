//! Where the output of a child's program goes: to ours as it is, line by line with the child's number before it, or into a report.

use std::io::{self, Write};
use std::sync::Arc;

use indicatif::ProgressBar;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use tokio::sync::Notify;

use crate::program::{OurOutputs, Sink};
use crate::talk::Output;

/// Bytes of an output that are kept for a report: the first.
pub const MOST_KEPT: usize = 1 << 20;
/// Bytes after which a line without an end is told all the same.
const LONGEST_LINE: usize = 64 << 10;

/// What hears a program.
pub struct Hearing {
    to: To,
    bar: ProgressBar,
    /// Told when nobody takes it any more.
    closed: Arc<Notify>,
}

/// Where to.
pub enum To {
    /// Our outputs, as it is.
    Ours(OurOutputs),
    /// Our outputs, with this child's number before each line.
    Lines(Lines),
    /// A report.
    Kept(Kept),
}

/// Lines that have not ended yet.
pub struct Lines {
    number: usize,
    outputs: OurOutputs,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// What is kept for a report.
#[derive(Default)]
pub struct Kept {
    /// Of standard output, or the terminal.
    pub stdout: Captured,
    /// Of standard error.
    pub stderr: Captured,
    /// What the loader remarked.
    pub remarks: Vec<String>,
}

/// The beginning of an output.
#[derive(Default)]
pub struct Captured {
    bytes: Vec<u8>,
    total: u64,
}

impl Hearing {
    /// A sign of life ends with the first output; `closed` is told when our output is.
    pub fn new(to: To, bar: ProgressBar, closed: Arc<Notify>) -> Self {
        Self { to, bar, closed }
    }

    /// What was kept, if it was to be.
    pub fn kept(&self) -> Option<&Kept> {
        match &self.to {
            To::Kept(kept) => Some(kept),
            To::Ours(_) | To::Lines(_) => None,
        }
    }
}

impl Sink for Hearing {
    fn take(&mut self, part: Output) {
        self.bar.finish_and_clear();
        match &mut self.to {
            To::Ours(ours) => ours.take(part),
            To::Lines(lines) => lines.take(part),
            To::Kept(kept) => kept.take(part),
        }
        if let To::Ours(OurOutputs { broken: true }) | To::Lines(Lines { outputs: OurOutputs { broken: true }, .. }) =
            self.to
        {
            self.closed.notify_one();
        }
    }

    fn end(&mut self) {
        if let To::Lines(lines) = &mut self.to {
            lines.end();
        }
    }
}

impl Lines {
    /// Of the child of this number.
    pub fn new(number: usize) -> Self {
        Self { number, outputs: OurOutputs::default(), stdout: Vec::new(), stderr: Vec::new() }
    }

    fn take(&mut self, part: Output) {
        match part {
            Output::Stdout(bytes) => {
                self.stdout.extend(bytes);
                let lines = whole_lines(&mut self.stdout, self.number, false);
                self.outputs.take(Output::Stdout(lines));
            }
            Output::Stderr(bytes) => {
                self.stderr.extend(bytes);
                let lines = whole_lines(&mut self.stderr, self.number, false);
                self.outputs.take(Output::Stderr(lines));
            }
            Output::Remark(text) => self.outputs.take(Output::Remark(format!("{}: {text}", self.number))),
        }
    }

    fn end(&mut self) {
        let (out, err) = (&mut self.stdout, &mut self.stderr);
        self.outputs.take(Output::Stdout(whole_lines(out, self.number, true)));
        self.outputs.take(Output::Stderr(whole_lines(err, self.number, true)));
    }
}

/// Takes the lines that have ended, and at the end all, each with the number before it.
fn whole_lines(bytes: &mut Vec<u8>, number: usize, all: bool) -> Vec<u8> {
    let end = match bytes.iter().rposition(|byte| *byte == b'\n') {
        _ if all || bytes.len() > LONGEST_LINE => bytes.len(),
        Some(last) => last + 1,
        None => 0,
    };
    let mut lines = Vec::new();
    for line in bytes[..end].split_inclusive(|byte| *byte == b'\n') {
        lines.extend(format!("{number}: ").into_bytes());
        lines.extend(line);
    }
    if lines.last().is_some_and(|last| *last != b'\n') {
        lines.push(b'\n');
    }
    bytes.drain(..end);
    lines
}

impl Kept {
    fn take(&mut self, part: Output) {
        match part {
            Output::Stdout(bytes) => self.stdout.add(&bytes),
            Output::Stderr(bytes) => self.stderr.add(&bytes),
            Output::Remark(text) => self.remarks.push(text),
        }
    }
}

impl Captured {
    fn add(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let room = MOST_KEPT - self.bytes.len();
        self.bytes.extend(&bytes[..bytes.len().min(room)]);
    }

    /// What was kept, without a character at its end that was cut in two.
    fn whole(&self) -> &[u8] {
        match std::str::from_utf8(&self.bytes) {
            Err(error) if error.error_len().is_none() && self.is_cut() => &self.bytes[..error.valid_up_to()],
            _ => &self.bytes,
        }
    }

    fn is_cut(&self) -> bool {
        self.total > self.bytes.len() as u64
    }
}

impl Serialize for Captured {
    /// Nothing is lost of bytes that are no UTF-8: `encoding` is then `latin-1`, and each character stands for the byte of its number.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = self.whole();
        let (text, encoding) = match std::str::from_utf8(bytes) {
            Ok(text) => (text.to_owned(), "utf-8"),
            Err(_) => (bytes.iter().map(|byte| char::from(*byte)).collect(), "latin-1"),
        };
        let mut fields = serializer.serialize_struct("Captured", 4)?;
        fields.serialize_field("text", &text)?;
        fields.serialize_field("encoding", encoding)?;
        fields.serialize_field("bytes", &self.total)?;
        fields.serialize_field("cut", &self.is_cut())?;
        fields.end()
    }
}

/// Says something of ours on standard error, without failing where nobody reads it.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "civic: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_whole_and_with_a_number() {
        let mut bytes = b"one\ntwo\nthr".to_vec();
        assert_eq!(whole_lines(&mut bytes, 3, false), b"3: one\n3: two\n");
        assert_eq!(whole_lines(&mut bytes, 3, false), b"");
        bytes.extend(b"ee\n\nfour");
        assert_eq!(whole_lines(&mut bytes, 3, true), b"3: three\n3: \n3: four\n");
        assert!(bytes.is_empty() && whole_lines(&mut bytes, 3, true).is_empty());
        let mut long = vec![b'x'; LONGEST_LINE + 1];
        assert_eq!(whole_lines(&mut long, 1, false).len(), "1: ".len() + LONGEST_LINE + 2);
    }

    #[test]
    fn what_is_kept_loses_no_byte() {
        let told = |parts: &[&[u8]]| {
            let mut captured = Captured::default();
            parts.iter().for_each(|part| captured.add(part));
            serde_json::to_value(captured).unwrap()
        };
        let text = serde_json::json!({ "text": "schön", "encoding": "utf-8", "bytes": 6, "cut": false });
        assert_eq!(told(&[b"sch\xc3", b"\xb6n"]), text);
        let raw = serde_json::json!({ "text": "a\u{ff}\u{0}", "encoding": "latin-1", "bytes": 3, "cut": false });
        assert_eq!(told(&[&[b'a', 0xff, 0]]), raw);
        // Cut in the middle of a character.
        let long = [vec![b'x'; MOST_KEPT - 1], "ö".as_bytes().to_vec()].concat();
        let cut = told(&[&long]);
        assert_eq!(
            (&cut["encoding"], &cut["bytes"], &cut["cut"]),
            (&"utf-8".into(), &(MOST_KEPT + 1).into(), &true.into())
        );
        assert_eq!(cut["text"].as_str().unwrap().len(), MOST_KEPT - 1);
    }
}
