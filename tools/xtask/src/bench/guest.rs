//! A guest that is being measured: its monitor's process and its serial console.
//!
//! What the guest does is in `resources/bench/init`. When it is to do more than boot, it takes one command a line:
//!
//! ```text
//!  host:   NUMBER COMMAND…                     a line for the guest's shell
//!  guest:  CIVIC-BENCH-BEGIN NUMBER
//!          what the command prints
//!          CIVIC-BENCH-END NUMBER STATUS
//! ```

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::machine::{Monitor, Spec, Tools};

/// How long a guest may take to boot: the testbed is slow, and may share its processor.
pub const BOOT: Duration = Duration::from_secs(300);
/// Printed by the guest's first program before anything else.
pub const USER_SPACE: &str = "CIVIC-BENCH-USERSPACE";
/// Printed when the guest takes commands.
const READY: &str = "CIVIC-BENCH-READY";

/// What `resources/bench/init` does, for a shell. The quotes keep its echo from looking as if it were done.
const SHELL: &str = "stty -echo cols 4000; dmesg -n 1; echo CIVIC-BENCH-'READY'; while read -r number line; do \
    echo \"CIVIC-BENCH-BEGIN $number\"; eval \"$line\"; echo \"CIVIC-BENCH-END $number $?\"; done\n";

/// A running guest; its monitor ends when this is dropped.
pub struct Guest<'a> {
    tools: &'a Tools,
    name: String,
    monitor: Monitor,
    /// The process that was started, if it was by us.
    child: Option<Child>,
    input: Box<dyn Write>,
    output: Receiver<(Instant, Vec<u8>)>,
    /// When the process was started, or its guest was attached to.
    pub started: Instant,
    text: String,
    seen: usize,
    step: u32,
}

impl<'a> Guest<'a> {
    /// Starts the monitor.
    pub fn start(tools: &'a Tools, spec: &Spec) -> Result<Self> {
        let name = format!("bench-{}", spec.monitor.name().replace([' ', ',', '='], "-"));
        Self::start_as(tools, spec, name)
    }

    /// [`Guest::start`], by another name.
    pub fn start_as(tools: &'a Tools, spec: &Spec, name: String) -> Result<Self> {
        let command = tools.command(spec, &name);
        Self::spawn(tools, spec.monitor, name, command)
    }

    /// A guest of Civic's that somebody else has started, from now on this value's to end. Its console is had without a process in between, as
    /// that of a QEMU is.
    pub fn attach(tools: &'a Tools, name: String) -> Result<Self> {
        let started = Instant::now();
        let (console, first) = upgraded(&api(tools, &name), "/v1/console", "civic-console", BOOT)?;
        console.set_read_timeout(None)?;
        let output = timed(std::io::Cursor::new(first).chain(console.try_clone()?));
        Ok(Self::new(tools, Monitor::Civic, name, None, Box::new(console), output, started))
    }

    /// With a command whose standard input and output are the guest's console.
    fn spawn(tools: &'a Tools, monitor: Monitor, name: String, mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(errors(tools, &name))?);
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            unreachable!("both are pipes")
        };
        Ok(Self::new(tools, monitor, name, Some(child), Box::new(stdin), timed(stdout), started))
    }

    fn new(
        tools: &'a Tools,
        monitor: Monitor,
        name: String,
        child: Option<Child>,
        input: Box<dyn Write>,
        output: Receiver<(Instant, Vec<u8>)>,
        started: Instant,
    ) -> Self {
        Self { tools, name, monitor, child, input, output, started, text: String::new(), seen: 0, step: 0 }
    }

    /// Waits until `needle` comes after what was waited for before; returns what came before it, and when it came.
    pub fn wait(&mut self, needle: &str, limit: Duration) -> Result<(String, Instant)> {
        let deadline = Instant::now() + limit;
        let mut came = Instant::now();
        loop {
            if let Some(at) = self.text[self.seen..].find(needle) {
                let before = self.text[self.seen..self.seen + at].to_owned();
                self.seen += at + needle.len();
                return Ok((before, came));
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((when, bytes)) => {
                    came = when;
                    self.text.push_str(&String::from_utf8_lossy(&bytes));
                }
                Err(RecvTimeoutError::Timeout) => bail!("{}", self.what_is_wrong(&format!("no '{needle}' in time"))),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{}", self.what_is_wrong(&format!("it ended without '{needle}'")))
                }
            }
        }
    }

    fn what_is_wrong(&self, what: &str) -> String {
        let errors = fs::read_to_string(errors(self.tools, &self.name)).unwrap_or_default();
        let log = fs::read_to_string(self.tools.work.join("run").join(&self.name).join("vmm.log")).unwrap_or_default();
        let lines: Vec<_> = self.text.lines().collect();
        let tail = lines[lines.len().saturating_sub(30)..].join("\n");
        format!("{}: {what}\n{errors}{log}its console ends with:\n{tail}", self.monitor.name())
    }

    /// Waits until the guest takes commands.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.wait(READY, BOOT).map(drop)
    }

    /// Has the shell of somebody who is logged in on the console take commands as well, after its prompt.
    pub fn take_shell(&mut self, prompt: &str, limit: Duration) -> Result<()> {
        self.wait(prompt, limit)?;
        self.input.write_all(SHELL.as_bytes()).context("the monitor takes no input")?;
        self.wait_ready()
    }

    /// Runs a line of shell in the guest; returns what it prints. Fails unless its status is 0.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.begin(command, limit)?;
        Ok(self.end(command, limit)?.0)
    }

    /// Starts a line of shell in the guest.
    pub fn begin(&mut self, command: &str, limit: Duration) -> Result<()> {
        self.step += 1;
        let n = self.step;
        self.input.write_all(format!("{n} {command}\n").as_bytes()).context("the monitor takes no input")?;
        self.wait(&format!("CIVIC-BENCH-BEGIN {n}\r\n"), limit).map(drop)
    }

    /// Waits for the end of the one that was begun last: what it printed, and when it ended. Fails unless its status is 0.
    pub fn end(&mut self, command: &str, limit: Duration) -> Result<(String, Instant)> {
        let n = self.step;
        let (said, when) =
            self.wait(&format!("CIVIC-BENCH-END {n} "), limit).with_context(|| format!("in: {command}"))?;
        let (status, _) = self.wait("\r\n", limit)?;
        ensure!(status == "0", "'{command}' ended with status {status}:\n{said}");
        Ok((said.replace("\r\n", "\n"), when))
    }

    /// Asks the API of the monitor, which is Civic's.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let mut stream =
            UnixStream::connect(api(self.tools, &self.name)).context("cannot connect to the API's socket")?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = "Host: civic\r\nContent-Type: application/json\r\nConnection: close";
        write!(stream, "{method} {path} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        ensure!(head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')), "{method} {path}: {answer}");
        if body.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(body)?) }
    }

    /// All that comes by a connection that the API switches to another protocol, until it ends.
    pub fn listen(&self, path: &str, protocol: &str, limit: Duration) -> Result<Vec<u8>> {
        let (mut stream, mut said) = self.upgraded(path, protocol, limit)?;
        stream.read_to_end(&mut said).with_context(|| format!("{path} does not end"))?;
        Ok(said)
    }

    /// A connection that the API switches to another protocol, and the first that came by it; it waits so long for more.
    pub fn upgraded(&self, path: &str, protocol: &str, limit: Duration) -> Result<(UnixStream, Vec<u8>)> {
        upgraded(&api(self.tools, &self.name), path, protocol, limit)
    }

    /// The process that is the monitor.
    pub fn pid(&self) -> Result<u32> {
        if self.monitor != Monitor::Civic {
            return Ok(self.child.as_ref().context("it was not started here")?.id());
        }
        let info: serde_json::Value = serde_json::from_str(&said(self.tools.civic(&["info", &self.name, "--json"]))?)?;
        info["pid"].as_u64().and_then(|pid| pid.try_into().ok()).context("civic tells no pid")
    }

    /// What its monitor calls it, if that is Civic.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which monitor it is.
    pub fn monitor(&self) -> Monitor {
        self.monitor
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // Civic's monitor is not the process we started; with it that one ends.
        let ended = self.monitor == Monitor::Civic && {
            let mut kill = self.tools.civic(&["kill", &self.name]);
            kill.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
        };
        if let Some(child) = &mut self.child {
            if !ended {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
}

fn api(tools: &Tools, name: &str) -> PathBuf {
    tools.run_dir().join(name).join("api.sock")
}

fn errors(tools: &Tools, name: &str) -> PathBuf {
    tools.work.join(format!("{name}.errors"))
}

/// What comes, with the moment at which it came.
fn timed(mut from: impl Read + Send + 'static) -> Receiver<(Instant, Vec<u8>)> {
    let (to, output) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if to.send((Instant::now(), buffer[..n].to_vec())).is_err() {
                return;
            }
        }
    });
    output
}

/// A connection that an API has switched to another protocol, and the first that came by it.
fn upgraded(socket: &Path, path: &str, protocol: &str, limit: Duration) -> Result<(UnixStream, Vec<u8>)> {
    const HEAD_END: &[u8] = b"\r\n\r\n";
    let mut stream = UnixStream::connect(socket).context("cannot connect to the API's socket")?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: civic\r\nConnection: upgrade\r\nUpgrade: {protocol}\r\n\r\n")?;
    let mut said = Vec::new();
    let end = loop {
        if let Some(at) = said.windows(HEAD_END.len()).position(|w| w == HEAD_END) {
            break at + HEAD_END.len();
        }
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).with_context(|| format!("no answer to GET {path}"))?;
        ensure!(n > 0, "GET {path}: the connection ended: {}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&buffer[..n]);
    };
    ensure!(said.starts_with(b"HTTP/1.1 101 "), "GET {path}: {}", String::from_utf8_lossy(&said));
    Ok((stream, said.split_off(end)))
}

/// Runs a program to its end and returns what it prints; fails unless it succeeds.
pub fn said(mut command: impl std::borrow::BorrowMut<Command>) -> Result<String> {
    let command = command.borrow_mut();
    let out = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    let errors = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.success(), "{}: {}\n{errors}", super::machine::line(command), out.status);
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
