//! What becomes a command in L1: a process that builds the command's view of the world and then executes it.
//!
//! In a mount namespace of its own: this machine's root through a 9p share mounted for this run (so its cache cannot be
//! older than the run), under an overlay in memory; `/tmp`, `/run` and `/dev/shm` empty; the workspace read-write. The view
//! takes the place of the namespace's root, because in a mere chroot no user namespace could be made.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};

use crate::frame::Start;

/// Options of every 9p mount.
pub const NINE_P: &str = "trans=virtio,version=9p2000.L,msize=1048576";
/// Where the agent mounts the workspace's share.
pub const WORKSPACE: &str = "/share";
/// How long the kernel may take to show a disk that was plugged in.
const DISKS: Duration = Duration::from_secs(60);

/// Becomes the command that `file` (a JSON [`Start`]) describes, in `cgroup`. Returns only on failure.
pub fn become_command(file: &Path, cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").context("cannot enter the run's cgroup")?;
    let start: Start = serde_json::from_slice(&fs::read(file)?)?;
    fs::remove_file(file)?;
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20)?;
    setrlimit(Resource::RLIMIT_MEMLOCK, u64::MAX, u64::MAX)?;
    build_view(&start)?;
    let mut command = Command::new(&start.run.argv[0]);
    command.args(&start.run.argv[1..]).env_clear().envs(start.run.env).env("TESTBED", "1").env("PWD", &start.run.cwd);
    for (n, serial) in start.serials.iter().enumerate() {
        command.env(format!("TESTBED_DISK{n}"), find_disk(serial)?);
    }
    std::env::set_current_dir(&start.run.cwd).with_context(|| format!("cannot enter {}", start.run.cwd))?;
    let error = command.exec();
    let code = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
    eprintln!("testbed: cannot run {}: {error}", start.run.argv[0]);
    std::process::exit(code)
}

fn build_view(start: &Start) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let tmpfs = |at: &str, options: &str| {
        fs::create_dir_all(at)?;
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options))
            .with_context(|| format!("cannot mount {at}"))
    };
    tmpfs("/view", "size=70%,mode=755")?;
    for dir in ["ro", "up", "work", "new"] {
        fs::create_dir(Path::new("/view").join(dir))?;
    }
    let options = format!("{NINE_P},cache=loose");
    let end = Instant::now() + Duration::from_secs(20);
    // The share's last user may still be on its way out.
    while let Err(e) =
        mount(Some(start.root_tag.as_str()), "/view/ro", Some("9p"), MsFlags::MS_RDONLY, Some(options.as_str()))
    {
        if !matches!(e, Errno::EBUSY | Errno::ENOENT) || Instant::now() > end {
            return Err(e).context("cannot mount the root share");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let layers = "lowerdir=/view/ro,upperdir=/view/up,workdir=/view/work";
    mount(Some("overlay"), "/view/new", Some("overlay"), MsFlags::empty(), Some(layers))
        .context("cannot mount the overlay")?;
    let bind = |from: &str, to: &str| {
        let to = format!("/view/new{to}");
        fs::create_dir_all(&to)?;
        mount(Some(from), to.as_str(), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .with_context(|| format!("cannot bind {to}"))
    };
    for dir in ["/dev", "/proc", "/sys"] {
        bind(dir, dir)?;
    }
    tmpfs("/view/new/tmp", "mode=1777")?;
    tmpfs("/view/new/run", "mode=755")?;
    tmpfs("/view/new/dev/shm", "mode=1777")?;
    bind(WORKSPACE, &start.workspace)?;
    std::env::set_current_dir("/view/new")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context("cannot move the root")?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

fn find_disk(serial: &str) -> Result<String> {
    let end = Instant::now() + DISKS;
    while Instant::now() < end {
        for entry in fs::read_dir("/sys/block")?.flatten() {
            let here = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if here.trim() == serial && device.exists() {
                return Ok(device.display().to_string());
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("disk {serial} does not show up")
}
