//! Civic's way: its own commands, as an operator types them.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::load::Load;
use super::{LOOKERS, Program, Run};
use crate::bench::clock::Clock;
use crate::bench::guest::{Guest, said};
use crate::bench::inject::ticks;
use crate::bench::io::complaints;
use crate::bench::machine::Tools;
use crate::bench::memory;
use crate::bench::net::Tap;

/// The plugged card's name.
const CARD: &str = "own";

/// The stages of `civic exec --stages`: of the monitor in microseconds, then of the loader in ticks since it started.
const MONITORS: [(&str, &str); 7] = [
    ("find_us", "exec.find"),
    ("place_us", "exec.place"),
    ("hook_us", "exec.hook"),
    ("queue_us", "exec.queue"),
    ("exec_us", "exec.exec"),
    ("remove_us", "exec.remove"),
    ("hello_us", "exec.hello"),
];
const LOADERS: [(&str, &str); 5] = [
    ("configured", "exec.configured"),
    ("frozen", "exec.frozen"),
    ("mounted", "exec.mounted"),
    ("networkup", "exec.network"),
    ("execed", "exec.execed"),
];

/// The source of forks.
pub struct Civic<'a> {
    tools: &'a Tools,
    source: Guest<'a>,
    tap: &'a Tap,
    /// What the forks get.
    store: String,
    net: String,
    ip: String,
    /// Of the guest's time stamp counter, in a millisecond.
    ticks: f64,
}

/// One call.
struct Called {
    /// How long the vCPUs stood still, in milliseconds.
    pause: f64,
    forked: Instant,
    spoke: Instant,
    /// Of what it took from the one to the other, in milliseconds.
    stages: Vec<(&'static str, f64)>,
}

impl<'a> Civic<'a> {
    /// Of a guest that is up behind its tap; the forks get the other one.
    pub fn new(tools: &'a Tools, mut source: Guest<'a>, tap: &'a Tap, store: &Path, plugged: &Tap) -> Result<Self> {
        let store = format!("{},overlay", store.display());
        let (net, ip) = (format!("tap={},id={CARD}", plugged.name), format!("{CARD}={}/24", plugged.guest));
        let ticks = ticks(&mut source)?;
        Ok(Self { tools, source, tap, store, net, ip, ticks })
    }

    /// Has the source stand still.
    pub fn halt(&mut self) -> Result<()> {
        self.source.ask("POST", "/v1/pause", &Value::Null).map(drop)
    }

    /// Has a fork of the source, which runs under load meanwhile, run a program; and looks at it.
    pub fn round(&mut self, round: usize, program: &Program, clock: &Clock) -> Result<Run> {
        self.source.ask("POST", "/v1/resume", &Value::Null)?;
        let load = Load::start(self.tap)?;
        let name = format!("bench-look-{round}");
        let alone = memory::of_all(&[self.source.pid()?])?;
        let (mark, call) = (clock.mark(), Instant::now());
        let called = self.call(&name, program)?;
        let stretch = clock.stretch(&mark)?;
        load.finish()?;
        let mut child = Guest::attach(self.tools, name)?;
        for looker in LOOKERS {
            let said = said(self.tools.civic(&["exec", child.name()]).args(["--", &format!("/bin/{looker}")]))?;
            ensure!(said.lines().count() > 1, "{looker} sees nothing: {said:?}");
        }
        self.halt()?;
        let all = memory::of_all(&[self.source.pid()?, child.pid()?, self.page_server()?])?;
        complaints(&mut child)?;
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3 / stretch;
        let mut stages = vec![("fork", ms(call, called.forked)), ("exec", ms(called.forked, called.spoke))];
        stages.extend(called.stages.iter().map(|(name, took)| (*name, took / stretch)));
        let child_mib = all.saturating_sub(alone) as f64 / f64::from(1 << 20);
        Ok(Run { took: ms(call, called.spoke), pause: called.pause / stretch, stages, child_mib })
    }

    /// Until the program's first line. All that Civic is asked to do is here.
    fn call(&self, name: &str, program: &Program) -> Result<Called> {
        let devices = ["--store", &self.store, "--net", &self.net, "--json"];
        let mut fork = self.tools.civic(&["fork", self.source.name(), "--name", name]);
        let report = said(fork.args(devices).arg("--overlay-dir").arg(&self.tools.work))?;
        let forked = Instant::now();
        let mut exec = self.tools.civic(&["exec", name, "--stages", "--ip", &self.ip]);
        exec.args(["--", "/bin/busybox", "sh", "-c", &program.script()]);
        let mut running = exec.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (mut first, mut rest) = (String::new(), String::new());
        let mut output = BufReader::new(running.stdout.take().context("a pipe")?);
        output.read_line(&mut first)?;
        let spoke = Instant::now();
        output.read_to_string(&mut rest)?;
        let out = running.wait_with_output()?;
        let errors = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success() && first.trim_end() == program.0, "the program: {first}{rest}{errors}");
        let report: Value = serde_json::from_str(&report)?;
        let pause = report["stages"]["pause_us"].as_f64().with_context(|| format!("no pause in {report}"))?;
        Ok(Called { pause: pause / 1e3, forked, spoke, stages: stages(&errors, self.ticks)? })
    }

    /// The process that keeps pages for the source's forks.
    fn page_server(&self) -> Result<u32> {
        let dir = self.tools.run_dir().join(self.source.name());
        memory::process_with("civic-pager", &[&dir.to_string_lossy()]).context("no page server")
    }

    /// Fails if the source's kernel complained.
    pub fn finish(mut self) -> Result<()> {
        self.source.ask("POST", "/v1/resume", &Value::Null)?;
        complaints(&mut self.source)
    }
}

/// In milliseconds: of what is on the error output besides, the last line.
fn stages(errors: &str, ticks: f64) -> Result<Vec<(&'static str, f64)>> {
    let line = errors.lines().last().context("civic exec tells no stages")?;
    let told: Value = serde_json::from_str(line).with_context(|| format!("civic exec tells {line:?}"))?;
    let number = |value: &Value, name: &str| value[name].as_f64().with_context(|| format!("no {name} in {line}"));
    let mut stages = Vec::new();
    for (name, stage) in MONITORS {
        stages.push((stage, number(&told["inject"], name)? / 1e3));
    }
    let mut last = 0.0;
    for (name, stage) in LOADERS {
        let at = number(&told["loader_ticks"], name)?;
        stages.push((stage, (at - last) / ticks));
        last = at;
    }
    Ok(stages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_of_the_monitor_and_of_the_loader() {
        let told = "a warning\n{\"inject\":{\"find_us\":1000,\"place_us\":2,\"hook_us\":3,\"queue_us\":4,\"exec_us\":5,\"remove_us\":6,\
                    \"hello_us\":7,\"total_us\":8},\"loader_ticks\":{\"started\":0,\"configured\":200,\"frozen\":200,\"mounted\":500,\
                    \"networkup\":600,\"execed\":1000}}\n";
        let stages = stages(told, 100.0).unwrap();
        assert_eq!(stages[0], ("exec.find", 1.0));
        assert_eq!(
            stages[7..],
            [
                ("exec.configured", 2.0),
                ("exec.frozen", 0.0),
                ("exec.mounted", 3.0),
                ("exec.network", 1.0),
                ("exec.execed", 4.0)
            ]
        );
        assert!(
            super::stages("", 1.0).is_err() && super::stages("{}", 1.0).is_err() && super::stages("no", 1.0).is_err()
        );
    }
}
