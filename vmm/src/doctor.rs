//! What this host can and cannot do for VMs, each with the reason it matters and the way to mend it.
//!
//! Looks only: makes no directory, no network interface, and leaves nothing open. Features are tried, not derived from the
//! kernel's version.
//!
//! A check fails when VMs cannot run here, and warns when they run without something Civic offers.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use civic_api::doctor::{Check, Report, Status};
use civic_api::launch::SOCKET_FILE;
use civic_api::{ByteSize, MAX_NAME_BYTES, MIN_MEMORY_BYTES};
use civic_devices::virtio::block;
use civic_fork::{huge, support};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{AccessFlags, access};

use crate::kvm::{self, KvmError};
use crate::{failure, preflight};

/// Open files a VM with many devices needs: queues, doorbells and interrupts have a descriptor each.
const WANTED_FILES: u64 = 1024;
/// Longest path of a unix socket, without the final NUL (`sun_path`).
const MAX_SOCKET_PATH: usize = 107;

/// Whether the CPU's flags say that KVM can run stock kernels here. Some hosts offer a `/dev/kvm` that runs bare-metal guest
/// code only, and show neither `vmx` nor `svm`.
pub fn kvm_can_run_linux() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|cpuinfo| has_virtualisation(&cpuinfo))
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags =
        |line: &str| line.split_once(':').filter(|(key, _)| key.trim() == "flags").map(|(_, flags)| flags.to_owned());
    cpuinfo
        .lines()
        .find_map(flags)
        .is_some_and(|flags| flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm")))
}

/// Examines this host for VMs whose directories are to be in `run_dir`.
pub fn examine(run_dir: &Path) -> Report {
    let checks = vec![
        kernel(),
        kvm(),
        stock_kernels(kvm_can_run_linux()),
        memory(),
        guest_memory(),
        run_directory(run_dir),
        open_files(&read("/proc/self/limits")),
        io_uring(block::io_uring(), &read("/proc/sys/kernel/io_uring_disabled")),
        network(&read("/proc/self/status")),
        userfaultfd(&support::probe()),
        huge_pages(),
        cgroup(&read("/proc/self/cgroup"), &read("/sys/fs/cgroup/cgroup.controllers")),
    ];
    Report::new(env!("CARGO_PKG_VERSION"), checks)
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn ok(name: &str, why: &str, found: impl Into<String>) -> Check {
    Check { name: name.into(), status: Status::Ok, found: found.into(), why: why.into(), fix: None }
}

fn warn(name: &str, why: &str, found: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { status: Status::Warn, fix: Some(fix.into()), ..ok(name, why, found) }
}

fn fail(name: &str, why: &str, found: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { status: Status::Fail, fix: Some(fix.into()), ..ok(name, why, found) }
}

fn kernel() -> Check {
    ok(
        "kernel",
        "the versions it is known to run on are in README",
        format!("Linux {}", read("/proc/sys/kernel/osrelease")),
    )
}

fn kvm() -> Check {
    const NAME: &str = "kvm";
    const WHY: &str = "runs the guests' processors";
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(KvmError::Open(error)) => {
            let found = match error.kind() {
                ErrorKind::NotFound => "/dev/kvm does not exist".to_owned(),
                ErrorKind::PermissionDenied => "/dev/kvm may not be opened by this user".to_owned(),
                _ => format!("/dev/kvm does not open: {error}"),
            };
            return fail(NAME, WHY, found, failure::kvm_open(&error));
        }
        Err(error) => return fail(NAME, WHY, error.to_string(), "use a host with a newer or complete KVM"),
    };
    match kvm.create_vm() {
        Ok(_) => ok(NAME, WHY, "/dev/kvm opens, makes VMs and has what is needed"),
        Err(error) if error.errno() == libc::EBUSY => {
            let fix = "another hypervisor (VirtualBox, VMware) holds the processor's virtualisation: end it";
            fail(NAME, WHY, "/dev/kvm opens but is busy", fix)
        }
        Err(error) => fail(NAME, WHY, format!("/dev/kvm opens but makes no VM: {error}"), "see the host's dmesg"),
    }
}

fn stock_kernels(can: bool) -> Check {
    const NAME: &str = "stock-kernels";
    const WHY: &str = "guests are unmodified Linux";
    if can {
        return ok(NAME, WHY, "the processor shows vmx or svm");
    }
    let fix = "use a host with hardware virtualisation (in a VM: switch on nested virtualisation), or the testbed \
               (cargo xtask testbed); civic run --any-kvm tries all the same";
    fail(NAME, WHY, "the processor shows neither vmx nor svm: bare-metal guest code only", fix)
}

fn memory() -> Check {
    const NAME: &str = "memory";
    const WHY: &str = "a guest's memory must not exceed what the host and this cgroup have left";
    let mode = match read("/proc/sys/vm/overcommit_memory").as_str() {
        "2" => ", strict accounting (vm.overcommit_memory=2)",
        _ => "",
    };
    match preflight::available_memory(Path::new("/")) {
        None => warn(NAME, WHY, "/proc/meminfo says nothing", "mount /proc"),
        Some(bytes) => {
            let found = format!("{} available{mode}", ByteSize(bytes & !((1 << 20) - 1)));
            if bytes < MIN_MEMORY_BYTES {
                fail(NAME, WHY, found, "end something, or raise the cgroup's memory.max")
            } else if mode.is_empty() {
                ok(NAME, WHY, found)
            } else {
                warn(
                    NAME,
                    WHY,
                    found,
                    "sysctl vm.overcommit_memory=0, or the host may refuse guests long before it is full",
                )
            }
        }
    }
}

/// `disabled` is what the sysctl says (Linux 6.6): 1 forbids it to all but one group, 2 to everybody.
fn io_uring(tried: io::Result<()>, disabled: &str) -> Check {
    const NAME: &str = "io_uring";
    const WHY: &str = "keeps many requests of a disk in flight; without, each waits for the one before";
    let Err(error) = tried else { return ok(NAME, WHY, "works") };
    let (found, fix) = match error.kind() {
        ErrorKind::PermissionDenied if !matches!(disabled, "" | "0") => {
            (format!("forbidden (kernel.io_uring_disabled={disabled})"), "sysctl kernel.io_uring_disabled=0")
        }
        ErrorKind::PermissionDenied => {
            ("forbidden".to_owned(), "allow io_uring_setup and io_uring_enter (container's seccomp filter)")
        }
        ErrorKind::Unsupported => {
            ("missing, or older than Linux 5.6".to_owned(), "use a newer host kernel that has CONFIG_IO_URING")
        }
        ErrorKind::OutOfMemory => (format!("refused: {error}"), "raise the limit of locked memory (ulimit -l)"),
        _ => (format!("refused: {error}"), "see io_uring_setup(2)"),
    };
    warn(NAME, WHY, found, fix)
}

/// Guest memory is a memfd, and a fork gives pages of it back with a hole.
fn guest_memory() -> Check {
    const NAME: &str = "memfd";
    const WHY: &str = "guest memory is a memfd; forks and balloons punch holes in it";
    match punch_hole() {
        Ok(true) => ok(NAME, WHY, "memfd_create works and holes can be punched"),
        Ok(false) => warn(NAME, WHY, "a punched hole keeps its content", "use another kernel: forks need holes"),
        Err(error) => fail(
            NAME,
            WHY,
            format!("refused: {error}"),
            "allow memfd_create and fallocate (container's seccomp filter)",
        ),
    }
}

fn punch_hole() -> io::Result<bool> {
    let file = File::from(memfd_create(c"civic-doctor", MFdFlags::MFD_CLOEXEC)?);
    file.write_all_at(&[0xa5; 8192], 0)?;
    fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 4096)?;
    let mut bytes = [0; 8192];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes[..4096].iter().all(|&b| b == 0) && bytes[4096..].iter().all(|&b| b == 0xa5))
}

fn run_directory(run_dir: &Path) -> Check {
    const NAME: &str = "run-dir";
    const WHY: &str = "each VM has a directory there, with its lock, socket and log";
    let shown = run_dir.display();
    let fix = "choose another with --run-dir or CIVIC_RUN_DIR, or create it for this user";
    let Some(nearest) = run_dir.ancestors().find(|dir| dir.exists()) else {
        return fail(NAME, WHY, format!("{shown} cannot be made"), fix);
    };
    if !nearest.is_dir() {
        return fail(NAME, WHY, format!("{} is no directory", nearest.display()), fix);
    }
    let usable = access(nearest, AccessFlags::W_OK | AccessFlags::X_OK).is_ok();
    // access(2) knows nothing of a full or quota-bound file system: write something where that leaves no trace.
    let writable = usable && write_unnamed(nearest).is_ok();
    if !writable {
        return fail(NAME, WHY, format!("{} may not be written to", nearest.display()), fix);
    }
    let longest = run_dir.as_os_str().len() + SOCKET_FILE.len() + 2;
    let room = MAX_SOCKET_PATH.saturating_sub(longest);
    if room < MAX_NAME_BYTES {
        let found = format!("{shown} is so long that VMs' names may have {room} characters only");
        return warn(NAME, WHY, found, "choose a shorter one with --run-dir or CIVIC_RUN_DIR");
    }
    ok(NAME, WHY, format!("{shown} can be used"))
}

/// Writes a byte to a file without a name.
fn write_unnamed(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir);
    match file.and_then(|mut file| file.write_all(b"x")) {
        // A file system without unnamed files: access(2) has to do.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => Ok(()),
        result => result,
    }
}

fn open_files(limits: &str) -> Check {
    const NAME: &str = "open-files";
    const WHY: &str = "each queue, doorbell and interrupt of a VM is an open file";
    let limit = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next());
    match limit {
        Some("unlimited") => ok(NAME, WHY, "no limit"),
        Some(limit) => match limit.parse::<u64>() {
            Ok(limit) if limit < WANTED_FILES => warn(
                NAME,
                WHY,
                format!("at most {limit}"),
                format!("ulimit -n {WANTED_FILES} (or LimitNOFILE= of the service)"),
            ),
            Ok(limit) => ok(NAME, WHY, format!("at most {limit}")),
            Err(_) => warn(NAME, WHY, format!("unknown: {limit}"), "mount /proc"),
        },
        None => warn(NAME, WHY, "unknown", "mount /proc"),
    }
}

/// `CAP_NET_ADMIN` (`linux/capability.h`).
const CAP_NET_ADMIN: u32 = 12;

fn network(status: &str) -> Check {
    const NAME: &str = "network";
    const WHY: &str = "--net connects a VM to a tap interface of the host; vhost is not used";
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        let (found, fix) = match error.kind() {
            ErrorKind::NotFound => ("/dev/net/tun does not exist".to_owned(), "modprobe tun"),
            ErrorKind::PermissionDenied => {
                ("/dev/net/tun may not be opened by this user".to_owned(), "chmod 0666 /dev/net/tun")
            }
            _ => (format!("/dev/net/tun does not open: {error}"), "modprobe tun"),
        };
        return warn(NAME, WHY, found, fix);
    }
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    let caps = effective.and_then(|caps| u64::from_str_radix(caps, 16).ok()).unwrap_or(0);
    if caps & (1 << CAP_NET_ADMIN) != 0 {
        return ok(NAME, WHY, "/dev/net/tun opens, and this user may make taps");
    }
    let fix = "have root make them for this user: ip tuntap add dev tap0 mode tap user NAME && ip link set tap0 up";
    warn(NAME, WHY, "/dev/net/tun opens, but this user may use ready-made taps only (no CAP_NET_ADMIN)", fix)
}

fn userfaultfd(support: &support::Support) -> Check {
    const NAME: &str = "userfaultfd";
    const WHY: &str = "forks of a running VM share its memory page by page";
    let way = |way: &io::Result<u64>| match way {
        Ok(_) => "works".to_owned(),
        Err(error) => format!("does not ({error})"),
    };
    let ways = format!("the system call {}, /dev/userfaultfd {}", way(&support.syscall), way(&support.device));
    if support.features().is_none() {
        let fix =
            "allow this user /dev/userfaultfd (Linux 6.1), or give it CAP_SYS_PTRACE; VMs run without, forks do not";
        return warn(NAME, WHY, ways, fix);
    }
    let names = |needed| {
        let names: Vec<_> = support.missing().filter(|f| f.needed == needed).map(|f| f.name).collect();
        names.join(", ")
    };
    match (support.is_enough(), names(false)) {
        (false, _) => {
            let fix = "use a newer host kernel (Linux 6.4 has them all); VMs run without, forks do not";
            warn(NAME, WHY, format!("{ways}; lacks {}", names(true)), fix)
        }
        (true, lacks) if lacks.is_empty() => ok(NAME, WHY, format!("{ways}; has all features")),
        (true, lacks) => ok(NAME, WHY, format!("{ways}; has all that is needed, lacks {lacks}")),
    }
}

fn huge_pages() -> Check {
    huge_pages_where(huge::host_setting().as_deref(), huge::usable())
}

fn huge_pages_where(shmem: Option<&str>, usable: bool) -> Check {
    const NAME: &str = "huge-pages";
    const WHY: &str = "guests are faster in huge pages; while one is forked its memory is in small ones";
    const FIX: &str = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled; VMs run without";
    match shmem {
        None => {
            warn(NAME, WHY, "this kernel has none", "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE; VMs run without")
        }
        Some(_) if !usable => {
            let fix = "use Linux 6.7 or later, and no other size of them for shared memory; VMs run without";
            warn(NAME, WHY, "they could not be split for a fork: not used", fix)
        }
        Some(chosen @ ("never" | "deny")) => warn(NAME, WHY, format!("for shared memory '{chosen}'"), FIX),
        Some(chosen) => ok(NAME, WHY, format!("for shared memory '{chosen}'")),
    }
}

fn cgroup(own: &str, controllers: &str) -> Check {
    const NAME: &str = "cgroup";
    const WHY: &str = "limits what a VM's monitor may use of the host";
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return warn(NAME, WHY, "no cgroup v2", "boot the host with systemd.unified_cgroup_hierarchy=1");
    };
    let has = |name| controllers.split_whitespace().any(|controller| controller == name);
    if has("memory") && has("cpu") {
        ok(NAME, WHY, format!("cgroup v2, this process in {path}"))
    } else {
        let fix = "mount cgroup v2 on /sys/fs/cgroup with the cpu and memory controllers";
        warn(NAME, WHY, "cgroup v2 without the cpu and memory controllers", fix)
    }
}

#[cfg(test)]
mod tests;
