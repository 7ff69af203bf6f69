//! `civic stop` and `civic kill`: both return when the VM's process is gone.

use std::time::Duration;

use anyhow::Context;
use civic_api::ErrorCode;
use civic_api::client::ClientError;

use crate::process::Process;
use crate::rundir::{Found, RunDir};
use crate::terminal::spinner;
use crate::{advice, explain};

/// How long a monitor may take to go once the plug is pulled.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Presses the power button and waits for at most `seconds`; then, with `force`, kills.
pub async fn stop(dir: &RunDir, name: &str, seconds: u64, force: bool) -> anyhow::Result<()> {
    let client = dir.client(name);
    let info = client.info().await.map_err(|error| explain(dir, name, error))?;
    // The id is the monitor's: it answers again below, after this was opened.
    let process = open(info.pid)?;
    match client.stop().await {
        Ok(()) => {}
        Err(ClientError::Refused(body)) if body.code == ErrorCode::WrongState && force => return kill(dir, name).await,
        Err(error) => return Err(explain(dir, name, error)),
    }
    let progress = spinner(format!("waiting for {name} to switch itself off"));
    let ended = process.wait(Duration::from_secs(seconds)).await;
    progress.finish_and_clear();
    if ended.context("cannot wait for the monitor")? {
        // An orderly end leaves nothing behind.
        if dir.log(name).exists() && !dir.is_locked(name).unwrap_or(false) {
            Err(dir.not_running(name))
        } else {
            Ok(())
        }
    } else if force {
        kill(dir, name).await
    } else {
        let hint =
            format!("wait longer with --timeout, or end it with 'civic stop --force {name}' or 'civic kill {name}'");
        Err(advice::error(format!("{name} has not switched itself off within {seconds} s"), hint))
    }
}

/// Ends the VM now. A monitor that does not answer is killed as a process.
pub async fn kill(dir: &RunDir, name: &str) -> anyhow::Result<()> {
    let process = match dir.find(name).await {
        Found::Alive(info) => {
            let process = open(info.pid)?;
            match dir.client(name).kill().await {
                // It may end before it has answered.
                Ok(()) | Err(ClientError::NotRunning { .. } | ClientError::Broken(_)) => {}
                Err(error) => return Err(explain(dir, name, error)),
            }
            process
        }
        Found::Silent => {
            let Some(pid) = dir.lock_holder(name) else { return Err(dir.not_running(name)) };
            let process = open(pid.unsigned_abs())?;
            // Holding the lock still, after its id was opened, it is the one.
            if dir.lock_holder(name) != Some(pid) {
                return Err(dir.not_running(name));
            }
            process.kill().with_context(|| format!("cannot kill the monitor, process {pid}"))?;
            process
        }
        Found::Dead => return Err(dir.not_running(name)),
    };
    if process.wait(KILL_TIMEOUT).await.context("cannot wait for the monitor")? {
        return Ok(());
    }
    let hint = format!("see {}", dir.log(name).display());
    Err(advice::error(format!("the monitor of {name} has not ended within {} s", KILL_TIMEOUT.as_secs()), hint))
}

fn open(pid: u32) -> anyhow::Result<Process> {
    Process::open(pid).with_context(|| format!("cannot watch the monitor, process {pid}"))
}
