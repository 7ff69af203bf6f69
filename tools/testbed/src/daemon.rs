//! The daemon: owns the machine of one workspace and carries frames between clients and the agent.
//!
//! ```text
//!            first run            last run over           next run
//!   Down ──────────────► Running ──────────────► Paused ──────────► Running
//!    ▲                      │  QEMU ends, or the agent is silent       │
//!    └──────────────────────┴───────────────────────────────────────────┘
//! ```
//!
//! The main thread is the *keeper*: it starts QEMU (which dies with the thread that started it), pauses it, and notices when
//! it hangs. Each client has a thread that sees its run through and one that reads what the client sends.
//!
//! Lock order: `state`, then the machine's own locks. `state` is never held while a frame is sent.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use crate::cache;
use crate::frame::{Frame, Kind, Request, Run, Start, VERSION, What};
use crate::machine::{Machine, SLOTS, Size, root_tag};
use crate::setup::agent_archive;

/// L1 is paused this long after its last run: a next one often follows at once.
const LINGER: Duration = Duration::from_secs(1);
/// How long the agent may be silent while L1 runs. `TESTBED_HANG` (seconds) overrides it.
const HANG: Duration = Duration::from_secs(180);
/// The daemon ends when unused for so long: a paused machine still holds its memory.
const UNUSED: Duration = Duration::from_secs(3 * 3600);

/// Where a workspace's daemon keeps its socket, locks and logs.
pub fn state_dir(workspace: &Path) -> Result<PathBuf> {
    let name = format!("{:016x}", cache::hash(workspace.as_os_str().as_encoded_bytes()));
    let dir = cache::dir()?.join("testbed").join(name);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

struct State {
    machine: Option<Arc<Machine>>,
    size: Size,
    paused: bool,
    booted: Instant,
    heard: Instant,
    idle_since: Instant,
    /// The agent's frames, by run.
    runs: BTreeMap<u32, (Sender<Frame>, String)>,
    /// Runs from request to end, including those without a slot yet.
    active: usize,
    free: Vec<usize>,
    next: u32,
}

/// A machine is wanted: of what size, and whom to give it.
type Boot = (Size, Sender<Result<Arc<Machine>>>);

struct Daemon {
    dir: PathBuf,
    workspace: PathBuf,
    /// Made at the start: by the time of a second boot this program's file may have been replaced by a newer build.
    agent: Vec<u8>,
    state: Mutex<State>,
    changed: Condvar,
    boots: Mutex<Sender<Boot>>,
}

/// Serves a workspace's clients until told to stop or unused for long.
pub fn serve(workspace: &Path, size: Size) -> Result<()> {
    let dir = state_dir(workspace)?;
    let file = File::options().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| anyhow!("another daemon serves {}", workspace.display()))?;
    let _ = nix::unistd::setsid();
    cache::remove(&dir.join("sock"))?;
    let (boots, requests) = channel();
    let now = Instant::now();
    let state = State {
        machine: None,
        size,
        paused: false,
        booted: now,
        heard: now,
        idle_since: now,
        runs: BTreeMap::new(),
        active: 0,
        free: (0..SLOTS).rev().collect(),
        next: 1,
    };
    let daemon = Arc::new(Daemon {
        dir: dir.clone(),
        workspace: workspace.to_owned(),
        agent: agent_archive()?,
        state: Mutex::new(state),
        changed: Condvar::new(),
        boots: Mutex::new(boots),
    });
    // Bound under another name and renamed, so that whoever finds the socket can connect to it.
    let listener = UnixListener::bind(dir.join("sock.new")).or_else(|_| {
        cache::remove(&dir.join("sock.new")).ok();
        UnixListener::bind(dir.join("sock.new"))
    });
    let listener = listener.context("cannot listen (is the cache's name too long for a socket? set CIVIC_CACHE)")?;
    fs::rename(dir.join("sock.new"), dir.join("sock"))?;
    let clients = daemon.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let daemon = clients.clone();
            std::thread::spawn(move || {
                if let Err(e) = daemon.client(stream) {
                    eprintln!("testbed daemon: {e:#}");
                }
            });
        }
    });
    daemon.keep(&requests);
    cache::remove(&dir.join("sock"))
}

impl Daemon {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keeper's loop. Returns when the daemon is to end.
    fn keep(self: &Arc<Self>, requests: &Receiver<Boot>) {
        let hang = std::env::var("TESTBED_HANG").ok().and_then(|s| s.parse().ok()).map_or(HANG, Duration::from_secs);
        loop {
            match requests.recv_timeout(Duration::from_millis(250)) {
                Ok((size, reply)) => drop(reply.send(self.boot(size))),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let mut state = self.state();
            let Some(machine) = state.machine.clone() else {
                if state.active == 0 && state.idle_since.elapsed() > UNUSED {
                    return;
                }
                continue;
            };
            if !state.paused && state.heard.elapsed() > hang {
                eprintln!("testbed daemon: the machine hangs");
                machine.kill();
            } else if state.active == 0 && !state.paused && state.idle_since.elapsed() > LINGER {
                match machine.pause() {
                    Ok(()) => state.paused = true,
                    Err(_) => machine.kill(),
                }
            } else if state.active == 0 && state.idle_since.elapsed() > UNUSED {
                machine.kill();
                return;
            }
        }
    }

    fn boot(self: &Arc<Self>, size: Size) -> Result<Arc<Machine>> {
        let (machine, mut agent) = Machine::boot(&self.dir, &self.workspace, size, &self.agent)?;
        let machine = Arc::new(machine);
        let (now, mut state) = (Instant::now(), self.state());
        state.machine = Some(machine.clone());
        (state.size, state.paused, state.booted, state.heard) = (size, false, now, now);
        drop(state);
        let (daemon, m) = (self.clone(), Arc::downgrade(&machine));
        std::thread::spawn(move || {
            while let Ok(frame) = Frame::read(&mut agent) {
                let mut state = daemon.state();
                state.heard = Instant::now();
                let to = state.runs.get(&frame.run).map(|r| r.0.clone());
                drop(state);
                if let Some(to) = to {
                    let _ = to.send(frame);
                }
            }
            if let Some(machine) = m.upgrade() {
                daemon.lost(&machine);
            }
        });
        let (daemon, m) = (self.clone(), Arc::downgrade(&machine));
        std::thread::spawn(move || {
            while let Some(machine) = m.upgrade() {
                let paused = daemon.state().paused;
                if !paused && machine.send(&Frame::new(0, Kind::Ping, [])).is_err() {
                    break;
                }
                drop(machine);
                std::thread::sleep(Duration::from_secs(5));
            }
        });
        Ok(machine)
    }

    /// The machine is of no more use: its runs end (their senders are dropped), and the next run boots another.
    fn lost(&self, machine: &Arc<Machine>) {
        machine.kill();
        let mut state = self.state();
        if state.machine.as_ref().is_some_and(|m| Arc::ptr_eq(m, machine)) {
            state.machine = None;
            state.runs.clear();
        }
        self.changed.notify_all();
    }

    fn client(self: &Arc<Self>, mut stream: UnixStream) -> Result<()> {
        let first = Frame::read(&mut stream)?;
        ensure!(first.kind == Kind::Request, "a client sent {:?} first", first.kind);
        let request: Request = match serde_json::from_slice(&first.body) {
            Ok(request) => request,
            Err(e) => {
                return Ok(Frame::new(
                    0,
                    Kind::Failed,
                    format!("the daemon does not understand: {e}; try testbed restart"),
                )
                .write(&mut stream)?);
            }
        };
        match request.what {
            What::Status => Ok(Frame::new(0, Kind::Reply, self.status().to_string()).write(&mut stream)?),
            What::Stop => {
                if let Some(machine) = self.state().machine.take() {
                    machine.kill();
                }
                cache::remove(&self.dir.join("sock"))?;
                Frame::new(0, Kind::Reply, "stopped").write(&mut stream)?;
                std::process::exit(0)
            }
            What::Run(_) if request.version != VERSION => {
                Ok(Frame::new(0, Kind::Failed, "the daemon is of another version: testbed restart")
                    .write(&mut stream)?)
            }
            What::Run(run) => {
                self.state().active += 1;
                let end = self.run(run, &stream);
                let mut state = self.state();
                state.active -= 1;
                state.idle_since = Instant::now();
                drop(state);
                let last = end.unwrap_or_else(|e| Frame::new(0, Kind::Failed, format!("{e:#}")));
                let _ = last.write(&mut stream);
                Ok(())
            }
        }
    }

    fn status(&self) -> serde_json::Value {
        let state = self.state();
        let what = match &state.machine {
            None => "down",
            Some(_) if state.paused => "paused",
            Some(_) => "running",
        };
        json!({
            "machine": what, "workspace": self.workspace, "memory_mib": state.size.memory, "cpus": state.size.cpus,
            "daemon_pid": std::process::id(), "qemu_pid": state.machine.as_ref().map(|m| m.pid), "logs": self.dir,
            "up_seconds": state.machine.as_ref().map(|_| state.booted.elapsed().as_secs()),
            "runs": state.runs.iter().map(|(id, r)| json!({ "id": id, "command": r.1 })).collect::<Vec<_>>(),
        })
    }

    /// A running machine of the wanted size.
    fn machine(&self, run: &Run, client: &UnixStream) -> Result<Arc<Machine>> {
        let mut state = self.state();
        let size = Size { memory: run.memory.unwrap_or(state.size.memory), cpus: run.cpus.unwrap_or(state.size.cpus) };
        if let Some(machine) = state.machine.clone() {
            if size == state.size {
                if state.paused {
                    state.heard = Instant::now();
                    machine.resume()?;
                    state.paused = false;
                }
                return Ok(machine);
            }
            ensure!(
                state.active == 1,
                "the machine is in use with {} MiB and {} CPUs",
                state.size.memory,
                state.size.cpus
            );
            state.machine = None;
            machine.kill();
        }
        drop(state);
        // Only the keeper boots, so of several that ask at once all but the first find it done.
        let (reply, booted) = channel();
        let boots = self.boots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(machine) = self.state().machine.clone() {
            return Ok(machine);
        }
        notice(client, "booting the machine");
        boots.send((size, reply)).map_err(|_| anyhow!("the daemon is ending"))?;
        booted.recv().context("the daemon is ending")?
    }

    fn run(self: &Arc<Self>, run: Run, client: &UnixStream) -> Result<Frame> {
        ensure!(!run.argv.is_empty(), "no command");
        let machine = self.machine(&run, client)?;
        let slot = self.slot(client);
        let (frames, events) = channel();
        let id = {
            let mut state = self.state();
            let id = state.next;
            state.next += 1;
            state.runs.insert(id, (frames, run.argv.join(" ")));
            id
        };
        let serials: Vec<_> = (0..run.disks.len()).map(|n| format!("tb{id}-{n}")).collect();
        let mut plugged = Vec::new();
        let end = (|| {
            for (disk, serial) in run.disks.iter().zip(&serials) {
                machine.plug(disk, serial)?;
                plugged.push(serial);
            }
            let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64;
            let workspace = self.workspace.display().to_string();
            let start = Start {
                run: run.clone(),
                serials: serials.clone(),
                workspace,
                root_tag: root_tag(slot),
                time_ns: time,
            };
            machine.send(&Frame::new(id, Kind::Start, serde_json::to_vec(&start)?))?;
            notice(client, "");
            self.carry(&machine, id, client, &events)
        })();
        let mut state = self.state();
        state.runs.remove(&id);
        let alive = state.machine.as_ref().is_some_and(|m| Arc::ptr_eq(m, &machine));
        drop(state);
        for serial in plugged {
            if alive && machine.unplug(serial).is_err() {
                eprintln!("testbed daemon: disk {serial} is stuck: the machine has to go");
                self.lost(&machine);
                break;
            }
        }
        self.state().free.push(slot);
        self.changed.notify_all();
        end
    }

    fn slot(&self, client: &UnixStream) -> usize {
        let mut state = self.state();
        if state.free.is_empty() {
            notice(client, "waiting: too many commands run at once");
        }
        loop {
            if let Some(slot) = state.free.pop() {
                return slot;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Carries a run's frames until its last, which is returned.
    fn carry(&self, machine: &Arc<Machine>, id: u32, client: &UnixStream, events: &Receiver<Frame>) -> Result<Frame> {
        let (to_agent, mut from) = (machine.clone(), client.try_clone()?);
        std::thread::spawn(move || {
            while let Ok(mut frame) = Frame::read(&mut from) {
                frame.run = id;
                let passed = matches!(frame.kind, Kind::Stdin | Kind::Credit | Kind::Signal | Kind::Kill);
                if !passed || to_agent.send(&frame).is_err() {
                    break;
                }
            }
            // The client is gone, or has seen the end already, which makes this a frame about a run that is over.
            let _ = to_agent.send(&Frame::new(id, Kind::Kill, []));
        });
        let mut client = client;
        for frame in events {
            if matches!(frame.kind, Kind::Exit | Kind::Failed) {
                return Ok(frame);
            }
            // If the client is gone its reader kills the run, and the end still comes from the agent.
            let _ = frame.write(&mut client);
        }
        bail!("the machine stopped or hung before the command ended (testbed logs)")
    }
}

fn notice(mut client: &UnixStream, text: &str) {
    let _ = Frame::new(0, Kind::Notice, text).write(&mut client);
}
