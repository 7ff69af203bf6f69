//! The run directory: a directory per VM, with what `civic_api::launch` names in it.
//!
//! A VM lives if its API answers; if not, the lock tells a monitor that hangs (or has just started) from one that is dead.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use civic_api::client::{Client, ClientError};
use civic_api::launch::{LOCK_FILE, LOG_FILE, SOCKET_FILE};
use civic_api::{VmInfo, validate_name};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::advice;

/// How long a monitor may take to answer before it counts as hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The run directory.
#[derive(Clone)]
pub struct RunDir {
    path: PathBuf,
}

/// What is behind a VM's directory.
pub enum Found {
    /// The monitor answers.
    Alive(Box<VmInfo>),
    /// A process holds the lock but does not answer: it starts, ends, or hangs.
    Silent,
    /// Nobody holds the lock. The log is what is left.
    Dead,
}

impl RunDir {
    /// The run directory at `path`, which need not exist yet.
    pub fn new(path: &Path) -> anyhow::Result<Self> {
        let path = std::path::absolute(path).with_context(|| format!("--run-dir '{}'", path.display()))?;
        Ok(Self { path })
    }

    /// Its path, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the VM called `name`.
    pub fn vm(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The log of the VM's monitor.
    pub fn log(&self, name: &str) -> PathBuf {
        self.vm(name).join(LOG_FILE)
    }

    /// A client for the VM's monitor.
    pub fn client(&self, name: &str) -> Client {
        Client::new(self.vm(name).join(SOCKET_FILE))
    }

    /// Names of VMs that have a directory, sorted. A run directory that does not exist has none.
    pub fn names(&self) -> anyhow::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                let message = format!("cannot read {}: {error}", self.path.display());
                return Err(advice::error(message, "run as the user whose VMs these are, or give another --run-dir"));
            }
        };
        let mut names = Vec::new();
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let known = [LOCK_FILE, LOG_FILE, SOCKET_FILE].iter().any(|file| entry.path().join(file).exists());
            if known && validate_name(&name).is_ok() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// What is behind the directory of `name`.
    pub async fn find(&self, name: &str) -> Found {
        match tokio::time::timeout(ANSWER_TIMEOUT, self.client(name).info()).await {
            Ok(Ok(info)) => Found::Alive(Box::new(info)),
            Ok(Err(ClientError::NotRunning { .. })) if !self.is_locked(name).unwrap_or(false) => Found::Dead,
            _ => Found::Silent,
        }
    }

    /// Whether a monitor holds the lock of `name`.
    pub fn is_locked(&self, name: &str) -> io::Result<bool> {
        let file = match File::open(self.vm(name).join(LOCK_FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(false),
            Err((_, Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, error)) => Err(error.into()),
        }
    }

    /// The process that holds the lock of `name`, if the kernel tells.
    pub fn lock_holder(&self, name: &str) -> Option<i32> {
        let lock = fs::metadata(self.vm(name).join(LOCK_FILE)).ok()?;
        let locks = fs::read_to_string("/proc/locks").ok()?;
        let (major, minor) = (nix::sys::stat::major(lock.dev()), nix::sys::stat::minor(lock.dev()));
        holder(&locks, &format!("{major:02x}:{minor:02x}:{}", lock.ino()))
    }

    /// The error for a VM that does not run.
    pub fn not_running(&self, name: &str) -> anyhow::Error {
        if self.log(name).exists() && !self.is_locked(name).unwrap_or(false) {
            let hint = format!(
                "see {}; 'civic run --name {name} …' starts it anew, 'rm -r {}' forgets it",
                self.log(name).display(),
                self.vm(name).display()
            );
            advice::error(format!("the VM '{name}' has ended badly"), hint)
        } else if self.is_locked(name).unwrap_or(false) {
            let hint = format!("try again in a moment; 'civic kill {name}' ends it if it hangs");
            advice::error(format!("the VM '{name}' is starting or ending and does not answer"), hint)
        } else {
            let message = format!("there is no VM named '{name}' in {}", self.path.display());
            advice::error(message, "'civic list' shows those there are")
        }
    }
}

/// The process that holds an exclusive flock on `file` (`major:minor:inode`), by `/proc/locks`
/// (Linux `Documentation/filesystems/proc.rst`): `1: FLOCK  ADVISORY  WRITE 708 00:1a:1234 0 EOF`.
fn holder(locks: &str, file: &str) -> Option<i32> {
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, "WRITE", pid, inode, ..] if inode == file => pid.parse().ok().filter(|&pid| pid > 1),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, RunDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::new(temp.path()).unwrap();
        (temp, dir)
    }

    #[test]
    fn who_holds_a_lock() {
        let locks = "1: POSIX  ADVISORY  WRITE 5 00:1a:7 0 EOF\n2: FLOCK  ADVISORY  WRITE 708 00:1a:7 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 9 00:1a:8 0 EOF\n3: FLOCK  ADVISORY  WRITE -1 00:1a:9 0 EOF\n";
        assert_eq!(holder(locks, "00:1a:7"), Some(708));
        assert_eq!(holder(locks, "00:1a:8"), None);
        assert_eq!(holder(locks, "00:1a:9"), None);
    }

    #[test]
    fn directories_of_vms_are_known_by_their_files() {
        let (temp, dir) = dir();
        assert_eq!(RunDir::new(&temp.path().join("absent")).unwrap().names().unwrap(), Vec::<String>::new());
        for name in ["web", "db", "Upper", "empty"] {
            fs::create_dir(temp.path().join(name)).unwrap();
        }
        for name in ["web", "db", "Upper"] {
            fs::write(dir.log(name), "").unwrap();
        }
        fs::write(temp.path().join("file"), "").unwrap();
        assert_eq!(dir.names().unwrap(), ["db", "web"]);
    }

    #[test]
    fn a_dead_vm_is_told_from_one_that_hangs() {
        let (temp, dir) = dir();
        let told = |dir: &RunDir| advice::told(&dir.not_running("web"));
        assert!(told(&dir).contains("there is no VM named 'web'"), "{}", told(&dir));
        fs::create_dir(temp.path().join("web")).unwrap();
        fs::write(dir.log("web"), "").unwrap();
        assert!(told(&dir).contains("has ended badly"), "{}", told(&dir));
        let file = File::create(dir.vm("web").join(LOCK_FILE)).unwrap();
        assert!(!dir.is_locked("web").unwrap());
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e).unwrap();
        assert!(dir.is_locked("web").unwrap());
        assert!(told(&dir).contains("does not answer"), "{}", told(&dir));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        assert!(matches!(runtime.block_on(dir.find("web")), Found::Silent));
        if let Some(pid) = dir.lock_holder("web") {
            assert_eq!(pid, std::process::id() as i32);
        }
        drop(lock);
        assert!(matches!(runtime.block_on(dir.find("web")), Found::Dead));
    }
}
