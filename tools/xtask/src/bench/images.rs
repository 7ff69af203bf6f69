//! Where the disk images of the bench are: on a file system of a disk, so that the page cache and a flush are real.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::guest::said;
use super::machine::Tools;

/// Of an image: six fit the scratch disk. They also fit the host's page cache, so that the monitors are measured and not a disk.
const BYTES: u64 = 128 << 20;

/// A folder for images.
pub struct Images {
    dir: PathBuf,
    mounted: bool,
}

impl Images {
    /// On the scratch disk, if that is one, else beside it.
    pub fn new(tools: &Tools) -> Result<Self> {
        let scratch = std::env::var_os("CIVIC_SCRATCH_IMAGE").map(PathBuf::from).context("no CIVIC_SCRATCH_IMAGE")?;
        if !fs::metadata(&scratch)?.file_type().is_block_device() {
            let dir = scratch.parent().context("no folder")?.join("images");
            fs::create_dir_all(&dir)?;
            return Ok(Self { dir, mounted: false });
        }
        let options = ["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        said(Command::new("/sbin/mke2fs").args(options).arg(&scratch))?;
        let dir = tools.work.join("images");
        fs::create_dir_all(&dir)?;
        said(Command::new("mount").arg(&scratch).arg(&dir))?;
        Ok(Self { dir, mounted: true })
    }

    /// Makes an empty image.
    pub fn make(&self, name: &str, qcow2: bool) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if qcow2 {
            let mut c = Command::new("qemu-img");
            said(c.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(BYTES.to_string()))?;
        } else {
            File::create(&path)?.set_len(BYTES)?;
        }
        Ok(path)
    }

    /// Writes all that is dirty to the disk, so that no run pays for the one before it.
    pub fn settle(&self) -> Result<()> {
        said(Command::new("sync").arg("-f").arg(self.path())).map(drop)
    }

    fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        if self.mounted {
            let _ = said(Command::new("umount").arg(&self.dir));
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
