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
use crate::bench::io::complaints;
use crate::bench::machine::Tools;
use crate::bench::memory;
use crate::bench::net::Tap;

/// The plugged card's name.
const CARD: &str = "own";

/// The source of forks.
pub struct Civic<'a> {
    tools: &'a Tools,
    source: Guest<'a>,
    tap: &'a Tap,
    /// What the forks get.
    store: String,
    net: String,
    ip: String,
}

/// One call.
struct Called {
    /// How long the vCPUs stood still, in milliseconds.
    pause: f64,
    forked: Instant,
    spoke: Instant,
}

impl<'a> Civic<'a> {
    /// Of a guest that is up behind its tap; the forks get the other one.
    pub fn new(tools: &'a Tools, source: Guest<'a>, tap: &'a Tap, store: &Path, plugged: &Tap) -> Self {
        let store = format!("{},overlay", store.display());
        let (net, ip) = (format!("tap={},id={CARD}", plugged.name), format!("{CARD}={}/24", plugged.guest));
        Self { tools, source, tap, store, net, ip }
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
        let stages = vec![("fork", ms(call, called.forked)), ("exec", ms(called.forked, called.spoke))];
        let child_mib = all.saturating_sub(alone) as f64 / f64::from(1 << 20);
        Ok(Run { took: ms(call, called.spoke), pause: called.pause / stretch, stages, child_mib })
    }

    /// Until the program's first line. All that Civic is asked to do is here.
    fn call(&self, name: &str, program: &Program) -> Result<Called> {
        let devices = ["--store", &self.store, "--net", &self.net, "--json"];
        let mut fork = self.tools.civic(&["fork", self.source.name(), "--name", name]);
        let report = said(fork.args(devices).arg("--overlay-dir").arg(&self.tools.work))?;
        let forked = Instant::now();
        let mut exec = self.tools.civic(&["exec", name, "--ip", &self.ip]);
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
        Ok(Called { pause: pause / 1e3, forked, spoke })
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
