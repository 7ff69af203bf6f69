//! QEMU's control socket: commands, and events with the moment at which QEMU says they happened (QEMU's `docs/interop/qmp-spec.rst`).

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// An event.
#[derive(Clone, Debug)]
pub struct Event {
    name: String,
    /// When it was read here.
    pub read: Instant,
    /// When it happened, by QEMU's own clock, since 1970.
    pub happened: Duration,
    /// What QEMU says of it.
    pub data: Value,
}

/// A connection to one QEMU.
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that nobody has waited for yet.
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects to the QEMU that listens there, or soon will.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) => ensure!(Instant::now() < deadline, "nobody listens at {}: {e}", socket.display()),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let lines = BufReader::new(stream.try_clone()?);
        let mut this = Self { stream, lines, events: VecDeque::new() };
        let greeting = this.message(deadline)?;
        ensure!(greeting.get("QMP").is_some(), "QEMU greets with {greeting}");
        this.execute("qmp_capabilities", json!({}), limit)?;
        Ok(this)
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line).context("QEMU does not say more in time")? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Runs a command; what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.write_all(text.as_bytes())?;
        let deadline = Instant::now() + limit;
        loop {
            let mut message = self.message(deadline).with_context(|| format!("QEMU's {command}"))?;
            match event(&message, Instant::now()) {
                Some(event) => self.events.push_back(event),
                None if message.get("return").is_some() => return Ok(message["return"].take()),
                None => bail!("QEMU's {command}: {message}"),
            }
        }
    }

    /// Runs a command until QEMU does it, for it lets go of a device's image or tap a moment after it has said that the device is gone, and
    /// tells that to nobody.
    pub fn insist(&mut self, command: &str, arguments: &Value, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while let Err(e) = self.execute(command, arguments.clone(), limit) {
            ensure!(Instant::now() < deadline, "{e:#}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits until a job has ended, and forgets it.
    pub fn conclude(&mut self, job: &str, limit: Duration) -> Result<()> {
        while {
            let told = self.event("JOB_STATUS_CHANGE", limit)?.data;
            told["id"] != job || told["status"] != "concluded"
        } {}
        let jobs = self.execute("query-jobs", json!({}), limit)?;
        let ended = jobs.as_array().and_then(|jobs| jobs.iter().find(|known| known["id"] == job));
        let failed = ended.and_then(|ended| ended["error"].as_str());
        ensure!(failed.is_none(), "QEMU's {job}: {}", failed.unwrap_or_default());
        self.execute("job-dismiss", json!({ "id": job }), limit).map(drop)
    }

    /// Waits for the next event of this name that was not waited for before.
    pub fn event(&mut self, name: &str, limit: Duration) -> Result<Event> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|event| event.name == name) {
                return self.events.remove(at).context("it was there");
            }
            let message = self.message(deadline).with_context(|| format!("QEMU's event {name}"))?;
            self.events.extend(event(&message, Instant::now()));
        }
    }
}

fn event(message: &Value, read: Instant) -> Option<Event> {
    let stamp = |field: &str| message["timestamp"][field].as_u64();
    let happened = Duration::from_secs(stamp("seconds")?) + Duration::from_micros(stamp("microseconds")?);
    Some(Event { name: message["event"].as_str()?.to_owned(), read, happened, data: message["data"].clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A QEMU that says these lines after what it is asked.
    fn qemu(name: &str, answers: &'static [&'static str]) -> Result<Qmp> {
        let path = std::env::temp_dir().join(format!("xtask-qmp-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\": {}}\n{\"return\": {}}\n").unwrap();
            for answer in answers {
                stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
            // Until the client goes.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let connected = Qmp::connect(&path, Duration::from_secs(5));
        std::fs::remove_file(&path).unwrap();
        connected
    }

    #[test]
    fn jobs_end_well_or_not() {
        let limit = Duration::from_secs(5);
        let concluded = r#"{"event": "JOB_STATUS_CHANGE", "data": {"id": "save", "status": "concluded"}, "timestamp": {"seconds": 1, "microseconds": 1}}"#;
        let other = r#"{"event": "JOB_STATUS_CHANGE", "data": {"id": "x", "status": "concluded"}, "timestamp": {"seconds": 1, "microseconds": 0}}"#;
        let well: &[_] = &[other, concluded, r#"{"return": [{"id": "save"}]}"#, r#"{"return": {}}"#];
        qemu("job", Vec::leak(well.to_vec())).unwrap().conclude("save", limit).unwrap();
        let ill: &[_] = &[concluded, r#"{"return": [{"id": "save", "error": "no room"}]}"#];
        let told = qemu("failed-job", Vec::leak(ill.to_vec())).unwrap().conclude("save", limit).unwrap_err();
        assert!(told.to_string().contains("no room"), "{told}");
    }

    #[test]
    fn events_are_kept_until_they_are_waited_for() {
        let limit = Duration::from_secs(5);
        let mut qmp = qemu(
            "events",
            &[
                r#"{"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 5}}"#,
                r#"{"return": {"status": "running"}}"#,
                r#"{"event": "RESUME", "timestamp": {"seconds": 7, "microseconds": 9}}"#,
                r#"{"error": {"class": "GenericError", "desc": "no"}}"#,
            ],
        )
        .unwrap();
        assert_eq!(qmp.execute("query-status", json!({}), limit).unwrap()["status"], "running");
        let resumed = qmp.event("RESUME", limit).unwrap();
        let stopped = qmp.event("STOP", limit).unwrap();
        assert_eq!(resumed.happened - stopped.happened, Duration::from_micros(4));
        assert!(qmp.execute("migrate", json!({}), limit).unwrap_err().to_string().contains("GenericError"));
        assert!(qmp.event("STOP", Duration::from_millis(10)).is_err());
    }
}
