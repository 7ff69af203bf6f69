//! `civic store check`: looks at a store's image without mounting it.
//!
//! e2fsprogs read it. While a VM writes to it, neither its file system nor its programs are judged: half of it is in the guest's memory.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use civic_api::ByteSize;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use serde::Serialize;

use super::programs::{self, Missing};
use super::tree::Tree;
use super::{FOLDERS, RECORD, Record, cannot_start};
use crate::table::table;
use crate::{advice, show};

/// How VMs use an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum User {
    /// One of them writes to it.
    Writer,
    /// Some read it.
    Readers,
}

/// Who has locked `image`; see the lock of disks in `civic-devices`.
pub fn user(image: &File) -> Result<Option<User>> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(image, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(match i32::from(lock.l_type) {
        libc::F_UNLCK => None,
        libc::F_RDLCK => Some(User::Readers),
        _ => Some(User::Writer),
    })
}

/// What was found.
#[derive(Serialize)]
struct Report {
    size_bytes: u64,
    free_bytes: u64,
    used_by: Option<User>,
    /// It was not unmounted, and is mended when it is mounted next.
    replays_journal: bool,
    record: Option<Record>,
    /// What its programs need and is not in it.
    missing: Vec<Missing>,
    /// What is wrong, a line each.
    problems: Vec<String>,
}

/// Checks the store `image`.
pub fn check(image: &Path, json: bool) -> Result<()> {
    let path = crate::cli::absolute(image, "IMG")?;
    let shown = image.display();
    let file =
        File::open(&path).map_err(|error| advice::error(format!("'{shown}': {error}"), "give the image of a store"))?;
    if !file.metadata()?.is_file() {
        return Err(advice::error(format!("'{shown}' is no file"), "give the image of a store"));
    }
    let used_by = user(&file)?;
    let header = said("dumpe2fs", &["-h".as_ref(), path.as_os_str()])?;
    let text = String::from_utf8_lossy(&header.stdout).into_owned();
    let Some(space) = Space::parse(&text).filter(|_| header.status.success()) else {
        let hint = "'civic store build' makes one; if it was one, 'e2fsck -f IMG' may mend it";
        return Err(advice::error(format!("'{shown}' has no ext4 file system"), hint));
    };
    let (mut problems, mut missing) = (Vec::new(), Vec::new());
    // With a journal to replay, what is on disk is not what will be mounted.
    if used_by != Some(User::Writer) && !space.replays_journal {
        let checked = said("e2fsck", &["-f".as_ref(), "-n".as_ref(), path.as_os_str()])?;
        problems.extend(verdict(checked.status.code()));
        missing = programs::missing(&Tree::read(&path)?)?;
    }
    let listed = debugfs(&path, "ls -p /")?;
    let folders: Vec<_> = FOLDERS.into_iter().filter(|name| !has_folder(&listed, name)).collect();
    if !folders.is_empty() {
        problems.push(format!("it has no folders {}, which must be there if it is read-only", folders.join(", ")));
    }
    problems.extend(missing.iter().filter(|missing| !missing.optional).map(Missing::told));
    let record = serde_json::from_str(&debugfs(&path, &format!("cat /{RECORD}"))?).ok();
    let report = Report {
        size_bytes: space.size,
        free_bytes: space.free,
        used_by,
        replays_journal: space.replays_journal,
        record,
        missing,
        problems,
    };
    if json {
        show::print_json(&report)?
    } else {
        show::print(&told(&report))?
    }
    match &report.problems[..] {
        [] => Ok(()),
        problems => Err(advice::error(
            format!("'{shown}': {}", problems.join("; ")),
            "'e2fsck -f IMG' mends a file system; a store that lacks something is to be built again, with it",
        )),
    }
}

fn told(report: &Report) -> String {
    let mut text = format!("size      {}\nfree      {}\n", ByteSize(report.size_bytes), ByteSize(report.free_bytes));
    text += match report.used_by {
        None => "in use    no\n",
        Some(User::Readers) => "in use    VMs read it\n",
        Some(User::Writer) => "in use    a VM writes to it, so neither its file system nor its programs were checked\n",
    };
    if report.replays_journal {
        text +=
            "journal   to be replayed when it is mounted next; neither its file system nor its programs were checked\n";
    }
    for problem in &report.problems {
        text += &format!("problem   {problem}\n");
    }
    for missing in report.missing.iter().filter(|missing| missing.optional) {
        text += &format!("note      {}: its package does without\n", missing.told());
    }
    match &report.record {
        None => text += "made of   unknown: it was not built by 'civic store build'\n",
        Some(record) => {
            let rows: Vec<_> = record.packages.iter().map(|(name, version)| [name.clone(), version.clone()]).collect();
            let suite = crate::table::printable(&record.suite);
            text +=
                &format!("made of   {} packages of {suite}\n\n{}", rows.len(), table(["PACKAGE", "VERSION"], &rows));
        }
    }
    text
}

/// Runs a program of e2fsprogs.
fn said(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C.UTF-8");
    command.output().map_err(|error| cannot_start(program, "e2fsprogs", &error))
}

fn debugfs(image: &Path, request: &str) -> Result<String> {
    let output = said("debugfs", &["-R".as_ref(), request.as_ref(), image.as_os_str()])?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether what `ls -p` has listed has a folder of that name: `/INODE/MODE/UID/GID/NAME/SIZE/`.
fn has_folder(listed: &str, name: &str) -> bool {
    listed.lines().any(|line| {
        let fields: Vec<_> = line.split('/').collect();
        fields.get(2).is_some_and(|mode| mode.starts_with("04")) && fields.get(5) == Some(&name)
    })
}

/// What the exit status of `e2fsck -n` means; see e2fsck(8).
fn verdict(status: Option<i32>) -> Option<String> {
    match status {
        Some(0) => None,
        Some(status) if status & 8 != 0 => Some("e2fsck cannot read its file system".into()),
        Some(status) if status & 4 != 0 => Some("its file system has errors".into()),
        Some(status) => Some(format!("e2fsck has ended with status {status}")),
        None => Some("e2fsck was killed before it was done".into()),
    }
}

/// What `dumpe2fs -h` says.
#[derive(Debug, PartialEq, Eq)]
struct Space {
    size: u64,
    free: u64,
    replays_journal: bool,
}

impl Space {
    fn parse(text: &str) -> Option<Self> {
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let number = |name| field(name)?.parse::<u64>().ok();
        let block = number("Block size")?;
        Some(Self {
            size: number("Block count")?.checked_mul(block)?,
            free: number("Free blocks")?.checked_mul(block)?,
            replays_journal: field("Filesystem features")?.split(' ').any(|feature| feature == "needs_recovery"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dumpe2fs_says() {
        let text = "Filesystem features:      has_journal needs_recovery\nBlock count:   10\nFree blocks: 3\nBlock size: 4096\n";
        assert_eq!(Space::parse(text), Some(Space { size: 40960, free: 12288, replays_journal: true }));
        assert_eq!(Space::parse("Block count: 10\n"), None);
    }

    #[test]
    fn folders() {
        let listed = "/12/120777/0/0/run/7/\n/13/040755/0/0/proc//\n";
        assert!(has_folder(listed, "proc"));
        assert!(!has_folder(listed, "run") && !has_folder(listed, "sys"));
    }

    #[test]
    fn what_e2fsck_means() {
        assert_eq!(verdict(Some(0)), None);
        assert!(verdict(Some(4)).unwrap().contains("errors"));
        assert!(verdict(Some(12)).unwrap().contains("cannot read"));
    }
}
