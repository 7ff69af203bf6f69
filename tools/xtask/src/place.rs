//! Where guests run: on this machine's KVM, or in the testbed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use civic_testbed::cache::{self, make_once};
use civic_testbed::kernel::FLAVOURS;

use crate::{assets, store};

/// The testbed's exit status when the machine died under the command.
const TESTBED_FAILED: i32 = 125;

/// A place to run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This machine.
    Here,
    /// The emulated machine.
    Testbed,
}

fn kvm_opens() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

impl Place {
    /// Where bare-metal guest code runs, and why.
    pub fn for_bare() -> (Self, &'static str) {
        if kvm_opens() { (Self::Here, "/dev/kvm opens") } else { (Self::Testbed, "/dev/kvm does not open") }
    }

    /// Where stock kernels run, and why. Some machines have a `/dev/kvm` that cannot run them: the CPU flags tell.
    pub fn for_guests() -> (Self, &'static str) {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = info.split_whitespace().any(|f| f == "vmx" || f == "svm");
        match (flags, kvm_opens()) {
            (true, true) => (Self::Here, "the CPU has vmx or svm and /dev/kvm opens"),
            (true, false) => (Self::Testbed, "/dev/kvm does not open"),
            (false, _) => (Self::Testbed, "the CPU shows neither vmx nor svm"),
        }
    }
}

/// The folder with this program's profile's binaries (`target/debug`).
fn own_dir() -> Result<PathBuf> {
    Ok(std::env::current_exe()?.parent().context("no folder")?.to_owned())
}

/// The folder of release binaries.
pub fn release_dir() -> Result<PathBuf> {
    Ok(own_dir()?.parent().context("no target folder")?.join("release"))
}

/// The `testbed` program, built if need be.
pub fn testbed() -> Result<Command> {
    let built = Command::new("cargo").args(["build", "--quiet", "-p", "civic-testbed"]).status()?;
    ensure!(built.success(), "cannot build the testbed");
    Ok(Command::new(own_dir()?.join("testbed")))
}

/// Programs to run on a KVM host, with what they need in their environment:
///
/// `CIVIC_BIN_DIR` (release binaries), `CIVIC_ASSETS` (see [`assets`]), `CIVIC_ROOT_IMAGE` (the Debian image, writable,
/// discarded after) and `CIVIC_SCRATCH_IMAGE` (an empty disk, likewise).
pub struct Job<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub args: &'a [String],
    /// Whether it needs the Debian image.
    pub root_image: bool,
    /// Seconds it may take.
    pub timeout: u64,
}

impl Job<'_> {
    /// Runs it and says whether it succeeded.
    pub fn run(&self, place: Place) -> Result<bool> {
        let work = cache::dir()?.join(format!("job-{}", std::process::id()));
        cache::remove(&work)?;
        fs::create_dir_all(&work)?;
        let done = match place {
            Place::Here => self.here(&work),
            Place::Testbed => self.in_testbed(&work),
        };
        cache::remove(&work)?;
        done
    }

    fn scratch(&self, work: &Path) -> Result<PathBuf> {
        let path = work.join("scratch.img");
        File::create(&path)?.set_len(1 << 30)?;
        Ok(path)
    }

    fn here(&self, work: &Path) -> Result<bool> {
        let mut c = Command::new("timeout");
        c.arg("--foreground").arg(self.timeout.to_string()).arg(self.program).args(self.args);
        c.env("CIVIC_BIN_DIR", release_dir()?).env("CIVIC_ASSETS", assets::dir()?);
        c.env("CIVIC_SCRATCH_IMAGE", self.scratch(work)?);
        if self.root_image {
            let copy = work.join("root.img");
            let image = assets::dir()?.join("debian.img");
            let copied =
                Command::new("cp").args(["--reflink=auto", "--sparse=always"]).args([&image, &copy]).status()?;
            ensure!(copied.success(), "cannot copy the Debian image");
            c.env("CIVIC_ROOT_IMAGE", copy);
        }
        Ok(c.status()?.success())
    }

    fn in_testbed(&self, work: &Path) -> Result<bool> {
        let binaries = work.join("bin");
        fs::create_dir(&binaries)?;
        for name in ["civic", "civic-vmm", "civic-pager", "civic-jailer"] {
            let from = release_dir()?.join(name);
            if from.exists() {
                fs::copy(from, binaries.join(name))?;
            }
        }
        fs::copy(self.program, binaries.join("program"))?;
        let image = work.join("bin.img");
        pack(&binaries, &image)?;
        let script = "set -e
            mkdir /run/assets /run/bin
            mount -o ro \"$TESTBED_DISK0\" /run/assets
            mount -o ro \"$TESTBED_DISK1\" /run/bin
            export CIVIC_ASSETS=/run/assets CIVIC_BIN_DIR=/run/bin CIVIC_SCRATCH_IMAGE=$TESTBED_DISK2
            [ -z \"${TESTBED_DISK3:-}\" ] || export CIVIC_ROOT_IMAGE=$TESTBED_DISK3
            exec /run/bin/program \"$@\"";
        let mut c = testbed()?;
        let disk = |path: &Path, how: &str| format!("--disk={},{how}", path.display());
        c.arg("run").arg(format!("--timeout={}", self.timeout));
        c.args([disk(&packed_assets()?, "ro"), disk(&image, "ro"), disk(&self.scratch(work)?, "snapshot")]);
        if self.root_image {
            c.arg(disk(&assets::dir()?.join("debian.img"), "snapshot"));
        }
        c.args(["--", "sh", "-c", script, "sh"]).args(self.args);
        let mut status = c.status()?;
        if status.code() == Some(TESTBED_FAILED) {
            println!("THE TESTBED FAILED, not what ran in it: once more, from the start");
            status = c.status()?;
        }
        Ok(status.success())
    }
}

/// A file system image of a folder, with a little room.
fn pack(folder: &Path, image: &Path) -> Result<()> {
    let out = Command::new("du").args(["-sm", "--apparent-size"]).arg(folder).output()?;
    let text = String::from_utf8(out.stdout)?;
    let mib: u64 = text.split_whitespace().next().context("du says nothing")?.parse()?;
    let out = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
        .args([folder, image])
        .arg(format!("{}M", mib + mib / 10 + 16))
        .output()?;
    ensure!(out.status.success(), "mke2fs failed: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// The kernels, the initrds and the stores as one image, since folders shared with the testbed are slow.
fn packed_assets() -> Result<PathBuf> {
    let image = cache::dir()?.join("assets.img");
    let mut files = Vec::new();
    store::build()?;
    for (name, store) in store::present()? {
        let about = fs::metadata(&store)?;
        files.push((name.to_owned(), store, about.len(), about.modified()?));
    }
    for flavour in assets::flavours()? {
        // Of the others no guest is started from the larger file.
        let more: &[&str] = if FLAVOURS.contains(&flavour.as_str()) { &["vmlinux", "initrd.img"] } else { &[] };
        for name in ["vmlinuz", "version", "tiny.initrd"].iter().chain(more) {
            let path = assets::dir()?.join(&flavour).join(name);
            let Ok(about) = fs::metadata(&path) else { continue };
            files.push((format!("{flavour}/{name}"), path, about.len(), about.modified()?));
        }
    }
    make_once(&image, &format!("{files:?}"), |new| {
        let tree = new.with_extension("tree");
        cache::remove(&tree)?;
        for (name, path, ..) in &files {
            let to = tree.join(name);
            fs::create_dir_all(to.parent().context("no folder")?)?;
            fs::hard_link(path, to)?;
        }
        pack(&tree, new)?;
        cache::remove(&tree)
    })?;
    Ok(image)
}
