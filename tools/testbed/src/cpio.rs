//! Writing initramfs archives: the "newc" cpio format (`Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Every entry belongs to root whoever builds it, and parents are made as needed. Several archives may follow one
//! another in one file; a later entry replaces an earlier one.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// An archive being written in memory.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    made: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        let name = name.trim_start_matches('/');
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.dir(parent);
        }
        self.inode += 1;
        let nlink = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.inode, mode, 0, 0, nlink, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds a directory and its parents, unless they are there.
    pub fn dir(&mut self, name: &str) {
        let name = name.trim_matches('/').to_owned();
        if !name.is_empty() && self.made.insert(name.clone()) {
            self.entry(&name, 0o040_755, &[]);
        }
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) {
        self.entry(name, 0o100_000 | permissions, data);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &str) {
        self.entry(name, 0o120_777, target.as_bytes());
    }

    /// Adds a file of this machine under `name`, with its permissions.
    pub fn copy(&mut self, from: &Path, name: &str) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let mode = fs::metadata(from)?.permissions().mode() & 0o777;
        self.file(name, mode, &data);
        Ok(())
    }

    /// Adds a program of this machine at its own path, with the shared libraries it needs, as `ldd` tells.
    pub fn program(&mut self, path: &Path, name: &str) -> Result<()> {
        self.copy(path, name)?;
        let out = std::process::Command::new("ldd").arg(path).output().context("cannot run ldd")?;
        for word in String::from_utf8_lossy(&out.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
            if self.made.insert(word.to_owned()) {
                self.copy(Path::new(word), word)?;
            }
        }
        Ok(())
    }

    /// The archive's bytes, ended and padded so that another may follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_it() {
        let mut a = Archive::new();
        a.file("etc/deep/one", 0o644, b"hello");
        a.dir("etc/deep");
        a.link("bin/sh", "busybox");
        let bytes = a.finish();
        assert_eq!(bytes.len() % 512, 0);
        let Ok(mut child) =
            Command::new("cpio").arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()
        else {
            panic!("this test needs cpio: run cargo xtask setup");
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), "etc\netc/deep\netc/deep/one\nbin\nbin/sh\n");
    }
}
