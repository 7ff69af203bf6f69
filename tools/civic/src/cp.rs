//! `civic cp`: files into a fork and out of it. What does it in the guest is the loader itself, and it speaks tar.
//!
//! ```text
//!  files here ─ archive thread ─► Stdin ──► loader ─► files there ─► Stdout: how much it was
//!  files here ◄─ archive thread ◄─ Stdout ◄─ loader ◄─ files there
//!                                  Stderr: a line for each complaint
//! ```
//!
//! In place of files here there may be a tar stream. Exit status: 0 if all was copied, 125 if not.

use std::ffi::OsString;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use civic_api::{CopyDirection, CopyRequest, ProgramRequest, validate_name};
use civic_loader::archive::last_part;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::archive::{self, Copied, Destination, shown};
use crate::cli::CpArgs;
use crate::console::{Signals, read_stdin};
use crate::rundir::RunDir;
use crate::show::print_json;
use crate::talk::{Output, Talk};
use crate::{advice, on};

/// Bytes that go to the guest at a time. All of its credit is twice that.
const CHUNK: usize = 32 << 10;
/// Bytes of a line from the guest that are told.
const LINE: usize = 4096;
/// How long what is half made here may take to be cleared away when we are told to end.
const LAST: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(200);
const SPINNER: &str = "{spinner} {msg} {binary_bytes} ({elapsed})";

/// Where files are or go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a fork.
    Guest {
        /// The fork.
        name: String,
        /// Absolute.
        path: String,
    },
    /// On this host.
    Here(PathBuf),
    /// A tar stream.
    Stream,
}

impl Place {
    /// `NAME:PATH`, `-` or a path. What has a slash before its first colon is a path.
    pub fn parse(text: OsString) -> Result<Self, String> {
        if text.is_empty() {
            return Err("there is no path".into());
        }
        if text == "-" {
            return Ok(Self::Stream);
        }
        let bytes = text.as_bytes();
        let colon = bytes.iter().position(|byte| matches!(byte, b':' | b'/')).filter(|at| bytes[*at] == b':');
        let Some(colon) = colon else {
            return Ok(Self::Here(text.into()));
        };
        let text = std::str::from_utf8(bytes).map_err(|_| "the path in the guest is not UTF-8".to_owned())?;
        let (name, path) = (&text[..colon], &text[colon + 1..]);
        validate_name(name).map_err(|error| format!("{error}; a path that has a colon needs ./ before it"))?;
        if !path.starts_with('/') {
            return Err(format!("'{path}' is no absolute path in the guest"));
        }
        Ok(Self::Guest { name: name.into(), path: path.into() })
    }
}

/// What was copied, and how long it took.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    copied: Copied,
    us: u64,
}

/// Copies files.
pub async fn cp(dir: &RunDir, args: CpArgs) -> Result<()> {
    let begun = Instant::now();
    let to_stream = args.destination == Place::Stream;
    let copied = match (&args.source, &args.destination) {
        (Place::Guest { name, path }, to @ (Place::Here(_) | Place::Stream)) => out(dir, &args, name, path, to).await,
        (from @ (Place::Here(_) | Place::Stream), Place::Guest { name, path }) => {
            into(dir, &args, from, name, path).await
        }
        _ => Err(advice::error(
            "files are copied from this host into a fork, or out of a fork to this host",
            "write one of the two as NAME:PATH",
        )),
    }?;
    let report = Report { copied, us: begun.elapsed().as_micros() as u64 };
    match args.json {
        true if to_stream => Ok(writeln!(io::stderr(), "{}", serde_json::to_string(&report)?)?),
        true => print_json(&report),
        false => Ok(()),
    }
}

async fn out(dir: &RunDir, args: &CpArgs, name: &str, path: &str, to: &Place) -> Result<Copied> {
    let destination = match to {
        Place::Here(to) => Some(Destination::new(to, last_part(path.as_bytes())).map_err(|error| {
            advice::error(format!("{error:#}"), "give a folder that is there, or a new name in one")
        })?),
        _ if io::stdout().is_terminal() => {
            return Err(advice::error("a tar stream is nothing for a terminal", "have it go to a file or a program"));
        }
        _ => None,
    };
    let copy = CopyRequest { direction: CopyDirection::Out, path: path.into(), rename: false };
    let (_, no_input) = mpsc::channel(1);
    let (content, wanted) = mpsc::channel(4);
    let guest = Guest::begin(dir, args, name, copy, no_input, Some(content)).await?;
    let (told, keep_owners) = (guest.told.clone(), args.archive);
    let mut here = tokio::task::spawn_blocking(move || {
        let stream = FromGuest { wanted, part: Vec::new(), done: 0, told: told.clone() };
        match destination {
            Some(to) => archive::unpack(stream, &to, keep_owners, &|text| told.say(&text)),
            None => archive::count(Tee(stream)),
        }
    });
    let copied = guest.until_the_end(&mut here).await;
    if copied.is_err() && !here.is_finished() {
        // What is half made is cleared away, now that nothing more comes.
        let _ = tokio::time::timeout(LAST, here).await;
    }
    copied.map(|(copied, _)| copied)
}

async fn into(dir: &RunDir, args: &CpArgs, from: &Place, name: &str, path: &str) -> Result<Copied> {
    let from = match from {
        Place::Here(from) => {
            from.symlink_metadata().map_err(|error| {
                advice::error(format!("'{}': {error}", from.display()), "give a file or folder to copy")
            })?;
            Some(from.clone())
        }
        _ if io::stdin().is_terminal() => {
            return Err(advice::error("a terminal gives no tar stream", "have it come from a file or a program"));
        }
        _ => None,
    };
    let copy = CopyRequest { direction: CopyDirection::In, path: path.into(), rename: from.is_some() };
    let (input, typed) = mpsc::channel(2);
    let guest = Guest::begin(dir, args, name, copy, typed, None).await?;
    let (told, keep_owners) = (guest.told.clone(), args.archive);
    let mut here = tokio::task::spawn_blocking(move || {
        let Some(from) = from else {
            read_stdin(input);
            return Ok(Copied::default());
        };
        let stream = BufWriter::with_capacity(CHUNK, ToGuest { input, told: told.clone() });
        let origin = last_part(from.as_os_str().as_bytes());
        archive::pack(&from, origin, keep_owners, stream, &|text| told.say(&text)).map(|()| Copied::default())
    });
    let (_, summary) = guest.until_the_end(&mut here).await?;
    copied(&summary).context("the guest does not say how much it has got")
}

/// What the loader says at the end: two numbers in a line.
fn copied(summary: &[u8]) -> Option<Copied> {
    let (files, bytes) = std::str::from_utf8(summary).ok()?.strip_suffix('\n')?.split_once(' ')?;
    Some(Copied { files: files.parse().ok()?, bytes: bytes.parse().ok()? })
}

/// The other side of the copying.
struct Guest {
    name: String,
    talk: Talk,
    /// Takes what the loader has written apart; gives what nobody else got of it.
    sorted: JoinHandle<Vec<u8>>,
    told: Told,
}

impl Guest {
    /// Has the loader started. Its output goes to `content`, or is kept if it is little.
    async fn begin(
        dir: &RunDir,
        args: &CpArgs,
        name: &str,
        copy: CopyRequest,
        input: mpsc::Receiver<Vec<u8>>,
        content: Option<mpsc::Sender<Vec<u8>>>,
    ) -> Result<Self> {
        let request = ProgramRequest {
            copy: Some(copy),
            root: args.root.map(Into::into),
            freeze: args.freeze.map_or_else(Default::default, Into::into),
            wait_ms: args.wait.saturating_mul(1000),
            ..ProgramRequest::default()
        };
        let program = on(dir, name, async |vm| vm.start_program(&request).await).await?;
        let stream = on(dir, name, async |vm| vm.program(program.id).await).await?;
        let (output, written) = mpsc::channel(16);
        let told = Told::new(name);
        let sorted = tokio::spawn(sort(written, content, told.clone()));
        Ok(Self { name: name.into(), talk: Talk::start(stream, input, output), sorted, told })
    }

    /// Until it and what is done here have ended, or one of them has failed. Gives what was done here, and what was kept of the output.
    async fn until_the_end(self, here: &mut JoinHandle<Result<Copied>>) -> Result<(Copied, Vec<u8>)> {
        let Self { name, talk, sorted, told } = self;
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let guest = async {
            let outcome = talk.hear().await?;
            let kept = sorted.await.context("what the guest says is not heard any more")?;
            let last = told.end();
            match outcome.status {
                0 => {
                    last.into_iter().for_each(|line| told.say(&line));
                    Ok(kept)
                }
                status => {
                    let why = last.unwrap_or_else(|| format!("what copies there has ended with status {status}"));
                    let hint = "mend that and copy again: what was copied until now stays";
                    Err(advice::error(format!("{name}: {why}"), hint))
                }
            }
        };
        let here = async {
            match here.await.context("what is done here has broken off").flatten() {
                // The guest is gone, and that is told.
                Err(error) if is(&error, ErrorKind::ConnectionAborted) => std::future::pending().await,
                // The reader is gone, and that is no matter.
                Err(error) if is(&error, ErrorKind::BrokenPipe) => Err(error),
                // If the guest has failed, it knows better.
                Err(error) if is(&error, ErrorKind::UnexpectedEof) => Ok(Err(failed(&error))),
                Err(error) => Err(failed(&error)),
                Ok(copied) => Ok(Ok(copied)),
            }
        };
        let ended = tokio::select! {
            ended = async { tokio::try_join!(here, guest) } => ended,
            _ = signals.next() => Err(advice::error("interrupted", "what was copied until now stays")),
        };
        told.bar.finish_and_clear();
        let (here, kept) = ended?;
        Ok((here?, kept))
    }
}

fn failed(error: &anyhow::Error) -> anyhow::Error {
    advice::error(format!("{error:#}"), "mend that and copy again: what was copied until now stays")
}

fn is(error: &anyhow::Error, kind: ErrorKind) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == kind)
}

/// Takes what the loader has written apart.
async fn sort(mut written: mpsc::Receiver<Output>, content: Option<mpsc::Sender<Vec<u8>>>, told: Told) -> Vec<u8> {
    let mut kept = Vec::new();
    while let Some(part) = written.recv().await {
        match (part, &content) {
            // Who takes no more of it has said why.
            (Output::Stdout(bytes), Some(content)) => drop(content.send(bytes).await),
            (Output::Stdout(bytes), None) if kept.len() < LINE => kept.extend(bytes),
            (Output::Stdout(_), None) => {}
            (Output::Stderr(bytes), _) => told.hear(&bytes),
            (Output::Remark(text), _) => eprintln!("civic: {text}"),
        }
    }
    kept
}

/// Content from the guest. For a thread of its own.
struct FromGuest {
    wanted: mpsc::Receiver<Vec<u8>>,
    part: Vec<u8>,
    done: usize,
    told: Told,
}

impl Read for FromGuest {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.done == self.part.len() {
            let Some(part) = self.wanted.blocking_recv() else { return Ok(0) };
            self.told.bar.inc(part.len() as u64);
            (self.part, self.done) = (part, 0);
        }
        let count = (&self.part[self.done..]).read(into)?;
        self.done += count;
        Ok(count)
    }
}

/// What is read, and goes to standard output as it is.
struct Tee(FromGuest);

impl Read for Tee {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(into)?;
        let mut stdout = io::stdout();
        stdout.write_all(&into[..count])?;
        if count == 0 {
            stdout.flush()?;
        }
        Ok(count)
    }
}

/// Content for the guest. For a thread of its own.
struct ToGuest {
    input: mpsc::Sender<Vec<u8>>,
    told: Told,
}

impl Write for ToGuest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(CHUNK)];
        self.input.blocking_send(part.to_vec()).map_err(|_| io::Error::from(ErrorKind::ConnectionAborted))?;
        self.told.bar.inc(part.len() as u64);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is said on standard error: how much was copied until now, if that is a terminal, and complaints.
#[derive(Clone)]
struct Told {
    bar: ProgressBar,
    /// The guest's last line. If the copying fails, it says why.
    last: Arc<Mutex<Vec<u8>>>,
}

impl Told {
    fn new(name: &str) -> Self {
        let bar = if io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template(SPINNER).unwrap_or_else(|_| ProgressStyle::default_spinner());
        let bar = bar.with_message(format!("copying, {name}")).with_style(style);
        bar.enable_steady_tick(INTERVAL);
        Self { bar, last: Arc::default() }
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("civic: {text}"));
    }

    /// Says the guest's lines, as they come; the last one only when another follows.
    fn hear(&self, bytes: &[u8]) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if last.ends_with(b"\n") {
                self.say(&shown(last.trim_ascii_end()));
                last.clear();
            }
            if last.len() < LINE || *byte == b'\n' {
                last.push(*byte);
            }
        }
    }

    /// The last line.
    fn end(&self) -> Option<String> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        (!last.is_empty()).then(|| shown(last.trim_ascii_end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_says_last_is_kept() {
        let told = Told::new("web");
        assert_eq!(told.end(), None);
        told.hear(b"a: left out\nb: no sp");
        told.hear(b"ace\x1b[0m\n");
        assert_eq!(told.end().as_deref(), Some("b: no space\u{fffd}[0m"));
        told.hear(&[b'x'; 2 * LINE]);
        assert_eq!(told.end().map(|line| line.len()), Some(LINE));
    }

    #[test]
    fn what_the_guest_has_got() {
        assert_eq!(copied(b"3 70000\n"), Some(Copied { files: 3, bytes: 70_000 }));
        for wrong in [&b""[..], b"3 4", b"3\n", b"-1 4\n", b"1 2 3\n"] {
            assert_eq!(copied(wrong), None);
        }
    }

    #[test]
    fn the_template_is_one() {
        ProgressStyle::with_template(SPINNER).unwrap();
    }
}
