//! The agent inside L1: starts commands, carries their streams, and leaves nothing of them behind.
//!
//! One thread reads frames; each run has one for its input, two for its output and one that waits for its end. A run's
//! processes are in a cgroup, by which all of them are killed when the command itself has ended: a command's disks and
//! mounts go away with it, so nothing may go on using them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, killpg};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;

use crate::frame::{CHUNK, Frame, Kind, Start, VERSION, Window};
use crate::job::{NINE_P, WORKSPACE};

/// How long killed processes may take to go.
const DEATH: Duration = Duration::from_secs(30);

struct Run {
    /// The process group, until it was waited for.
    group: Mutex<Option<Pid>>,
    cgroup: PathBuf,
    stdin: Mutex<Sender<Vec<u8>>>,
    out: Window,
    err: Window,
}

struct Agent {
    port: Mutex<File>,
    runs: Mutex<HashMap<u32, Arc<Run>>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until the host goes away.
pub fn serve() -> Result<()> {
    fs::create_dir_all(WORKSPACE)?;
    let options = format!("{NINE_P},cache=none,access=any");
    mount(Some("workspace"), WORKSPACE, Some("9p"), MsFlags::empty(), Some(options.as_str()))
        .context("cannot mount the workspace")?;
    let mut port = File::options().read(true).write(true).open(find_port()?)?;
    let agent = Arc::new(Agent { port: Mutex::new(port.try_clone()?), runs: Mutex::default() });
    agent.send(&Frame::new(0, Kind::Hello, VERSION.to_le_bytes()));
    loop {
        let frame = Frame::read(&mut port).context("the host is gone")?;
        agent.handle(frame);
    }
}

fn find_port() -> Result<PathBuf> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == "civic.agent") {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        anyhow::ensure!(Instant::now() < end, "no virtio-serial port for the agent");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Agent {
    fn send(&self, frame: &Frame) {
        // A host that is gone is noticed by the reader.
        let _ = frame.write(&mut *held(&self.port));
    }

    fn handle(self: &Arc<Self>, frame: Frame) {
        let run = held(&self.runs).get(&frame.run).cloned();
        match (frame.kind, run) {
            (Kind::Ping, _) => self.send(&Frame::new(0, Kind::Pong, [])),
            (Kind::Start, None) => {
                if let Err(e) = self.start(frame.run, &frame.body) {
                    self.send(&Frame::new(frame.run, Kind::Failed, format!("{e:#}")));
                }
            }
            (Kind::Stdin, Some(run)) => drop(held(&run.stdin).send(frame.body)),
            (Kind::Credit, Some(run)) => match frame.as_credit() {
                Some((Kind::Stdout, n)) => run.out.give(n),
                Some((Kind::Stderr, n)) => run.err.give(n),
                _ => {}
            },
            (Kind::Signal, Some(run)) => {
                let signal = frame.body.first().and_then(|s| Signal::try_from(i32::from(*s)).ok());
                if let (Some(signal), Some(group)) = (signal, *held(&run.group)) {
                    let _ = killpg(group, signal);
                }
            }
            (Kind::Kill, Some(run)) => {
                run.out.close();
                run.err.close();
                run.kill();
            }
            // The rest is about runs that have ended meanwhile.
            _ => {}
        }
    }

    fn start(self: &Arc<Self>, id: u32, body: &[u8]) -> Result<()> {
        let start: Start = serde_json::from_slice(body)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let theirs = Duration::from_nanos(start.time_ns);
        if now.abs_diff(theirs) > Duration::from_millis(500) {
            clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(theirs)).context("cannot set the clock")?;
        }
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup/run-{id}"));
        fs::create_dir(&cgroup)?;
        let file = PathBuf::from(format!("/run/job-{id}"));
        fs::write(&file, body)?;
        let mut child = Command::new("/agent")
            .arg("job")
            .args([&file, &cgroup])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (stdin, stdin_rx) = channel();
        let run = Arc::new(Run {
            group: Mutex::new(Some(Pid::from_raw(child.id() as i32))),
            cgroup,
            stdin: Mutex::new(stdin),
            out: Window::default(),
            err: Window::default(),
        });
        held(&self.runs).insert(id, run.clone());
        let (pipes, agent) = ((child.stdin.take(), child.stdout.take(), child.stderr.take()), self.clone());
        let (Some(input), Some(out), Some(err)) = pipes else { unreachable!("all three are pipes") };
        std::thread::spawn(move || agent.feed(id, input, &stdin_rx));
        let (done, pumped) = channel();
        let (a, r, d) = (self.clone(), run.clone(), done.clone());
        std::thread::spawn(move || {
            a.pump(id, Kind::Stdout, out, &r.out);
            drop(d);
        });
        let (a, r) = (self.clone(), run.clone());
        std::thread::spawn(move || {
            a.pump(id, Kind::Stderr, err, &r.err);
            drop(done);
        });
        let agent = self.clone();
        std::thread::spawn(move || agent.finish(id, &run, child, &pumped));
        Ok(())
    }

    fn feed(&self, id: u32, input: impl Write, pieces: &Receiver<Vec<u8>>) {
        let mut input = Some(input);
        for piece in pieces {
            if piece.is_empty() || input.as_mut().is_some_and(|i| i.write_all(&piece).is_err()) {
                input = None;
            }
            if !piece.is_empty() {
                self.send(&Frame::credit(id, Kind::Stdin, piece.len()));
            }
        }
    }

    fn pump(&self, id: u32, kind: Kind, mut from: impl Read, window: &Window) {
        let mut buffer = vec![0; CHUNK];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if window.take(n) {
                self.send(&Frame::new(id, kind, &buffer[..n]));
            }
        }
    }

    fn finish(&self, id: u32, run: &Run, mut child: Child, pumped: &Receiver<()>) {
        let status = child.wait();
        *held(&run.group) = None;
        let end = Instant::now() + DEATH;
        while !run.empty() && Instant::now() < end {
            run.kill();
            std::thread::sleep(Duration::from_millis(5));
        }
        if run.empty() {
            // The pipes have no writers left: what remains is for the client to take, at its own pace.
            let _ = pumped.recv();
        }
        run.remove_cgroup();
        held(&self.runs).remove(&id);
        let code = status.map_or(125, |s| s.code().unwrap_or_else(|| 128 + s.signal().unwrap_or(0)));
        self.send(&Frame::new(id, Kind::Exit, code.to_le_bytes()));
    }
}

impl Run {
    fn kill(&self) {
        if let Some(group) = *held(&self.group) {
            let _ = killpg(group, Signal::SIGKILL);
        }
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
    }

    fn empty(&self) -> bool {
        fs::read_to_string(self.cgroup.join("cgroup.events")).is_ok_and(|e| e.contains("populated 0"))
    }

    /// Removes the cgroup and what the command made below it.
    fn remove_cgroup(&self) {
        fn remove(dir: &Path) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    remove(&entry.path());
                }
            }
            let _ = fs::remove_dir(dir);
        }
        remove(&self.cgroup);
    }
}
