//! What is checked before a VM is built, because the kernel would only say it late or not at all.

use std::fs;
use std::path::Path;

use civic_api::{ByteSize, ErrorBody, ErrorCode, VmConfig};

use crate::kvm::{self, KvmError};
use crate::{doctor, failure};

/// Checks KVM and memory for `config`.
pub fn check(config: &VmConfig) -> Result<(), ErrorBody> {
    kvm::open().map_err(|e| {
        let hint = match &e {
            KvmError::Open(e) => failure::kvm_open(e),
            _ => "'civic doctor' shows what this host's KVM can do",
        };
        ErrorBody::from_error(ErrorCode::KvmUnavailable, &e).with_hint(hint)
    })?;
    if !config.any_kvm && !doctor::kvm_can_run_linux() {
        let message = "this host's KVM cannot run stock kernels: its CPU shows neither vmx nor svm";
        let hint = "use a host with hardware virtualisation (in a VM: nested virtualisation), or the testbed ('cargo xtask testbed run'); \
                    --any-kvm starts the guest all the same, for guest code that needs no more";
        return Err(ErrorBody::new(ErrorCode::KvmCannotRunLinux, message).with_hint(hint));
    }
    if !config.overcommit
        && let Some(available) = available_memory(Path::new("/"))
        && available < config.memory_bytes
    {
        let message = format!(
            "{} of guest memory, but this host has {} left",
            ByteSize(config.memory_bytes),
            ByteSize(available & !((1 << 20) - 1))
        );
        let hint = "give the VM less --memory, free some, or accept the risk with --overcommit";
        return Err(ErrorBody::new(ErrorCode::OutOfMemory, message).with_hint(hint));
    }
    Ok(())
}

/// Bytes that a new process could use: what the host has left including swap, or less where a cgroup says so. `root` is `/`, or a
/// made-up tree in tests. None where nothing tells.
pub(crate) fn available_memory(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let field = |name: &str| {
        let line = meminfo.lines().find(|line| line.split(':').next() == Some(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let host = field("MemAvailable")? + field("SwapFree").unwrap_or(0);
    Some(cgroup_room(root).map_or(host, |room| room.min(host)))
}

/// Room below the tightest `memory.max` from our cgroup up (cgroup v2).
fn cgroup_room(root: &Path) -> Option<u64> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mount = root.join("sys/fs/cgroup");
    let number = |file: &Path| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let room = |dir: &Path| {
        let max = number(&dir.join("memory.max"))?;
        Some(max.saturating_sub(number(&dir.join("memory.current")).unwrap_or(0)))
    };
    let group = mount.join(path);
    group.ancestors().take_while(|dir| dir.starts_with(&mount)).filter_map(room).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn the_tightest_cgroup_counts() {
        let meminfo = "MemTotal: 900 kB\nMemAvailable:     400 kB\nSwapFree: 100 kB\n";
        let check = |files: &[(&str, &str)], expected| {
            let mut all = vec![("proc/meminfo", meminfo)];
            all.extend(files);
            assert_eq!(available_memory(tree(&all).path()), expected);
        };
        check(&[], Some(500 << 10));
        let own = ("proc/self/cgroup", "0::/a/b\n");
        check(&[own, ("sys/fs/cgroup/a/b/memory.max", "max\n")], Some(500 << 10));
        check(
            &[
                own,
                ("sys/fs/cgroup/a/memory.max", "65536\n"),
                ("sys/fs/cgroup/a/memory.current", "4096\n"),
                ("sys/fs/cgroup/a/b/memory.max", "131072\n"),
            ],
            Some(61440),
        );
        assert_eq!(available_memory(tree(&[]).path()), None);
    }
}
