//! `civic exec`: a program in a fork, started from outside, with this process's input, outputs and signals.
//!
//! Exit status: the program's own, 128 and its signal if one ended it, 126 if it cannot be executed, 127 if it is not there, 124 if it
//! took longer than it may, 125 for everything that is not the program's fault.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use civic_api::StartedProgram;
use civic_loader::{Stage, ToGuest};
use nix::libc::{self, c_int};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::Ended;
use crate::cli::ExecArgs;
use crate::program::{self, Input, OurOutputs, TIMED_OUT};
use crate::rundir::RunDir;
use crate::talk::frame;
use crate::terminal::Raw;

/// Signals that a program gets in our place, when it has no terminal of its own.
const FORWARDED: [c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Runs a program, and ends as it does.
pub async fn exec(dir: &RunDir, args: ExecArgs) -> Result<()> {
    let (started, stream) = program::start(dir, &args.name, &args.program.request()?).await?;
    let raw = if args.program.tty { Raw::enter().context("cannot use the terminal")? } else { None };
    let (talk, written) = program::attend(stream, Input::Ours, OurOutputs::default())?;
    if args.program.tty {
        program::forward_sizes(talk.to_guest())?;
    } else {
        forward_signals(&talk.to_guest())?;
    }
    let limit = program::time_is_up(args.program.timeout.map(Duration::from_secs));
    let outcome = program::until_its_end(talk, limit).await;
    if outcome.is_ok() {
        let _ = written.await;
    }
    drop(raw);
    let (outcome, timed_out) = outcome?;
    if args.stages {
        tell_stages(&started, &outcome.stages)?;
    }
    match if timed_out { TIMED_OUT } else { outcome.status } {
        0 => Ok(()),
        status => Err(Ended(status).into()),
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
