//! `civic run`.

use std::io::Write;

use anyhow::Context;
use civic_api::CONSOLE_PORT_SERIAL;
use civic_api::client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cli::RunArgs;
use crate::console::{Event, Session, Signals};
use crate::monitor::{Monitor, Until, log_hint};
use crate::rundir::RunDir;
use crate::terminal::remark;
use crate::{advice, explain};

/// Starts a VM; in the foreground, stays until it ends.
pub async fn run(dir: &RunDir, args: RunArgs) -> anyhow::Result<()> {
    let request = args.request()?;
    let name = request.name();
    let mut signals = Signals::catch().context("cannot catch signals")?;
    // Until it is released or waited for, whatever goes wrong ends the monitor.
    let monitor = tokio::select! {
        launched = Monitor::launch(dir, &request, Until::Told, args.jail.as_ref()) => launched?,
        _ = signals.next() => return Err(advice::error("interrupted before the VM was built", "run it again")),
    };
    let client = dir.client(name);
    if args.detach {
        client.start().await.map_err(|error| explain(dir, name, error))?;
        monitor.release();
        writeln!(std::io::stdout(), "{name}")?;
        return Ok(());
    }
    // Attached first, so that not a byte of the guest's is missed.
    let stream = client.console(CONSOLE_PORT_SERIAL).await.map_err(|error| explain(dir, name, error))?;
    client.start().await.map_err(|error| explain(dir, name, error))?;
    let session = Session::start(stream).context("cannot use the terminal")?;
    foreground(dir, name, monitor, session, signals).await
}

async fn foreground(
    dir: &RunDir,
    name: &str,
    mut monitor: Monitor,
    mut session: Session,
    mut signals: Signals,
) -> anyhow::Result<()> {
    let mut ending = Ending { client: dir.client(name), pid: monitor.pid(), asked: 0 };
    if session.has_terminal() {
        remark(&format!("{name} runs; Ctrl-] switches it off"));
    }
    let mut open = true;
    let status = {
        let mut ended = std::pin::pin!(monitor.wait());
        loop {
            tokio::select! {
                status = &mut ended => break status?,
                _ = signals.next() => ending.press(),
                event = session.event(), if open => match event {
                    Some(Event::Escape) => ending.press(),
                    Some(Event::OutputClosed) if ending.asked == 0 => ending.press(),
                    Some(_) => {}
                    None => open = false,
                },
            }
        }
    };
    let terminal = session.has_terminal();
    session.finish().await;
    if terminal {
        remark(&format!("{name} has ended"));
    }
    if status.success() {
        return Ok(());
    }
    Err(advice::error(format!("the VM '{name}' ended badly ({status})"), log_hint(&dir.log(name))))
}

/// The ways to end the VM, gentlest first. Each press tries the next.
struct Ending {
    client: Client,
    pid: Option<i32>,
    asked: u32,
}

impl Ending {
    fn press(&mut self) {
        self.asked += 1;
        let client = self.client.clone();
        match (self.asked, self.pid) {
            (1, _) => {
                tokio::spawn(async move {
                    match client.stop().await {
                        Ok(()) => remark("power button pressed; once more ends the VM at once"),
                        Err(error) => remark(&format!("{error}; once more ends the VM at once").replace('\n', "; ")),
                    }
                });
            }
            (2, _) | (_, None) => {
                tokio::spawn(async move {
                    // A monitor that has ended meanwhile is what was wanted.
                    if client.kill().await.is_err_and(|error| error.refusal().is_some()) {
                        remark("the monitor refuses to end; once more kills it");
                    }
                });
            }
            (_, Some(pid)) => {
                // Ours until it is waited for, so the id is its.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}
