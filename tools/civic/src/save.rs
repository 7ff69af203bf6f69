//! `civic save`.

use std::convert::Infallible;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use civic_api::client::Client;
use civic_api::{AfterSave, ByteSize, SaveReport, SaveRequest};
use indicatif::{ProgressBar, ProgressStyle};

use crate::console::Signals;
use crate::process::Process;
use crate::rundir::RunDir;
use crate::show::{duration, print_json};
use crate::{advice, explain};

/// How often the bar is moved.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long a monitor may take to go once its VM is saved.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Until the monitor tells how much there is to write, and from then on.
const SPINNER: &str = "{spinner} {msg} ({elapsed})";
const BAR: &str = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} ({elapsed})";

/// Saves the VM to `directory`; where it is not to go on, returns when its monitor has ended, so that its name is free.
pub async fn save(dir: &RunDir, name: &str, directory: &Path, then: AfterSave, json: bool) -> anyhow::Result<()> {
    let directory = std::path::absolute(directory)
        .map_err(|error| advice::error(format!("'{}': {error}", directory.display()), "give a directory to save to"))?;
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let client = dir.client(name);
    let info = client.info().await.map_err(|error| explain(dir, name, error))?;
    // The id is the monitor's: it answers again below, after this was opened.
    let process = Process::open(info.pid).with_context(|| format!("cannot watch the monitor, process {}", info.pid))?;
    let bar = bar(name);
    let request = SaveRequest { directory, then };
    let report = tokio::select! {
        report = client.save(&request) => report,
        never = follow(&client, &bar) => match never {},
        _ = signals.next() => {
            let hint = format!("'civic info {name}' shows how far it is; 'civic kill {name}' ends the VM unsaved");
            return Err(advice::error(format!("no longer waiting: {name} is being saved all the same"), hint));
        }
    };
    bar.finish_and_clear();
    let report = report.map_err(|error| explain(dir, name, error))?;
    if then == AfterSave::Stop && !process.wait(END_TIMEOUT).await.context("cannot wait for the monitor")? {
        let message = format!("{name} is saved, but its monitor has not ended within {} s", END_TIMEOUT.as_secs());
        return Err(advice::error(message, format!("see {}", dir.log(name).display())));
    }
    if json {
        return print_json(&report);
    }
    if std::io::stderr().is_terminal() {
        eprintln!("{}", told(name, &report));
    }
    Ok(())
}

fn told(name: &str, report: &SaveReport) -> String {
    let written = ByteSize(report.memory_bytes_written.saturating_add(report.state_bytes));
    let (total, paused) = (duration(report.total_ms), duration(report.pause_ms));
    format!("{name} is saved: {written} in {total}, of which it stood still for {paused}")
}

/// Moves the bar as the monitor tells; until it is dropped.
async fn follow(client: &Client, bar: &ProgressBar) -> Infallible {
    if bar.is_hidden() {
        return std::future::pending().await;
    }
    loop {
        // One that does not answer may still save: what it says in the end counts.
        if let Ok(info) = client.info().await
            && let Some(progress) = info.saving
        {
            if bar.length() == Some(0) && progress.bytes_total > 0 {
                bar.set_style(style(BAR));
            }
            bar.set_length(progress.bytes_total);
            bar.set_position(progress.bytes_done);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// A sign of life on a terminal, which becomes a bar once there is a length; nothing elsewhere.
fn bar(name: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_message(format!("saving {name}")).with_style(style(SPINNER));
    bar.enable_steady_tick(INTERVAL);
    bar
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.map_or_else(|_| ProgressStyle::default_bar(), |style| style.progress_chars("=> "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_templates() {
        for template in [SPINNER, BAR] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn a_report() {
        let report = SaveReport {
            directory: "/s".into(),
            memory_bytes_written: 3 << 30,
            state_bytes: 0,
            pause_ms: 4_200,
            total_ms: 12_000,
        };
        assert_eq!(told("web", &report), "web is saved: 3G in 12s, of which it stood still for 4.2s");
    }
}
