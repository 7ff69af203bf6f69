//! A console on this terminal.
//!
//! ```text
//!  stdin ─ reader thread ─► input task ─► console stream ─► output task ─► writer thread ─ stdout
//!                              │ Ctrl-]                        │ end            │ broken pipe
//!                              └───────────────► events ◄──────┴────────────────┘
//! ```
//!
//! Standard input and output are files that can block for ever (a terminal held with Ctrl-S, a pipe nobody reads): each has
//! a thread of its own, so signals are always obeyed and the terminal always restored.

use std::io::{self, Read, Write};
use std::time::Duration;

use anyhow::Context;
use civic_api::client::ConsoleStream;
use nix::libc::{self, c_int};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::rundir::RunDir;
use crate::terminal::{Raw, remark};

/// `Ctrl-]`, as telnet has it.
const ESCAPE: u8 = 0x1d;
const CHUNK: usize = 8192;
/// How long to wait for standard output to take the last of it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What happens on a console besides bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Ctrl-] was typed.
    Escape,
    /// The guest's end is gone.
    Ended,
    /// Nobody reads our output any more.
    OutputClosed,
}

/// A console attached to standard input and output.
pub struct Session {
    events: mpsc::Receiver<Event>,
    written: oneshot::Receiver<()>,
    terminal: Option<Raw>,
}

impl Session {
    /// Connects `stream` with standard input and output; a terminal becomes raw.
    pub fn start(stream: ConsoleStream) -> io::Result<Self> {
        let terminal = Raw::enter()?;
        let (to_stdout, output) = mpsc::channel(16);
        let (to_guest, input) = mpsc::channel(16);
        let (event, events) = mpsc::channel(16);
        let (done, written) = oneshot::channel();
        let (read, write) = tokio::io::split(stream);
        std::thread::Builder::new().name("stdin".into()).spawn(move || read_stdin(to_guest))?;
        let closed = event.clone();
        std::thread::Builder::new().name("stdout".into()).spawn(move || {
            if !write_stdout(output) {
                let _ = closed.blocking_send(Event::OutputClosed);
            }
            let _ = done.send(());
        })?;
        tokio::spawn(send_input(input, write, terminal.is_some(), event.clone()));
        tokio::spawn(receive_output(read, to_stdout, event));
        Ok(Self { events, written, terminal })
    }

    /// Whether a terminal is attached.
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// The next event; None once all is said.
    pub async fn event(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// After [`Event::Ended`]: lets standard output take what is left, and gives the terminal back.
    pub async fn finish(self) {
        let _ = tokio::time::timeout(LAST_WORDS, self.written).await;
    }
}

/// Passes standard input on until its end, or until nobody wants it. For a thread of its own.
pub fn read_stdin(to_guest: mpsc::Sender<Vec<u8>>) {
    let mut chunk = [0; CHUNK];
    loop {
        match io::stdin().read(&mut chunk) {
            Ok(0) => return,
            Ok(n) if to_guest.blocking_send(chunk[..n].to_vec()).is_ok() => {}
            Ok(_) => return,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// False if standard output does not take it.
fn write_stdout(mut output: mpsc::Receiver<Vec<u8>>) -> bool {
    let mut stdout = io::stdout();
    while let Some(chunk) = output.blocking_recv() {
        if stdout.write_all(&chunk).and_then(|()| stdout.flush()).is_err() {
            return false;
        }
    }
    true
}

/// At the end of the input, only the writing half is shut down: output goes on.
async fn send_input(
    mut input: mpsc::Receiver<Vec<u8>>,
    mut guest: WriteHalf<ConsoleStream>,
    escapes: bool,
    events: mpsc::Sender<Event>,
) {
    while let Some(chunk) = input.recv().await {
        for (index, part) in split_escapes(&chunk, escapes).enumerate() {
            if index > 0 && events.send(Event::Escape).await.is_err() {
                return;
            }
            if guest.write_all(part).await.is_err() {
                return;
            }
        }
        let _ = guest.flush().await;
    }
    let _ = guest.shutdown().await;
}

/// `chunk` without the escapes, in the parts between them.
fn split_escapes(chunk: &[u8], escapes: bool) -> impl Iterator<Item = &[u8]> {
    chunk.split(move |&b| escapes && b == ESCAPE)
}

async fn receive_output(
    mut guest: ReadHalf<ConsoleStream>,
    to_stdout: mpsc::Sender<Vec<u8>>,
    events: mpsc::Sender<Event>,
) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(n @ 1..) = guest.read(&mut chunk).await {
        if to_stdout.send(chunk[..n].to_vec()).await.is_err() {
            return; // The writer has said why.
        }
    }
    drop(to_stdout);
    let _ = events.send(Event::Ended).await;
}

/// The signals that end us, caught so that the terminal can be given back first.
pub struct Signals(Vec<(c_int, Signal)>);

impl Signals {
    /// Catches SIGINT, SIGTERM, SIGHUP and SIGQUIT from now on.
    pub fn catch() -> io::Result<Self> {
        let caught = |number| Ok((number, signal(SignalKind::from_raw(number))?));
        Ok(Self(
            [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT]
                .into_iter()
                .map(caught)
                .collect::<io::Result<_>>()?,
        ))
    }

    /// The next of them.
    pub async fn next(&mut self) -> c_int {
        std::future::poll_fn(|context| {
            let come =
                self.0.iter_mut().find_map(|(number, signal)| signal.poll_recv(context).is_ready().then_some(*number));
            come.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        })
        .await
    }
}

/// `civic console`.
pub async fn attach(dir: &RunDir, name: &str, port: &str) -> anyhow::Result<()> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let stream = crate::on(dir, name, async |vm| vm.console(port).await).await?;
    let mut session = Session::start(stream).context("cannot use the terminal")?;
    let terminal = session.has_terminal();
    if terminal {
        remark(&format!("attached to {name}; Ctrl-] detaches"));
    }
    let event = tokio::select! {
        _ = signals.next() => None,
        event = session.event() => event,
    };
    if event == Some(Event::Ended) {
        session.finish().await;
    } else {
        drop(session);
    }
    if terminal {
        remark(if event == Some(Event::Ended) { "the console has ended" } else { "detached; the VM runs on" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_cut_out_of_a_terminals_input_only() {
        let parts = |chunk, escapes| split_escapes(chunk, escapes).map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(parts(b"ls\x1drm", true), [b"ls".to_vec(), b"rm".to_vec()]);
        assert_eq!(parts(b"\x1d", true), [b"".to_vec(), b"".to_vec()]);
        assert_eq!(parts(b"ls", true), [b"ls".to_vec()]);
        assert_eq!(parts(b"a\x1db", false), [b"a\x1db".to_vec()]);
    }
}
