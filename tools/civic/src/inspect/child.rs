//! A child that is there for one program: its name and its directory are its own, and are gone when it is.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use anyhow::{Context, Result};
use civic_api::MAX_NAME_BYTES;

use crate::advice;
use crate::monitor::{Monitor, last_words};
use crate::process::Process;
use crate::rundir::RunDir;

/// How long a monitor may take to end when it is asked to, and then when it is killed.
const GOING: Duration = Duration::from_secs(5);
/// How long one that is lost may take to end.
const SOON: Duration = Duration::from_millis(500);
/// Between the source's name and the number.
const INFIX: &str = "-inspect-";
/// Most children of one source at a time.
const MOST: u32 = 9999;

/// A name that nobody else gets: its directory is there from the beginning on. Goes with what is in it.
pub struct Reserved {
    dir: RunDir,
    name: String,
    kept: bool,
}

impl Reserved {
    /// The first of SOURCE-inspect-1, SOURCE-inspect-2, … that is free.
    pub fn new(dir: &RunDir, source: &str) -> Result<Self> {
        for number in 1..=MOST {
            let name = numbered(source, number);
            // It is there already where somebody has the name, or had it and has left a log.
            match DirBuilder::new().mode(0o700).create(dir.vm(&name)) {
                Ok(()) => return Ok(Self { dir: dir.clone(), name, kept: false }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(dir.not_running(source)),
                Err(error) => {
                    let message = format!("cannot make {}: {error}", dir.vm(&name).display());
                    return Err(advice::error(message, "run as the user whose VMs these are"));
                }
            }
        }
        let message = format!("all names from {} to {} are taken", numbered(source, 1), numbered(source, MOST));
        Err(advice::error(message, "'civic list' shows those that are left; 'civic kill NAME' ends one"))
    }

    /// It.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // One that somebody holds is not ours any more.
        if !self.kept && !self.dir.is_locked(&self.name).unwrap_or(true) {
            let _ = fs::remove_dir_all(self.dir.vm(&self.name));
        }
    }
}

/// A long source's name is cut: nothing but the directory depends on it.
fn numbered(source: &str, number: u32) -> String {
    let room = MAX_NAME_BYTES - INFIX.len() - MOST.to_string().len();
    format!("{}{INFIX}{number}", &source[..source.len().min(room)])
}

/// A child. Dropping it ends it at once, and leaves nothing.
pub struct Child {
    // In this order: the directory goes when nobody uses it.
    monitor: Option<Monitor>,
    reserved: Reserved,
}

impl Child {
    /// Of this name, with its monitor, if it ever had one.
    pub fn new(reserved: Reserved, monitor: Option<Monitor>) -> Self {
        Self { monitor, reserved }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.reserved.name()
    }

    /// Whether its monitor is no more, or is about to be.
    pub async fn ends_soon(&self) -> bool {
        let Some(process) = self.process() else { return true };
        process.wait(SOON).await.unwrap_or(true)
    }

    /// Its monitor: ours until it is waited for, so the id is its.
    fn process(&self) -> Option<Process> {
        Process::open(self.monitor.as_ref()?.pid()?.unsigned_abs()).ok()
    }

    /// What its monitor has logged last, which goes with it.
    pub fn last_words(&self) -> Option<String> {
        last_words(&self.reserved.dir.log(self.name()))
    }

    /// Lets it live on by itself.
    pub fn keep(mut self) {
        self.reserved.kept = true;
        if let Some(monitor) = self.monitor.take() {
            monitor.release();
        }
    }

    /// Ends it: by its API, so that it closes in order what it has open, and otherwise as a process.
    pub async fn discard(mut self) -> Result<()> {
        let Some(monitor) = self.monitor.take() else { return Ok(()) };
        let Some(pid) = monitor.pid() else { return Ok(()) };
        // Ours until it is waited for, so the id is its.
        let process = Process::open(pid.unsigned_abs()).with_context(|| format!("cannot watch process {pid}"))?;
        let client = self.reserved.dir.client(self.name());
        // One that has ended is what is wanted.
        let _ = tokio::time::timeout(GOING, client.kill()).await;
        if process.wait(GOING).await? {
            return Ok(());
        }
        process.kill().with_context(|| format!("cannot kill process {pid}"))?;
        if process.wait(GOING).await? {
            return Ok(());
        }
        // Whoever waits for it might do so for ever.
        monitor.release();
        self.reserved.kept = true;
        let message = format!("the monitor of {}, process {pid}, was killed and does not end", self.name());
        Err(advice::error(message, format!("see what it waits for: /proc/{pid}/stack")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_one_by_one_and_given_back() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::new(temp.path()).unwrap();
        let (first, second) = (Reserved::new(&dir, "web").unwrap(), Reserved::new(&dir, "web").unwrap());
        assert_eq!((first.name(), second.name()), ("web-inspect-1", "web-inspect-2"));
        fs::write(dir.log("web-inspect-1"), "told\n").unwrap();
        drop(first);
        assert!(!dir.vm("web-inspect-1").exists());
        // What another has left is not touched.
        fs::create_dir(dir.vm("web-inspect-1")).unwrap();
        fs::write(dir.log("web-inspect-1"), "last\n").unwrap();
        let third = Child::new(Reserved::new(&dir, "web").unwrap(), None);
        assert_eq!(third.name(), "web-inspect-3");
        drop(third);
        let kept = Child::new(Reserved::new(&dir, "web").unwrap(), None);
        let name = kept.name().to_owned();
        kept.keep();
        assert!(dir.vm(&name).exists() && dir.vm("web-inspect-1").exists());
    }

    #[test]
    fn a_name_fits_whatever_the_sources_is() {
        for source in ["a".to_owned(), "long".repeat(15) + "xyz"] {
            for number in [1, MOST] {
                civic_api::validate_name(&numbered(&source, number)).unwrap();
            }
        }
    }

    #[test]
    fn without_a_run_directory_there_is_no_source() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::new(&temp.path().join("none")).unwrap();
        let told = advice::told(&Reserved::new(&dir, "web").err().unwrap());
        assert!(told.contains("there is no VM named 'web'"), "{told}");
    }
}
