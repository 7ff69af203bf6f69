//! Starting `civic-vmm`. The meeting is described in `civic_api::launch`.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use civic_api::launch::{Launch, LaunchRequest};
use civic_api::{ErrorBody, ErrorCode};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::jail::JailSpec;
use crate::process::Process;
use crate::rundir::RunDir;
use crate::{advice, cli};

/// How long a monitor may take to build a VM. Reading a kernel from a slow disk is the longest part.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a jailer may take to end what it jails. Killed, it would leave that to end by itself.
const JAIL_END: Duration = Duration::from_secs(5);
/// The program that makes jails.
const JAILER: &str = "civic-jailer";
/// Longest line a monitor says.
const MAX_LINE: u64 = 64 << 10;

/// How long a monitor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Until it is told to end.
    Told,
    /// At most as long as this process, however that ends.
    WeEnd,
}

/// A monitor that we started. Dropping it ends it, unless it was released.
pub struct Monitor {
    child: Option<Child>,
    /// Then what we started is its jailer.
    jailed: bool,
}

impl Monitor {
    /// Starts a monitor and waits until it has built the VM.
    pub async fn launch(
        dir: &RunDir,
        request: &LaunchRequest,
        until: Until,
        jail: Option<&JailSpec>,
    ) -> anyhow::Result<Self> {
        let program = find()?;
        let log = open_log(dir, request.name())?;
        let mut command = match jail {
            None => Command::new(&program),
            Some(jail) => jail.monitor(&find_beside(JAILER)?, &program, &dir.vm(request.name()), request)?,
        };
        // The configuration comes by a pipe: it is on no disk and in nobody's process list.
        command.args(["--config", "-", "--dir"]).arg(dir.vm(request.name()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        in_own_session(&mut command, until);
        let child = command.spawn().map_err(|error| {
            let hint = "set CIVIC_VMM to the civic-vmm to use";
            let program = Path::new(command.get_program()).display();
            advice::error(format!("cannot start {program}: {error}"), hint)
        })?;
        let mut monitor = Self { child: Some(child), jailed: jail.is_some() };
        let line = monitor.first_line(request.to_json().context("cannot write the configuration")?);
        let line = tokio::time::timeout(LAUNCH_TIMEOUT, line).await.map_err(|_| {
            let message = format!("the monitor did not build the VM within {} s", LAUNCH_TIMEOUT.as_secs());
            advice::error(message, format!("see {}", dir.log(request.name()).display()))
        })??;
        match serde_json::from_str(&line) {
            Ok(Launch::Ready { .. }) => Ok(monitor),
            Ok(Launch::Failed { error }) => {
                monitor.wait().await?;
                Err(error.into())
            }
            Err(_) => {
                let status = monitor.kill().map_or_else(String::new, |status| format!(" ({status})"));
                Err(advice::error(format!("the monitor failed{status}"), log_hint(&dir.log(request.name()))))
            }
        }
    }

    /// Gives the monitor its configuration and reads the line it answers with; empty when it ends without.
    async fn first_line(&mut self, config: Vec<u8>) -> anyhow::Result<String> {
        let child = self.child.as_mut().context("the monitor is gone")?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let answer = tokio::task::spawn_blocking(move || -> io::Result<String> {
            if let Some(mut stdin) = stdin {
                // It may end before it reads: what it says about that is worth more than this error.
                let _ = stdin.write_all(&config);
            }
            let mut line = String::new();
            if let Some(stdout) = stdout {
                BufReader::new(stdout.take(MAX_LINE)).read_line(&mut line)?;
            }
            Ok(line)
        });
        answer.await?.context("cannot read what the monitor says")
    }

    /// Waits until it ends.
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let mut child = self.child.take().context("the monitor is gone")?;
        tokio::task::spawn_blocking(move || child.wait()).await?.context("cannot wait for the monitor")
    }

    /// Its process id.
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().and_then(|child| child.id().try_into().ok())
    }

    /// Lets it live on by itself.
    pub fn release(mut self) {
        self.child = None;
    }

    fn kill(&mut self) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        if self.jailed
            && let Some(status) = end_jail(&child, JAIL_END).and_then(|()| child.wait().ok())
        {
            return Some(status);
        }
        let _ = child.kill(); // It may have ended already.
        child.wait().ok()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Has a jailer end what it jails and take away what it has made (`civic_jailer::guardian::END`); none if it has not ended so within `limit`.
fn end_jail(jailer: &Child, limit: Duration) -> Option<()> {
    // It has not been waited for, so the number is its.
    let process = Process::open(jailer.id()).ok()?;
    kill(Pid::from_raw(jailer.id().try_into().ok()?), Signal::SIGUSR1).ok()?;
    let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let left = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    (poll(&mut ended, left) == Ok(1)).then_some(())
}

/// Starts the page server of the VM `name`. It finds its way by itself, and ends by itself.
pub fn start_page_server(dir: &RunDir, name: &str, jail: Option<&JailSpec>) -> anyhow::Result<Child> {
    let program = find_beside("civic-pager")?;
    let mut command = match jail {
        Some(jail) => jail.page_server(&find_beside(JAILER)?, &program, &dir.vm(name))?,
        None => {
            let mut command = Command::new(&program);
            command.arg(dir.vm(name));
            command
        }
    };
    let log = log_file().append(true).open(dir.log(name));
    let log = log.with_context(|| format!("cannot append to {}", dir.log(name).display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    in_own_session(&mut command, Until::Told);
    as_urgent_as_usual(&mut command);
    command.spawn().with_context(|| format!("cannot start {}", program.display()))
}

/// What `civic-vmm doctor` says, as JSON.
pub fn doctor(run_dir: &Path) -> anyhow::Result<Vec<u8>> {
    let program = find()?;
    let output = Command::new(&program).args(["doctor", "--run-dir"]).arg(run_dir).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    if output.stdout.is_empty() {
        return Err(advice::error(
            format!("{} doctor says nothing ({})", program.display(), output.status),
            "set CIVIC_VMM to a civic-vmm of this version",
        ));
    }
    Ok(output.stdout)
}

/// Where to read why a monitor ended, with its last words.
pub fn log_hint(log: &Path) -> String {
    match last_words(log) {
        Some(line) => format!("its last words: {line}\nsee {}", log.display()),
        None => format!("see {}", log.display()),
    }
}

/// The last error in the log, or else its last line.
pub fn last_words(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
    let error = text.lines().rfind(|line| line.contains(" ERROR "));
    error.or_else(|| text.lines().rfind(|line| !line.trim().is_empty())).map(crate::table::printable)
}

/// The monitor's executable: `CIVIC_VMM`, else beside our own, else in `PATH`.
fn find() -> anyhow::Result<PathBuf> {
    const NAME: &str = "civic-vmm";
    if let Some(path) = cli::vmm_from_environment() {
        let path = PathBuf::from(path);
        if path.is_file() {
            return Ok(path);
        }
        let message = format!("CIVIC_VMM is '{}', which is no file", path.display());
        return Err(advice::error(message, "set CIVIC_VMM to the civic-vmm to use, or unset it"));
    }
    find_beside(NAME)
}

/// Another executable of ours: beside the monitor that is used, else beside our own, else in `PATH`.
fn find_beside(name: &str) -> anyhow::Result<PathBuf> {
    let monitor = cli::vmm_from_environment().and_then(|path| Some(Path::new(&path).parent()?.to_owned()));
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    search(monitor.into_iter().chain(beside).chain(std::env::split_paths(&path)), OsStr::new(name)).ok_or_else(|| {
        advice::error(format!("{name} is not to be found"), "install it beside civic, or set CIVIC_VMM to the monitor")
    })
}

fn search(directories: impl Iterator<Item = PathBuf>, name: &OsStr) -> Option<PathBuf> {
    directories.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// The VM's directory, made if need be, and its log, emptied: unless a monitor uses them.
fn open_log(dir: &RunDir, name: &str) -> anyhow::Result<File> {
    let vm = dir.vm(name);
    let unusable = |error: io::Error| {
        let message = format!("cannot use {}: {error}", vm.display());
        advice::error(message, "choose another with --run-dir or CIVIC_RUN_DIR, or let this user write there")
    };
    // A monitor that is just ending removes the directory: then make it again.
    for _ in 0..100 {
        DirBuilder::new().recursive(true).mode(0o700).create(&vm).map_err(unusable)?;
        if dir.is_locked(name).map_err(unusable)? {
            let error = ErrorBody::new(ErrorCode::NameInUse, format!("a VM named '{name}' is running"));
            let hint = format!("choose another --name, or end it with 'civic stop {name}'");
            return Err(error.with_hint(hint).into());
        }
        match log_file().write(true).truncate(true).open(dir.log(name)) {
            Ok(log) => return Ok(log),
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(unusable(error)),
        }
    }
    Err(advice::error(format!("{} keeps vanishing", vm.display()), "see what removes it"))
}

/// How a VM's log is opened: by no link, which a jailed monitor might have left in its folder.
fn log_file() -> OpenOptions {
    let mut options = File::options();
    options.create(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
    options
}

/// Keeps the terminal's signals from the monitor: it is told what to do by its API. One that is to live no longer than we is killed with the
/// thread that starts it, which is the main thread.
#[allow(unsafe_code)]
fn in_own_session(command: &mut Command, until: Until) {
    let parent = nix::unistd::getpid();
    let set_up = move || {
        nix::unistd::setsid()?;
        if until == Until::WeEnd {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // It may have ended before.
            if nix::unistd::getppid() != parent {
                return Err(io::Error::from(nix::errno::Errno::ESRCH));
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are allowed: setsid(2), prctl(2) and
    // getppid(2) are, and turning their errors into an io::Error allocates nothing.
    unsafe { command.pre_exec(set_up) };
}

/// However little of the processor we are to have (nice(1), chrt(1)): the source's first writes after a fork wait for the page server. Who may not
/// raise a process's priority again has to have it as it is.
#[allow(unsafe_code)]
fn as_urgent_as_usual(command: &mut Command) {
    use nix::libc::{PRIO_PROCESS, SCHED_BATCH, SCHED_IDLE, SCHED_OTHER, sched_param};
    use nix::libc::{getpriority, sched_getscheduler, sched_setscheduler, setpriority};

    let set_up = || {
        // SAFETY: takes a number, for this process.
        let policy = unsafe { sched_getscheduler(0) };
        if matches!(policy, SCHED_BATCH | SCHED_IDLE) {
            // SAFETY: takes numbers, and a parameter that lives as long as the call.
            unsafe { sched_setscheduler(0, SCHED_OTHER, &sched_param { sched_priority: 0 }) };
        }
        // SAFETY: takes numbers, for this process.
        let niceness = unsafe { getpriority(PRIO_PROCESS, 0) };
        if niceness > 0 {
            // SAFETY: as above.
            unsafe { setpriority(PRIO_PROCESS, 0, 0) };
        }
        Ok(())
    };
    // SAFETY: the closure runs in the child between fork and exec: it makes system calls and nothing else.
    unsafe { command.pre_exec(set_up) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitor_is_searched_in_order() {
        let temp = tempfile::tempdir().unwrap();
        let dirs: Vec<_> = ["a", "b", "c"].iter().map(|name| temp.path().join(name)).collect();
        for dir in &dirs[1..] {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join("x"), "").unwrap();
        }
        let found = search([PathBuf::from("relative")].into_iter().chain(dirs.clone()), OsStr::new("x"));
        assert_eq!(found, Some(dirs[1].join("x")));
        assert_eq!(search(dirs.into_iter(), OsStr::new("y")), None);
    }

    #[test]
    fn the_logs_last_line_is_told() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("vmm.log");
        assert!(!log_hint(&log).contains("last words"));
        std::fs::write(&log, "one\ntwo\u{1b}[0m\n\n").unwrap();
        assert!(log_hint(&log).starts_with("its last words: two\u{fffd}[0m\n"));
        std::fs::write(&log, "now ERROR why\nnow INFO ended\n").unwrap();
        assert!(log_hint(&log).starts_with("its last words: now ERROR why\n"));
    }
}
