//! Civic's forks.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Fork, LOOK, PATIENCE, look, ms};
use crate::bench::clock::Clock;
use crate::bench::guest::Guest;
use crate::bench::machine::Tools;
use crate::bench::stillness::Tracer;

/// Civic's source.
pub struct Civic<'a> {
    tools: &'a Tools,
    source: Guest<'a>,
}

/// A process that is ended and waited for, whatever happens.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Waits until it ends by itself.
    fn end(mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "process {} does not end", self.0.id());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl<'a> Civic<'a> {
    /// Has a guest that is up stand still.
    pub fn new(tools: &'a Tools, source: Guest<'a>) -> Result<Self> {
        let mut this = Self { tools, source };
        this.halt()?;
        Ok(this)
    }

    fn halt(&mut self) -> Result<()> {
        self.ask("POST", "/v1/pause", &Value::Null).map(drop)
    }

    /// Asks the source's API.
    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        self.source.ask(method, path, body)
    }

    /// Starts a monitor that waits.
    fn waiting(&self, name: &str) -> Result<Process> {
        let dir = self.tools.run_dir().join(name);
        std::fs::create_dir_all(&dir)?;
        let log = std::fs::File::create(dir.join("vmm.log"))?;
        let mut command = self.tools.civic_vmm(name);
        let mut process =
            Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log.try_clone()?).spawn()?);
        let source = self.tools.run_dir().join(self.source.name());
        let config = json!({ "name": name, "fork_of": source, "overlay_dir": self.tools.work });
        let stdin = process.0.stdin.take().context("a pipe")?;
        serde_json::to_writer(&stdin, &config)?;
        drop(stdin);
        let mut ready = String::new();
        BufReader::new(process.0.stdout.take().context("a pipe")?).read_line(&mut ready)?;
        ensure!(ready.contains("ready"), "no monitor waits: {ready}");
        Ok(process)
    }

    fn page_server(&self) -> Result<Process> {
        let process = Process(self.tools.civic_pager(self.source.name()).stdin(Stdio::null()).spawn()?);
        let deadline = Instant::now() + PATIENCE;
        while self.ask("GET", "/v1/info", &Value::Null)?["family"]["page_server"] != json!(true) {
            ensure!(Instant::now() < deadline, "the page server does not turn up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }

    /// Forks it, and has it stand still again.
    pub fn fork(&mut self, round: usize, clock: &Clock, tracer: Option<&Tracer>) -> Result<Fork> {
        self.ask("POST", "/v1/resume", &Value::Null)?;
        let before = self.source.run(LOOK, PATIENCE)?;
        let name = format!("bench-child-{round}");
        let waiting = self.waiting(&name)?;
        let page_server = self.page_server()?;
        tracer.map_or(Ok(()), Tracer::begin)?;
        let (mark, call) = (clock.mark(), Instant::now());
        let report = self.ask("POST", "/v1/fork", &json!({ "children": [name], "paused": false }))?;
        let running = call.elapsed();
        let stretch = clock.stretch(&mark)?;
        tracer.map_or(Ok(()), Tracer::end)?;
        let pause = report["stages"]["pause_us"].as_f64().context("no pause in the answer")? / 1e3;
        ensure!(report["children"][0]["name"] == json!(name), "no child lives: {report}");
        let still = tracer.map(|tracer| tracer.longest(self.source.pid()?)).transpose()?;
        let mut child = Guest::attach(self.tools, name)?;
        let answers = look(&mut child, &before, call)?;
        drop(child);
        waiting.end()?;
        page_server.end()?;
        self.halt()?;
        Ok(Fork { pause: Some(pause), still, running: Some(ms(running) / stretch), answers: Some(ms(answers)) })
    }
}
