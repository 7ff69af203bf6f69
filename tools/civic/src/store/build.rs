//! `civic store build`: a store from the packages that the system's own apt knows.
//!
//! ```text
//!  host's apt sources ─► mmdebstrap ─► tree ─ files, setup script ─► mke2fs -d ─► image ─► OUT
//!                        in mount and process namespaces of its own     beside OUT   renamed
//! ```
//!
//! Whatever happens, nothing but OUT is left: the namespaces end with the process that made them, and with them what was
//! mounted; the folder of the tree goes when no process is left in them. mmdebstrap sees to it that no service starts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use civic_api::ByteSize;
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use super::build_hooks::{SETUP, customize, known};
use super::{FOLDERS, RECORD, Record, cannot_start, check};
use crate::cli::StoreBuildArgs;
use crate::console::Signals;
use crate::terminal::spinner;
use crate::{advice, show};

/// Lines of complaints that are kept.
const LINES: usize = 12;
/// How long what was killed may take to be gone.
const LAST: Duration = Duration::from_secs(20);
const BLOCK: u64 = 4096;
/// Room for what programs write, if no size is asked for.
const ROOM: u64 = 256 << 20;

/// What was made.
#[derive(Serialize)]
struct Report<'a> {
    image: &'a Path,
    size_bytes: u64,
    content_bytes: u64,
    packages: usize,
}

/// Builds a store.
pub async fn build(args: StoreBuildArgs) -> Result<()> {
    let plan = Plan::new(&args)?;
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let bar = spinner("beginning");
    let built = plan.build(&args, &bar, &mut signals).await;
    bar.finish_and_clear();
    let report = built?;
    match args.json {
        true => show::print_json(&report),
        false => show::print(&format!(
            "{}: {}, {} of content, {} packages\n",
            report.image.display(),
            ByteSize(report.size_bytes),
            ByteSize(report.content_bytes),
            report.packages
        )),
    }
}

struct Plan {
    out: PathBuf,
    suite: String,
    sources: Vec<PathBuf>,
    made: u64,
    files: Vec<super::build_hooks::FileSpec>,
    setup: Option<PathBuf>,
    /// Beside what it becomes. It goes with all that is in it.
    work: tempfile::TempDir,
}

impl Plan {
    /// Looks at everything that can be wrong before anything is fetched.
    fn new(args: &StoreBuildArgs) -> Result<Self> {
        let out = crate::cli::absolute(&args.image, "OUT")?;
        let shown = args.image.display();
        match fs::symlink_metadata(&out) {
            Ok(found) if !found.is_file() => {
                return Err(advice::error(format!("'{shown}' is no file"), "give a new name, or that of an image"));
            }
            Ok(_) if !args.force => {
                let hint = "give another name, or --force to have it replaced";
                return Err(advice::error(format!("'{shown}' is there already"), hint));
            }
            Ok(_) if check::user(&File::open(&out)?)?.is_some() => {
                return Err(advice::error(format!("a VM uses '{shown}'"), "end it first, or give another name"));
            }
            _ => {}
        }
        let mut files = args.files.clone();
        for file in &mut files {
            file.source = there(&file.source, "--file")?;
        }
        let setup = args.setup.as_deref().map(|path| there(path, "--setup")).transpose()?;
        if !nix::unistd::geteuid().is_root() {
            let hint = "run it as root: sudo civic store build …";
            return Err(advice::error("only root can build a store: packages' scripts run as root in it", hint));
        }
        let suite = match &args.suite {
            Some(suite) => suite.clone(),
            None => codename(&fs::read_to_string("/etc/os-release").unwrap_or_default()).ok_or_else(|| {
                advice::error("this system does not say which release it is", "give --suite, and --sources with it")
            })?,
        };
        let sources = match &args.sources[..] {
            [] => system_sources(Path::new("/etc/apt")),
            sources => sources.iter().map(|path| there(path, "--sources")).collect::<Result<_>>()?,
        };
        if sources.is_empty() {
            return Err(advice::error("apt has no sources here", "give a file with some by --sources"));
        }
        let parent = out.parent().unwrap_or(Path::new("/"));
        let work = tempfile::Builder::new().prefix(".civic-store-").tempdir_in(parent).map_err(|error| {
            let hint = "give an image in a folder that is there and can be written";
            advice::error(format!("nothing can be made in '{}': {error}", parent.display()), hint)
        })?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let epoch = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
        Ok(Self { out, suite, sources, made: epoch.unwrap_or(now), files, setup, work })
    }

    async fn build(&self, args: &StoreBuildArgs, bar: &ProgressBar, signals: &mut Signals) -> Result<Report<'_>> {
        let work = self.work.path();
        // The tree's root gets this mode, and packages' scripts that give up root must come to it.
        fs::set_permissions(work, fs::Permissions::from_mode(0o755))?;
        let tree = work.join("tree");
        let mut command = contained("mmdebstrap");
        command.args(["--mode=root", "--variant=essential", "--format=directory", "--architectures=amd64"]);
        let setup = self.setup.as_deref().map(Path::as_os_str);
        let hooks = [
            ("setup", SETUP.as_bytes().to_vec()),
            ("extract", known(&args.packages).into_bytes()),
            ("customize", customize(&self.files, setup)),
        ];
        for (name, script) in hooks {
            let path = work.join(name);
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            // It is a command line for a shell, and the folder that it is in may be called anything.
            command.arg(format!("--{name}-hook=\"$CIVIC_STORE_WORK/{name}\" \"$1\""));
        }
        let network = work.join("apt.conf");
        fs::write(&network, network_options().await)?;
        command.arg("--aptopt").arg(&network).arg(format!("--include={}", args.packages.join(",")));
        command.arg(&self.suite).arg(&tree).args(&self.sources).env("CIVIC_STORE_WORK", work);
        command.env("SOURCE_DATE_EPOCH", self.made.to_string());
        if let Err(complaints) = run(command, "mmdebstrap", bar, signals).await? {
            return Err(self.explain(&complaints));
        }
        let _ = fs::remove_file(tree.join("etc/apt/apt.conf.d/99mmdebstrap"));

        bar.set_message("making the image");
        for folder in FOLDERS {
            fs::create_dir_all(tree.join(folder))?;
        }
        let packages = installed(&fs::read_to_string(work.join("packages"))?);
        let count = packages.len();
        let requested = args.packages.clone();
        let record = Record { version: 1, suite: self.suite.clone(), made: self.made, requested, packages };
        fs::write(tree.join(RECORD), serde_json::to_string_pretty(&record)? + "\n").map_err(full)?;
        let content = measure(&tree)?;
        // Tables and the journal take some of it too.
        let least = content.bytes + content.bytes / 16 + (24 << 20);
        let size = args.size.map_or(least + content.bytes / 4 + ROOM, |size| size.0).next_multiple_of(1 << 20);
        if size < least {
            let hint = format!("give --size of {}M or more, or none", least.div_ceil(1 << 20));
            return Err(advice::error(format!("{} is too small for what is in it", ByteSize(size)), hint));
        }
        let image = work.join("image");
        File::create(&image)?.set_len(size).map_err(full)?;
        let inodes = (content.files * 2 + 16384).max(size / 16384);
        let mut command = contained("mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "civic-store", "-E", "root_owner=0:0", "-m", "0"]);
        command.args(["-N", &inodes.to_string(), "-d"]).arg(&tree).arg(&image);
        command.env("E2FSPROGS_FAKE_TIME", self.made.to_string());
        if let Err(complaints) = run(command, "mke2fs", bar, signals).await? {
            return Err(explained(&complaints, "mke2fs"));
        }
        File::open(&image)?.sync_all().map_err(full)?;
        fs::rename(&image, &self.out).with_context(|| format!("cannot make '{}'", self.out.display()))?;
        Ok(Report { image: &self.out, size_bytes: size, content_bytes: content.bytes, packages: count })
    }

    /// Why there is no tree.
    fn explain(&self, complaints: &[String]) -> anyhow::Error {
        let Ok(unknown) = fs::read_to_string(self.work.path().join("unknown")) else {
            return explained(complaints, "mmdebstrap");
        };
        let names = fs::read_to_string(self.work.path().join("names")).unwrap_or_default();
        let close: Vec<_> = unknown.lines().flat_map(|name| closest(name, names.lines())).collect();
        let hint = match &close[..] {
            [] => "see 'apt-cache search', and whether apt's sources have it".to_owned(),
            close => format!("close ones are {}", close.join(", ")),
        };
        let unknown: Vec<_> = unknown.lines().collect();
        advice::error(format!("apt knows no package {}", unknown.join(", ")), hint)
    }
}

/// A program that ends when we do, with all that it has started and mounted.
fn contained(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["--", program]).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
    // Not the terminal's group: its Ctrl-C is for us to act on.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
    command
}

/// Runs it, and shows how far it is. Fails if it cannot be run or we are interrupted; else gives its last lines if it fails.
async fn run(
    mut command: Command,
    program: &str,
    bar: &ProgressBar,
    signals: &mut Signals,
) -> Result<Result<(), Vec<String>>> {
    if !on_path(program) {
        let package = if program == "mke2fs" { "e2fsprogs" } else { program };
        return Err(cannot_start(program, package, &ErrorKind::NotFound.into()));
    }
    let mut child = command.spawn().map_err(|error| cannot_start("setpriv", "util-linux", &error))?;
    let stderr = child.stderr.take().context("a program's complaints are not heard")?;
    let mut lines = BufReader::new(stderr).split(b'\n');
    let mut last = Vec::new();
    let interrupted = loop {
        tokio::select! {
            line = lines.next_segment() => match line? {
                None => break false,
                Some(line) => {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    match line.strip_prefix("I: ") {
                        Some(stage) => bar.set_message(crate::table::printable(stage.trim_end_matches('.'))),
                        None if !line.is_empty() => last.push(crate::table::printable(&line)),
                        None => {}
                    }
                    if last.len() > LINES {
                        last.remove(0);
                    }
                }
            },
            _ = signals.next() => break true,
        }
    };
    if interrupted {
        child.start_kill()?;
        // Each process of it has the pipe: at its end all are gone, and the tree can go.
        let gone = async {
            while lines.next_segment().await?.is_some() {}
            anyhow::Ok(())
        };
        let _ = tokio::time::timeout(LAST, gone).await;
        child.wait().await?;
        return Err(advice::error("interrupted", "nothing is left of it; call it again to build the store"));
    }
    Ok(if child.wait().await?.success() { Ok(()) } else { Err(last) })
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Why `program` failed, from what it has said.
fn explained(complaints: &[String], program: &str) -> anyhow::Error {
    let has = |words: &[&str]| complaints.iter().any(|line| words.iter().any(|word| line.contains(word)));
    let hint = if has(&["No space left", "no space left", "Could not allocate", "not enough free space"]) {
        "there is no room: free some, build on another disk, or give a greater --size"
    } else if has(&[
        "Temporary failure resolving",
        "Could not resolve",
        "Could not connect",
        "Connection timed out",
        "Failed to fetch",
    ]) {
        "see that the archives in apt's sources can be reached: 'apt-get update' says so"
    } else if has(&["setup script has failed"]) {
        "mend the script: it runs in the store, with the store as its /"
    } else if has(&["Operation not permitted"]) {
        "this takes a root that may mount and make namespaces: build it outside of the container"
    } else {
        "mend that and build again"
    };
    let first: Vec<_> = complaints.iter().filter(|line| line.starts_with("E: ")).take(2).map(|l| &l[3..]).collect();
    let why = match (&first[..], complaints.last()) {
        ([], None) => format!("{program} has failed and does not say why"),
        ([], Some(last)) => format!("{program}: {last}"),
        (first, _) => format!("{program}: {}", first.join("; ")),
    };
    advice::error(why, hint)
}

fn full(error: std::io::Error) -> anyhow::Error {
    advice::error(format!("the store cannot be written: {error}"), "free some room, or build on another disk")
}

fn there(path: &Path, flag: &str) -> Result<PathBuf> {
    let path = crate::cli::absolute(path, flag)?;
    match path.metadata() {
        Ok(_) => Ok(path),
        Err(error) => {
            let hint = format!("give {flag} something that is there");
            Err(advice::error(format!("{flag}: '{}': {error}", path.display()), hint))
        }
    }
}

/// Files with sources, as apt takes them.
fn system_sources(apt: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(apt.join("sources.list.d")).into_iter().flatten().flatten().map(|entry| entry.path());
    let kinds = [Some("list".as_ref()), Some("sources".as_ref())];
    let mut files: Vec<_> = listed.filter(|path| kinds.contains(&path.extension())).collect();
    files.push(apt.join("sources.list"));
    files.sort();
    files.retain(|path| path.metadata().is_ok_and(|found| found.is_file() && found.len() > 0));
    files
}

/// What the host's apt is told of proxies and certificates. It does not become part of the store.
async fn network_options() -> String {
    let dumped = Command::new("apt-config").args(["dump", "Acquire"]).stderr(Stdio::null()).output().await;
    let text = dumped.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let kinds = ["Acquire::http", "Acquire::https", "Acquire::ftp", "Acquire::Retries"];
    let wanted =
        text.lines().filter(|line| kinds.iter().any(|kind| line.starts_with(kind)) && !line.contains(" \"\";"));
    wanted.map(|line| format!("{line}\n")).collect()
}

fn codename(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned()).filter(|name| !name.is_empty())
}

/// Names and versions from what dpkg-query has said.
fn installed(text: &str) -> BTreeMap<String, String> {
    let fields = text.lines().filter_map(|line| line.strip_prefix("ii ")?.trim_start().split_once('\t'));
    fields.map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
}

/// Up to three names that look like `name`.
fn closest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut close: Vec<_> =
        names.map(|other| (strsim::jaro_winkler(name, other), other)).filter(|(alike, _)| *alike > 0.85).collect();
    close.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    close.into_iter().take(3).map(|(_, other)| other).collect()
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Content {
    bytes: u64,
    files: u64,
}

/// What `tree` takes in blocks of a file system.
fn measure(tree: &Path) -> std::io::Result<Content> {
    let mut content = Content { bytes: BLOCK, files: 1 };
    for entry in fs::read_dir(tree)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_dir() {
            let below = measure(&entry.path())?;
            content.bytes += below.bytes;
            content.files += below.files;
        } else {
            content.bytes += meta.size().next_multiple_of(BLOCK);
            content.files += 1;
        }
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_close() {
        assert_eq!(closest("strcae", ["collectd", "strace", "tracer"].into_iter()), ["strace"]);
        assert!(closest("nothing-like-it", ["collectd"].into_iter()).is_empty());
    }

    #[test]
    fn what_dpkg_says() {
        let all = installed("ii \tlibc6:amd64\t2.36-9\nrc \told\t1\n");
        assert_eq!(all.into_iter().collect::<Vec<_>>(), [("libc6:amd64".to_owned(), "2.36-9".to_owned())]);
    }

    #[test]
    fn the_release() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=bookworm\n").as_deref(), Some("bookworm"));
        assert_eq!(codename("ID=debian\n"), None);
    }

    #[test]
    fn sources_as_apt_takes_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sources.list.d")).unwrap();
        for (name, text) in [("sources.list", ""), ("sources.list.d/a.sources", "x"), ("sources.list.d/b.off", "x")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        assert_eq!(system_sources(dir.path()), [dir.path().join("sources.list.d/a.sources")]);
    }

    #[test]
    fn failures_have_a_way_out() {
        let told = |line: &str| advice::told(&explained(&[line.to_owned()], "mmdebstrap"));
        assert!(told("E: Failed to fetch x  Could not connect to y").contains("apt-get update"));
        assert!(told("tar: x: Cannot write: No space left on device").contains("free some"));
        assert!(told("odd").starts_with("civic: mmdebstrap: odd\n"));
    }

    #[test]
    fn what_a_tree_takes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), [0; 5000]).unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        assert_eq!(measure(dir.path()).unwrap(), Content { bytes: 4 * BLOCK, files: 3 });
    }
}
