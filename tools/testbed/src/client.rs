//! The command line's side: reaches the daemon (starting it if there is none) and sees one command through.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};

use crate::cache;
use crate::daemon::state_dir;
use crate::frame::{CHUNK, Frame, Kind, Request, Run, VERSION, What, Window};

/// The status of a run that failed for a reason of the testbed's own.
pub const FAILED: i32 = 125;
/// The status of a run that took too long.
const TIMED_OUT: i32 = 124;
/// How long a command may take to end after SIGTERM when it took too long.
const GRACE: Duration = Duration::from_secs(5);

/// The folder that is read-write in the testbed: the Cargo workspace or git repository around the current one, else it.
pub fn workspace() -> Result<PathBuf> {
    let here = std::env::current_dir()?;
    let holds = |dir: &&Path| {
        dir.join(".git").exists() || fs::read_to_string(dir.join("Cargo.toml")).is_ok_and(|t| t.contains("[workspace]"))
    };
    let found = here.ancestors().find(holds).map(Path::to_owned);
    Ok(found.unwrap_or(here))
}

fn connect(dir: &Path) -> Option<UnixStream> {
    UnixStream::connect(dir.join("sock")).ok()
}

/// Connects to the workspace's daemon, starting one if there is none.
fn reach(workspace: &Path) -> Result<UnixStream> {
    let dir = state_dir(workspace)?;
    if let Some(stream) = connect(&dir) {
        return Ok(stream);
    }
    let _lock = cache::lock(&dir.join("start.lock"))?;
    let end = Instant::now() + Duration::from_secs(20);
    let log = dir.join("daemon.log");
    loop {
        if let Some(stream) = connect(&dir) {
            return Ok(stream);
        }
        let out = File::create(&log)?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["daemon", "--workspace"])
            .arg(workspace)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()?;
        while child.try_wait()?.is_none() {
            if let Some(stream) = connect(&dir) {
                return Ok(stream);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // It ends at once when a daemon that is itself ending still has the lock.
        ensure!(Instant::now() < end, "no daemon comes up: {}", fs::read_to_string(&log).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn ask(stream: &mut UnixStream, what: What) -> Result<()> {
    let request = serde_json::to_vec(&Request { version: VERSION, what })?;
    Ok(Frame::new(0, Kind::Request, request).write(stream)?)
}

/// Asks what has a short answer. `None` if no daemon runs.
pub fn query(workspace: &Path, what: What) -> Result<Option<String>> {
    let Some(mut stream) = connect(&state_dir(workspace)?) else { return Ok(None) };
    ask(&mut stream, what)?;
    Ok(Some(Frame::read(&mut stream).context("the daemon does not answer")?.text()))
}

/// Ends the workspace's daemon and machine, whether or not it still answers.
pub fn stop(workspace: &Path) -> Result<bool> {
    let was = query(workspace, What::Stop)?.is_some();
    let _gone = cache::lock(&state_dir(workspace)?.join("lock"))?;
    Ok(was)
}

/// Runs a command and returns its exit status.
pub fn run(workspace: &Path, run: Run, timeout: Option<Duration>) -> Result<i32> {
    let mut stream = reach(workspace)?;
    ask(&mut stream, What::Run(run))?;
    let timed_out = Arc::new(Mutex::new(false));
    let window = Arc::new(Window::default());
    let to = Arc::new(Mutex::new(stream.try_clone()?));
    loop {
        let Ok(frame) = Frame::read(&mut stream) else {
            bail!("the daemon ended before the command did (testbed logs)")
        };
        match frame.kind {
            Kind::Notice if frame.body.is_empty() => {
                forward_signals(to.clone())?;
                forward_input(to.clone(), window.clone());
                if let Some(limit) = timeout {
                    end_after(limit, to.clone(), timed_out.clone());
                }
            }
            Kind::Notice => eprintln!("testbed: {} …", frame.text()),
            Kind::Stdout => pass(std::io::stdout(), &frame, &to)?,
            Kind::Stderr => pass(std::io::stderr(), &frame, &to)?,
            Kind::Credit => {
                if let Some((Kind::Stdin, n)) = frame.as_credit() {
                    window.give(n);
                }
            }
            Kind::Exit if *timed_out.lock().unwrap_or_else(PoisonError::into_inner) => return Ok(TIMED_OUT),
            Kind::Exit => return frame.as_exit().context("an exit without a status"),
            Kind::Failed => bail!("{}", frame.text()),
            _ => {}
        }
    }
}

fn send(to: &Mutex<UnixStream>, frame: &Frame) -> bool {
    frame.write(&mut *to.lock().unwrap_or_else(PoisonError::into_inner)).is_ok()
}

fn pass(mut to: impl Write, frame: &Frame, daemon: &Mutex<UnixStream>) -> Result<()> {
    if let Err(e) = to.write_all(&frame.body).and_then(|()| to.flush()) {
        if e.kind() == ErrorKind::BrokenPipe {
            // As a local command would: our end takes the remote one with it.
            std::process::exit(128 + Signal::SIGPIPE as i32);
        }
        return Err(e.into());
    }
    send(daemon, &Frame::credit(0, frame.kind, frame.body.len()));
    Ok(())
}

/// From here on signals are for the command. Called before any other thread is there, so that all have them blocked.
fn forward_signals(to: Arc<Mutex<UnixStream>>) -> Result<()> {
    let signals = SigSet::from_iter([
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]);
    signals.thread_block()?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            send(&to, &Frame::new(0, Kind::Signal, [signal as u8]));
        }
    });
    Ok(())
}

fn forward_input(to: Arc<Mutex<UnixStream>>, window: Arc<Window>) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        let mut stdin = std::io::stdin();
        while let Ok(n) = stdin.read(&mut buffer) {
            if !window.take(n) || !send(&to, &Frame::new(0, Kind::Stdin, &buffer[..n])) || n == 0 {
                return;
            }
        }
        send(&to, &Frame::new(0, Kind::Stdin, []));
    });
}

fn end_after(limit: Duration, to: Arc<Mutex<UnixStream>>, timed_out: Arc<Mutex<bool>>) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        *timed_out.lock().unwrap_or_else(PoisonError::into_inner) = true;
        eprintln!("testbed: {} s are over", limit.as_secs());
        send(&to, &Frame::new(0, Kind::Signal, [Signal::SIGTERM as u8]));
        std::thread::sleep(GRACE);
        send(&to, &Frame::new(0, Kind::Kill, []));
        std::thread::sleep(Duration::from_secs(60));
        eprintln!("testbed: the machine does not react");
        std::process::exit(TIMED_OUT);
    });
}
