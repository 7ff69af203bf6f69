//! Where made and fetched things are kept, and how each is made once.
//!
//! `$CIVIC_CACHE`, else `$XDG_CACHE_HOME/civic`, else `~/.cache/civic`. An artefact is a file or directory with a *recipe*
//! beside it: the text that, when it changes, makes the artefact out of date. Makers work on a temporary name and rename,
//! under a lock file, so an artefact that exists under its own name is whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};

/// The cache directory, made if missing.
pub fn dir() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = var("CIVIC_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("civic")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/civic")))
        .context("no place for a cache: set CIVIC_CACHE or HOME")?;
    let dir = std::path::absolute(dir)?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// A line on stderr saying what takes long now.
pub fn progress(what: &str) {
    eprintln!("civic: {what} …");
}

/// Locks `path` (a file made for the purpose), waiting for whoever has it. Dropping the lock gives it up; so does dying.
pub fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| anyhow!("cannot lock {}: {e}", path.display()))
}

/// Makes `artefact` by `make` unless it is there and was made by the same `recipe`. `make` is given a fresh temporary
/// name to make it under. Returns whether it was made now.
pub fn make_once(artefact: &Path, recipe: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<bool> {
    let beside = |suffix: &str| {
        let mut name = artefact.file_name().unwrap_or_default().to_owned();
        name.push(suffix);
        artefact.with_file_name(name)
    };
    let stamp = beside(".recipe");
    let fresh = || artefact.exists() && fs::read_to_string(&stamp).is_ok_and(|r| r == recipe);
    if fresh() {
        return Ok(false);
    }
    if let Some(parent) = artefact.parent() {
        fs::create_dir_all(parent)?;
    }
    let _lock = lock(&beside(".lock"))?;
    if fresh() {
        return Ok(false);
    }
    let new = beside(".new");
    remove(&new)?;
    make(&new)?;
    remove(&stamp)?;
    remove(artefact)?;
    fs::rename(&new, artefact)?;
    fs::write(stamp, recipe)?;
    Ok(true)
}

/// Removes a file or a directory, which may be missing.
pub fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    }
    .with_context(|| format!("cannot remove {}", path.display()))
}

/// FNV-1a: enough to tell recipes and workspaces apart.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_a_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let artefact = dir.path().join("a/thing");
        let make = |text: &'static str| move |p: &Path| Ok(fs::write(p, text)?);
        assert!(make_once(&artefact, "1", make("one")).unwrap());
        assert!(!make_once(&artefact, "1", make("never")).unwrap());
        assert!(make_once(&artefact, "2", make("two")).unwrap());
        assert_eq!(fs::read_to_string(&artefact).unwrap(), "two");
        assert!(make_once(&artefact, "3", |_| anyhow::bail!("no")).is_err());
        assert_eq!(fs::read_to_string(&artefact).unwrap(), "two");
    }
}
