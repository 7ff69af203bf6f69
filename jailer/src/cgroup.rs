//! A control group (v2) for a jail, where limits are wanted: `Documentation/admin-guide/cgroup-v2.rst`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::jail::Limits;
use crate::{Refusal, refusal, refused};

/// Over which time a processor's share is counted, in microseconds: the kernel's own choice.
const PERIOD: u64 = 100_000;

const NO_V2: &str = "boot the host with systemd.unified_cgroup_hierarchy=1, or leave the limits out";

/// A group of a jail's own. Removed on drop, which needs its processes to have ended.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

/// Where the v2 hierarchy is mounted, by `/proc/self/mounts`.
pub fn mounted(mounts: &str) -> Option<PathBuf> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.into_iter().find(|fields| fields.get(2) == Some(&"cgroup2")).and_then(|fields| Some(fields.get(1)?.into()))
}

/// What is written to which file of the group, and the controllers that this needs. `disks` are block devices, as `major:minor`.
fn settings(limits: &Limits, disks: &[String]) -> Vec<(&'static str, &'static str, String)> {
    let mut all = Vec::new();
    if let Some(bytes) = limits.memory {
        all.push(("memory", "memory.max", bytes.to_string()));
        // What does not fit is not to be had from swap instead.
        all.push(("memory", "memory.swap.max", "0".into()));
    }
    if let Some(percent) = limits.cpu_percent {
        all.push(("cpu", "cpu.max", format!("{} {PERIOD}", u64::from(percent) * PERIOD / 100)));
    }
    if let Some(threads) = limits.threads {
        all.push(("pids", "pids.max", threads.to_string()));
    }
    if limits.io_bps.is_some() || limits.io_iops.is_some() {
        let rate = |n: Option<u64>| n.map_or("max".into(), |n| n.to_string());
        let (bps, iops) = (rate(limits.io_bps), rate(limits.io_iops));
        for disk in disks {
            all.push(("io", "io.max", format!("{disk} rbps={bps} wbps={bps} riops={iops} wiops={iops}")));
        }
    }
    all
}

impl Group {
    /// Makes the group `parent/name` below `root`, the hierarchy's mount point, with these limits.
    ///
    /// # Errors
    /// When the host has no such hierarchy or controller.
    pub fn new(root: &Path, parent: &Path, name: &str, limits: &Limits, disks: &[String]) -> Result<Self, Refusal> {
        let settings = settings(limits, disks);
        let outer = root.join(parent);
        fs::create_dir_all(&outer).map_err(|e| refusal(format!("cannot make {}", outer.display()), e, NO_V2))?;
        // From the top down: a group has the controllers that the one above hands on.
        let below: Vec<_> = outer.ancestors().take_while(|dir| dir.starts_with(root)).collect();
        for dir in below.into_iter().rev() {
            let offered = fs::read_to_string(dir.join("cgroup.controllers"))
                .map_err(|e| refusal(format!("{} is no control group of version 2", dir.display()), e, NO_V2))?;
            for (controller, ..) in &settings {
                if !offered.split_whitespace().any(|offered| offered == *controller) {
                    let what = format!("the control group {} has no '{controller}' controller", dir.display());
                    let hint = format!(
                        "take it from the version 1 hierarchy (boot with cgroup_no_v1={controller}), or leave that limit out"
                    );
                    return Err(refused(what, hint));
                }
                write(&dir.join("cgroup.subtree_control"), &format!("+{controller}"))?;
            }
        }
        let path = outer.join(name);
        fs::create_dir(&path).map_err(|e| refusal(format!("cannot make {}", path.display()), e, NO_V2))?;
        let group = Self { path };
        for (_, file, value) in settings {
            // Where a kernel has no swap there is nothing to limit.
            let file = group.path.join(file);
            if file.ends_with("memory.swap.max") && !file.exists() {
                continue;
            }
            write(&file, &value)?;
        }
        Ok(group)
    }

    /// Moves a process there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add(&self, pid: i32) -> Result<(), Refusal> {
        write(&self.path.join("cgroup.procs"), &pid.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir(&self.path) {
            eprintln!("civic-jailer: cannot remove {}: {e}", self.path.display());
        }
    }
}

fn write(file: &Path, value: &str) -> Result<(), Refusal> {
    fs::write(file, value).map_err(|e| {
        let what = format!("cannot write '{value}' to {}", file.display());
        refusal(what, e, "see whether somebody else manages that group; name another with --cgroup")
    })
}

/// The block devices that files with these device numbers are on, as `major:minor`, for a sysfs at `sys`. A partition counts as the whole.
pub fn whole_disks(sys: &Path, devices: &[u64]) -> Vec<String> {
    let mut disks: Vec<_> = devices
        .iter()
        .filter_map(|device| {
            let (major, minor) = (libc::major(*device), libc::minor(*device));
            let dir = fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()?;
            let whole = if dir.join("partition").exists() { dir.parent()?.to_owned() } else { dir };
            Some(fs::read_to_string(whole.join("dev")).ok()?.trim().to_owned())
        })
        .collect();
    disks.sort();
    disks.dedup();
    disks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(controllers: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for group in ["", "civic"] {
            fs::create_dir_all(dir.path().join(group)).unwrap();
            fs::write(dir.path().join(group).join("cgroup.controllers"), controllers).unwrap();
        }
        dir
    }

    #[test]
    fn limits_are_written_where_the_kernel_wants_them() {
        let limits = Limits {
            memory: Some(1 << 30),
            cpu_percent: Some(150),
            threads: Some(99),
            io_bps: Some(1000),
            io_iops: None,
        };
        let root = hierarchy("cpu memory pids io\n");
        let group = Group::new(root.path(), Path::new("civic"), "web", &limits, &["8:0".into()]).unwrap();
        let read = |file: &str| fs::read_to_string(group.path.join(file)).unwrap();
        assert_eq!(read("memory.max"), (1u64 << 30).to_string());
        assert_eq!(read("cpu.max"), "150000 100000");
        assert_eq!(read("pids.max"), "99");
        assert_eq!(read("io.max"), "8:0 rbps=1000 wbps=1000 riops=max wiops=max");
        group.add(42).unwrap();
        assert_eq!(read("cgroup.procs"), "42");
        // A made-up group has files where the kernel's has none that keep it.
        for entry in fs::read_dir(&group.path).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let path = group.path.clone();
        drop(group);
        assert!(!path.exists());
    }

    #[test]
    fn a_host_without_a_controller_says_which() {
        let limits = Limits { memory: Some(1 << 30), ..Limits::default() };
        let root = hierarchy("hugetlb\n");
        let refused = Group::new(root.path(), Path::new("civic"), "web", &limits, &[]).unwrap_err();
        assert!(refused.message.contains("'memory'") && refused.hint.unwrap().contains("cgroup_no_v1=memory"));
        let none = tempfile::tempdir().unwrap();
        assert!(Group::new(none.path(), Path::new("civic"), "web", &limits, &[]).is_err());
    }

    #[test]
    fn the_hierarchy_is_found_among_others() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\nnone /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mounted(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn a_partition_counts_as_its_disk() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("devices/sda");
        fs::create_dir_all(disk.join("sda1")).unwrap();
        fs::write(disk.join("dev"), "8:0\n").unwrap();
        fs::write(disk.join("sda1/dev"), "8:1\n").unwrap();
        fs::write(disk.join("sda1/partition"), "1\n").unwrap();
        fs::create_dir_all(sys.path().join("dev/block")).unwrap();
        for (name, to) in [("8:0", "../../devices/sda"), ("8:1", "../../devices/sda/sda1")] {
            std::os::unix::fs::symlink(to, sys.path().join("dev/block").join(name)).unwrap();
        }
        let devices = [libc::makedev(8, 1), libc::makedev(8, 0), libc::makedev(0, 5)];
        assert_eq!(whole_disks(sys.path(), &devices), ["8:0"]);
    }
}
