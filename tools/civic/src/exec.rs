//! `civic exec`: a program in a fork, started from outside, with this process's input, outputs and signals.
//!
//! ```text
//!  stdin ─ thread ─ credit ─► Stdin ─┐                      ┌─ Stdout, Stderr ─► writer thread ─► stdout, stderr
//!  signals, window size ─────────────┴─► program's stream ──┤
//!                                                           └─ Exited ─► exit status
//! ```
//!
//! Exit status: the program's own, 128 and its signal if one ended it, 126 if it cannot be executed, 127 if it is not there, 124 if it
//! took longer than it may, 125 for everything that is not the program's fault.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use civic_api::client::ConsoleStream;
use civic_api::{ProgramRequest, StartedProgram, TerminalSize};
use civic_loader::{Stage, ToGuest, WindowSize};
use nix::libc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::cli::ExecArgs;
use crate::console::read_stdin;
use crate::rundir::RunDir;
use crate::talk::{Outcome, Output, Talk, frame};
use crate::terminal::Raw;
use crate::{Ended, advice, on};

/// How long a program has that is to end before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// What timeout(1) ends with.
const TIMED_OUT: u8 = 124;
/// Signals that a program gets in our place, when it has no terminal of its own.
const FORWARDED: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Runs a program, and ends as it does.
pub async fn exec(dir: &RunDir, args: ExecArgs) -> Result<()> {
    let tty = args.tty.then(window).transpose()?;
    let request = ProgramRequest {
        argv: args.program.clone(),
        copy: None,
        env: environment(&args.env, tty.is_some()),
        cwd: args.workdir.clone(),
        tty: tty.map(|size| TerminalSize { rows: size.rows, columns: size.columns }),
        freeze: args.freeze.map_or_else(Default::default, Into::into),
        root: args.root.map(Into::into),
        network: args.ip.clone(),
        realtime: args.realtime,
        nice: args.nice,
        uid: args.user.map_or(0, |(uid, _)| uid),
        gid: args.user.map_or(0, |(_, gid)| gid),
        files: args.files.absolute()?,
        wait_ms: args.wait.saturating_mul(1000),
    };
    let name = &args.name;
    let program = on(dir, name, async |vm| vm.start_program(&request).await).await?;
    let stream = on(dir, name, async |vm| vm.program(program.id).await).await?;
    let raw = if args.tty { Raw::enter().context("cannot use the terminal")? } else { None };
    let (talk, written) = start(stream, args.tty)?;
    let outcome = until_its_end(talk, written, args.timeout.map(Duration::from_secs)).await;
    drop(raw);
    let outcome = outcome?;
    if args.stages {
        tell_stages(&program, &outcome.stages)?;
    }
    match outcome.status {
        0 => Ok(()),
        status => Err(Ended(status).into()),
    }
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

/// Begins to talk with a program; also gives what is told when all of its output is written.
fn start(stream: ConsoleStream, tty: bool) -> Result<(Talk, oneshot::Receiver<()>)> {
    let (output, wanted) = mpsc::channel(16);
    let (done, written) = oneshot::channel();
    std::thread::Builder::new().name("output".into()).spawn(move || {
        write_output(wanted);
        let _ = done.send(());
    })?;
    let (typed, input) = mpsc::channel(1);
    std::thread::Builder::new().name("stdin".into()).spawn(move || read_stdin(typed))?;
    let talk = Talk::start(stream, input, output);
    if tty {
        forward_sizes(talk.to_guest())?;
    } else {
        forward_signals(&talk.to_guest())?;
    }
    Ok((talk, written))
}

/// Serves a program until it has ended; one that takes longer than `limit` is made to.
async fn until_its_end(talk: Talk, written: oneshot::Receiver<()>, limit: Option<Duration>) -> Result<Outcome> {
    let to_guest = talk.to_guest();
    let heard = talk.hear();
    tokio::pin!(heard);
    let ends = async |after: Option<Duration>| match after {
        Some(after) => tokio::time::sleep(after).await,
        None => std::future::pending().await,
    };
    let outcome = tokio::select! {
        outcome = &mut heard => outcome?,
        () = ends(limit) => {
            for signal in [libc::SIGTERM, libc::SIGKILL] {
                let _ = to_guest.send(frame(&ToGuest::Signal(signal as u8))).await;
                if let Ok(outcome) = tokio::time::timeout(GRACE, &mut heard).await {
                    return Ok(Outcome { status: TIMED_OUT, ..outcome? });
                }
            }
            bail!("the program does not end, though it was killed");
        }
    };
    let _ = written.await;
    Ok(outcome)
}

fn write_output(mut wanted: mpsc::Receiver<Output>) {
    let mut broken = false;
    while let Some(part) = wanted.blocking_recv() {
        let written = match &part {
            Output::Stdout(bytes) if !broken => {
                let mut stdout = io::stdout();
                stdout.write_all(bytes).and_then(|()| stdout.flush())
            }
            Output::Stdout(_) => Ok(()),
            Output::Stderr(bytes) => io::stderr().write_all(bytes),
        };
        broken |= written.is_err();
    }
}

fn forward_signals(to_guest: &mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    for number in FORWARDED {
        let mut caught = signal(SignalKind::from_raw(number))?;
        let to_guest = to_guest.clone();
        tokio::spawn(async move {
            while caught.recv().await.is_some() {
                let _ = to_guest.send(frame(&ToGuest::Signal(number as u8))).await;
            }
        });
    }
    Ok(())
}

fn forward_sizes(to_guest: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
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

/// What took how long, as a line of JSON on stderr. The loader's own stages are in ticks of the guest's counter.
fn tell_stages(program: &StartedProgram, stages: &[(Stage, u64)]) -> Result<()> {
    let first = stages.first().map_or(0, |(_, tsc)| *tsc);
    let loader: serde_json::Map<_, _> = stages
        .iter()
        .map(|(stage, tsc)| (format!("{stage:?}").to_lowercase(), tsc.wrapping_sub(first).into()))
        .collect();
    let told = serde_json::json!({ "inject": program.stages, "loader_ticks": loader });
    writeln!(io::stderr(), "{told}")?;
    Ok(())
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
