//! A program in a fork, started from outside, with an input and a place for its output.
//!
//! ```text
//!  stdin ─ thread ─ credit ─► Stdin ─┐                      ┌─ Stdout, Stderr ─► thread: a sink
//!  signals, window size ─────────────┴─► program's stream ──┤
//!                                                           └─ Exited ─► Outcome
//! ```

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use civic_api::client::ConsoleStream;
use civic_api::{ProgramRequest, StartedProgram, TerminalSize};
use civic_loader::{ToGuest, WindowSize};
use nix::libc::{self, c_int};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::cli::ProgramArgs;
use crate::console::read_stdin;
use crate::rundir::RunDir;
use crate::talk::{Outcome, Output, Talk, frame};
use crate::{advice, on};

/// How long a program has that is to end before it is killed.
pub const GRACE: Duration = Duration::from_secs(5);

/// The status of one that took longer than it may, as timeout(1) has it.
pub const TIMED_OUT: u8 = 124;

/// Where a program's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// This process's standard input.
    Ours,
    /// There is none.
    None,
}

/// Takes what a program writes, on a thread of its own: it may wait as long as it has to.
pub trait Sink: Send + 'static {
    /// A part of it.
    fn take(&mut self, part: Output);

    /// There is no more.
    fn end(&mut self) {}
}

/// This process's outputs.
#[derive(Default)]
pub struct OurOutputs {
    /// Nobody reads our standard output any more.
    pub broken: bool,
}

impl Sink for OurOutputs {
    fn take(&mut self, part: Output) {
        let written = match &part {
            Output::Stdout(bytes) if !self.broken => {
                let mut stdout = io::stdout();
                stdout.write_all(bytes).and_then(|()| stdout.flush())
            }
            Output::Stdout(_) => Ok(()),
            Output::Stderr(bytes) => io::stderr().write_all(bytes),
            Output::Remark(text) => writeln!(io::stderr(), "civic: {text}"),
        };
        self.broken |= written.is_err();
    }
}

impl ProgramArgs {
    /// What to ask of the fork's monitor.
    pub fn request(&self) -> Result<ProgramRequest> {
        let tty = self.tty.then(window).transpose()?;
        Ok(ProgramRequest {
            argv: self.argv.clone(),
            env: environment(&self.env, tty.is_some()),
            cwd: self.workdir.clone(),
            tty: tty.map(|size| TerminalSize { rows: size.rows, columns: size.columns }),
            freeze: self.freeze.map_or_else(Default::default, Into::into),
            root: self.root.map(Into::into),
            network: self.ip.clone(),
            realtime: self.realtime,
            nice: self.nice,
            uid: self.user.map_or(0, |(uid, _)| uid),
            gid: self.user.map_or(0, |(_, gid)| gid),
            files: self.files.absolute()?,
            wait_ms: self.wait.saturating_mul(1000),
            ..ProgramRequest::default()
        })
    }
}

/// Has a program started in the fork `name`, and connects to it.
pub async fn start(dir: &RunDir, name: &str, request: &ProgramRequest) -> Result<(StartedProgram, ConsoleStream)> {
    let program = on(dir, name, async |vm| vm.start_program(request).await).await?;
    let stream = on(dir, name, async |vm| vm.program(program.id).await).await?;
    Ok((program, stream))
}

/// Begins to talk with a program; also gives what gives the sink back when all of the output has gone there.
pub fn attend<S: Sink>(stream: ConsoleStream, input: Input, mut sink: S) -> Result<(Talk, oneshot::Receiver<S>)> {
    let (output, mut wanted) = mpsc::channel(16);
    let (done, written) = oneshot::channel();
    std::thread::Builder::new().name("output".into()).spawn(move || {
        while let Some(part) = wanted.blocking_recv() {
            sink.take(part);
        }
        sink.end();
        let _ = done.send(sink);
    })?;
    let (typed, typing) = mpsc::channel(1);
    if input == Input::Ours {
        std::thread::Builder::new().name("stdin".into()).spawn(move || read_stdin(typed))?;
    }
    Ok((Talk::start(stream, typing, output), written))
}

/// Serves a program until it has ended. It is made to when `cut` is there, which says by which signal; a program that does not heed that is
/// killed. Also tells whether it was made to.
pub async fn until_its_end(talk: Talk, cut: impl Future<Output = c_int>) -> Result<(Outcome, bool)> {
    let to_guest = talk.to_guest();
    let heard = talk.hear();
    tokio::pin!(heard);
    let signal = tokio::select! {
        outcome = &mut heard => return Ok((outcome?, false)),
        signal = cut => signal,
    };
    for signal in [signal, libc::SIGKILL] {
        let ended = async {
            let _ = to_guest.send(frame(&ToGuest::Signal(signal as u8))).await;
            (&mut heard).await
        };
        if let Ok(outcome) = tokio::time::timeout(GRACE, ended).await {
            return Ok((outcome?, true));
        }
    }
    bail!("the program does not end, though it was killed");
}

/// SIGTERM when a program has taken longer than it may; never without a limit.
pub async fn time_is_up(limit: Option<Duration>) -> c_int {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
    libc::SIGTERM
}

/// Tells a program's terminal when the size of ours has changed.
pub fn forward_sizes(to_guest: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    let mut changed = signal(SignalKind::window_change())?;
    tokio::spawn(async move {
        while changed.recv().await.is_some() {
            if let Ok(size) = window() {
                let _ = to_guest.send(frame(&ToGuest::WindowSize(size))).await;
            }
        }
    });
    Ok(())
}

/// PATH, HOME and what the caller says; TERM for a terminal.
fn environment(given: &[String], tty: bool) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    let mut set = |variable: String| {
        let name = variable.split('=').next().unwrap_or_default().to_owned();
        env.retain(|other| other.split('=').next() != Some(&name));
        env.push(variable);
    };
    set("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    set("HOME=/root".into());
    if tty {
        set(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "linux".into())));
    }
    given.iter().cloned().for_each(set);
    env
}

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);

/// This terminal's size.
fn window() -> Result<WindowSize> {
    if !io::stdin().is_terminal() {
        let error = anyhow::anyhow!("--tty needs a terminal, and standard input is none");
        return Err(error.context(advice::error("there is no terminal", "leave --tty away")));
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the pointer is to a winsize of ours, which the call fills.
    #[allow(unsafe_code)]
    unsafe { window_size(libc::STDIN_FILENO, &raw mut size) }.context("the terminal does not tell its size")?;
    Ok(WindowSize { rows: size.ws_row, columns: size.ws_col, width: size.ws_xpixel, height: size.ws_ypixel })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_overrides_what_is_usual() {
        let env = environment(&["HOME=/tmp".into(), "A=b=c".into(), "A=d".into()], false);
        let usual = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        assert_eq!(env, [usual, "HOME=/tmp", "A=d"]);
    }
}
