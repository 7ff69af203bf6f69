//! Jails of real processes: this test itself is what is jailed, and looks around. Needs root, as the jailer does.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recvmsg,
    socket,
};
use nix::unistd::Pid;

const USERS: &str = "310000-310063";

/// The jailer, with `options`, for the test `inside` of this program.
fn jailer(state: &Path, options: &[&str], inside: &str) -> Command {
    assert!(nix::unistd::geteuid().is_root(), "jails can only be made by root: run these tests as root");
    let mut command = Command::new(env!("CARGO_BIN_EXE_civic-jailer"));
    command.args(["--users", USERS, "--state"]).arg(state).args(options).arg("--");
    command.arg(std::env::current_exe().unwrap()).args(["--exact", inside, "--nocapture"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn succeeds(output: Output) {
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // One that looked at nothing has proved nothing.
    assert!(output.status.success() && text.contains("looked around"), "{}\n{text}", output.status);
}

fn is_jailed() -> bool {
    std::env::var_os("CIVIC_PID").is_some()
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}")).trim().to_owned()
}

#[test]
fn nothing_is_there_but_what_was_named() {
    if is_jailed() {
        return look_around();
    }
    let (state, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    // Root's alone, on the host.
    for name in ["read", "write"] {
        fs::write(path(name), "root's").unwrap();
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    let (read, write, own, scratch) = (path("read"), path("write"), path("vm"), path("scratch"));
    fs::create_dir(&scratch).unwrap();
    let options = ["--read", &read, "--write", &write, "--dir", &own, "--scratch", &scratch, "--device", "/dev/kvm"];
    let mut command = jailer(state.path(), &options, "nothing_is_there_but_what_was_named");
    command.env("CIVIC_TEST_DIR", dir.path()).env("SECRET", "x");
    // What is not the program's it does not inherit.
    let stray = File::open("/etc/passwd").unwrap();
    nix::fcntl::fcntl(&stray, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    succeeds(command.output().unwrap());
    assert_eq!(fs::read_to_string(&write).unwrap(), "jailed");
    assert_eq!((fs::metadata(&write).unwrap().uid(), fs::metadata(&read).unwrap().uid()), (0, 0));
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0, "what is put in a scratch folder is gone with the jail");
    assert_eq!(fs::read_to_string(dir.path().join("vm/mine")).unwrap(), "kept");
}

fn look_around() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let user = field(&status, "Uid").split_whitespace().next().unwrap().parse::<u32>().unwrap();
    assert!((310_000..=310_063).contains(&user), "{user}");
    assert_eq!(field(&status, "Uid").split_whitespace().collect::<BTreeSet<_>>().len(), 1);
    assert_eq!(field(&status, "Gid").split_whitespace().collect::<BTreeSet<_>>().len(), 1);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(std::process::id(), 1);
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    assert_eq!(processes.filter(|name| name.parse::<u32>().is_ok()).collect::<Vec<_>>(), ["1"]);
    let fds: BTreeSet<_> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|fd| fs::read_link(fd.unwrap().path()).unwrap_or_default())
        .collect();
    assert!(!fds.iter().any(|fd| fd.ends_with("passwd")), "{fds:?}");
    assert_eq!(std::env::var_os("SECRET"), None);
    assert_eq!(nix::unistd::gethostname().unwrap(), "civic");
    let links = fs::read_to_string("/proc/net/dev").unwrap();
    assert_eq!(links.lines().skip(2).map(|line| line.trim().split(':').next().unwrap()).collect::<Vec<_>>(), ["lo"]);

    let dir = std::path::PathBuf::from(std::env::var_os("CIVIC_TEST_DIR").unwrap());
    assert_eq!(fs::read_to_string(dir.join("read")).unwrap(), "root's");
    assert_eq!(fs::write(dir.join("read"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    fs::write(dir.join("write"), "jailed").unwrap();
    fs::write(dir.join("vm/mine"), "kept").unwrap();
    fs::write(dir.join("scratch/x"), "gone").unwrap();
    for absent in ["/etc", "/home", "/root", "/tmp/x", "/dev/mem", "/sys/class", "/run/civic-jail"] {
        assert!(!Path::new(absent).exists(), "{absent}");
    }
    for folder in ["/", "/dev", "/proc"] {
        assert!(File::create(Path::new(folder).join("x")).is_err(), "{folder}");
    }
    File::options().read(true).write(true).open("/dev/kvm").unwrap();
    assert!(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err());
    assert!(nix::unistd::setuid(nix::unistd::Uid::from_raw(0)).is_err());
    assert_eq!(kill(Pid::from_raw(-1), None).unwrap_err(), nix::errno::Errno::ESRCH, "there is nobody to signal");
    println!("looked around");
}

#[test]
fn two_jails_have_two_users_and_a_leash_ends_one() {
    if is_jailed() {
        // The first word on the connection was the jailer's; this is what the test waits for.
        nix::sys::socket::send(3, b"here", MsgFlags::empty()).unwrap();
        loop {
            std::thread::park();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("fork.sock");
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&at).unwrap()).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    let start = || {
        let options = ["--introduce", at.to_str().unwrap(), "--role", "child web-1"];
        let jailer = jailer(dir.path(), &options, "two_jails_have_two_users_and_a_leash_ends_one").spawn().unwrap();
        let wire = accepted(&listener);
        let (text, mut fds) = heard(&wire);
        let words: Vec<_> = text.split(' ').collect();
        let ["civic-jail", "1", pid, "child", "web-1"] = words[..] else { panic!("{text}") };
        let pid: i32 = pid.parse().unwrap();
        let (leash, pidfd) = (fds.pop().unwrap(), fds.pop().unwrap());
        assert_eq!(heard(&wire).0, "here");
        let user = fs::metadata(format!("/proc/{pid}")).unwrap().uid();
        (jailer, pidfd, leash, user, wire)
    };
    let ((mut first, first_fd, leash, user, _wire), (mut second, second_fd, _leash, other, _wire2)) =
        (start(), start());
    assert_ne!(user, other);
    nix::unistd::write(&leash, b"x").unwrap();
    assert!(ended(&first_fd, 10) && !ended(&second_fd, 0));
    assert_eq!(first.wait().unwrap().code(), Some(128 + Signal::SIGKILL as i32));
    // However a guardian ends, what it guards does too.
    second.kill().unwrap();
    second.wait().unwrap();
    assert!(ended(&second_fd, 10));
}

fn accepted(listener: &OwnedFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let fd = accept(listener.as_raw_fd()).unwrap();
    // SAFETY: the kernel has just made this descriptor for us; it is nobody else's.
    #[allow(unsafe_code)]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

fn heard(wire: &OwnedFd) -> (String, Vec<OwnedFd>) {
    use std::os::fd::FromRawFd;
    let (mut bytes, mut rights) = ([0; 256], nix::cmsg_space!([i32; 4]));
    let mut buffer = [std::io::IoSliceMut::new(&mut bytes)];
    let received = recvmsg::<()>(wire.as_raw_fd(), &mut buffer, Some(&mut rights), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let mut fds = Vec::new();
    for message in received.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us; they are nobody else's.
            #[allow(unsafe_code)]
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let len = received.bytes;
    (String::from_utf8(bytes[..len].to_vec()).unwrap(), fds)
}

fn ended(pidfd: &OwnedFd, seconds: u16) -> bool {
    poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(seconds * 1000)).unwrap() > 0
}

#[test]
fn what_cannot_be_is_told_as_a_monitor_would() {
    let state = tempfile::tempdir().unwrap();
    let refused = |options: &[&str]| {
        let output = jailer(state.path(), options, "none").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let line: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(line["error"]["hint"].is_string(), "{line}");
        line["error"]["message"].as_str().unwrap().to_owned()
    };
    assert!(refused(&["--net", "/run/netns/absent"]).contains("/run/netns/absent"));
    assert!(refused(&["--introduce", "/absent/fork.sock", "--role", "pager"]).contains("nobody can be forked"));
    assert!(refused(&["--read", "/proc/1"]).contains("/proc/1"));
    let dir = tempfile::tempdir().unwrap();
    let lock = File::create(dir.path().join("lock")).unwrap();
    let _held = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e).unwrap();
    assert!(refused(&["--dir", dir.path().to_str().unwrap()]).contains("is running"));
}

#[test]
fn a_status_comes_through_and_nothing_stays() {
    if is_jailed() {
        std::io::stdout().write_all(b"looked around\n").unwrap();
        std::process::exit(7);
    }
    let (state, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let own = dir.path().join("web");
    let options = ["--dir", own.to_str().unwrap()];
    let started = Instant::now();
    let mut child = jailer(state.path(), &options, "a_status_comes_through_and_nothing_stays").spawn().unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("looked around"));
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(!own.exists(), "an empty folder goes with its VM");
    assert!(started.elapsed() < Duration::from_secs(10));
}
