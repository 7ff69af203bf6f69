//! How long a guest stood still, seen from outside by the same means for every monitor: the longest time in which none of a process's
//! vCPUs was in `KVM_RUN`, by the host kernel's tracepoints (`Documentation/trace/events.rst`).
//!
//! A vCPU's thread leaves with `kvm:kvm_userspace_exit` and comes back with `ioctl(KVM_RUN)`. Exits to user space that a running guest
//! needs are short, and of one vCPU; a pause takes all of them out for as long as it lasts, those that sleep in `hlt` too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const TRACING: &str = "/sys/kernel/tracing";
/// A vCPU's way out, and its way in.
const EVENTS: [&str; 2] = ["kvm/kvm_userspace_exit", "syscalls/sys_enter_ioctl"];
/// `KVM_RUN`, as the filter of the second.
const KVM_RUN: &str = "cmd == 0xae80";
const BUFFER_KIB: &str = "8192";

/// A trace of this bench's own; gone when dropped.
pub struct Tracer(PathBuf);

impl Tracer {
    /// Fails where the kernel has no such tracepoints, or they are not for this user.
    pub fn new() -> Result<Self> {
        let dir = Path::new(TRACING).join(format!("instances/civic-bench-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot trace: {}", dir.display()))?;
        let this = Self(dir);
        this.write("tracing_on", "0")?;
        this.write("trace_clock", "mono")?;
        this.write("buffer_size_kb", BUFFER_KIB)?;
        this.write(&format!("events/{}/filter", EVENTS[1]), KVM_RUN)?;
        for event in EVENTS {
            this.write(&format!("events/{event}/enable"), "1")?;
        }
        Ok(this)
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value:?} to {}", path.display()))
    }

    /// Forgets what was, and records from now on.
    pub fn begin(&self) -> Result<()> {
        self.write("trace", "")?;
        self.write("tracing_on", "1")
    }

    /// Records no more.
    pub fn end(&self) -> Result<()> {
        self.write("tracing_on", "0")
    }

    /// The longest stillness of a process's guest in what was recorded, in milliseconds.
    pub fn longest(&self, pid: u32) -> Result<f64> {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).context("the monitor is gone")?;
        let threads: Vec<u32> = threads.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok()).collect();
        let trace = fs::read_to_string(self.0.join("trace"))?;
        let lost = trace.lines().any(|line| line.starts_with("CPU:") && line.contains("LOST"));
        ensure!(!lost, "the kernel lost events of the trace: {BUFFER_KIB} KiB are too few");
        longest(&trace, &threads).with_context(|| format!("the trace shows no pause of process {pid}"))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// In milliseconds. Of these threads those are vCPUs that the trace names.
fn longest(trace: &str, threads: &[u32]) -> Option<f64> {
    let events: Vec<_> = trace.lines().filter_map(step).filter(|step| threads.contains(&step.thread)).collect();
    // Where each is before its first step: that says whence it came.
    let mut inside: BTreeMap<u32, bool> = BTreeMap::new();
    for step in &events {
        inside.entry(step.thread).or_insert(!step.enters);
    }
    let mut still_since = None;
    let mut longest: Option<f64> = None;
    for step in &events {
        inside.insert(step.thread, step.enters);
        if step.enters {
            if let Some(since) = still_since.take() {
                longest = Some(longest.unwrap_or(0.0).max(step.at - since));
            }
        } else if inside.values().all(|inside| !inside) {
            still_since = Some(step.at);
        }
    }
    longest.map(|seconds| seconds * 1e3)
}

/// A vCPU's step into `KVM_RUN` or out of it.
struct Step {
    thread: u32,
    at: f64,
    enters: bool,
}

/// `COMM-THREAD [CPU] FLAGS SECONDS: EVENT…`; the name may have spaces and hyphens in it.
fn step(line: &str) -> Option<Step> {
    let (who, rest) = line.split_once(" [")?;
    let (_, rest) = rest.split_once("] ")?;
    let (when, what) = rest.split_once(": ")?;
    let thread = who.trim_end().rsplit('-').next()?.parse().ok()?;
    let at = when.split_whitespace().next_back()?.parse().ok()?;
    let enters = match what {
        _ if what.starts_with("kvm_userspace_exit") => false,
        _ if what.starts_with("sys_ioctl") || what.starts_with("sys_enter_ioctl") => true,
        _ => return None,
    };
    Some(Step { thread, at, enters })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "# tracer: nop\n#\n\
        \x20      CPU 0/KVM-101   [000] .....   10.000000: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n\
        \x20      CPU 0/KVM-101   [000] .....   10.500000: sys_ioctl(fd: d, cmd: ae80, arg: 0)\n\
        \x20          vcpu0-7     [000] .....   10.600000: kvm_userspace_exit: reason KVM_EXIT_INTR (10)\n\
        \x20      CPU 1/KVM-102   [000] d..2.   11.000000: kvm_userspace_exit: reason KVM_EXIT_INTR (10)\n\
        \x20      CPU 0/KVM-101   [000] .....   11.010000: kvm_userspace_exit: reason KVM_EXIT_INTR (10)\n\
        \x20      CPU 1/KVM-102   [000] .....   11.030000: sys_ioctl(fd: e, cmd: ae80, arg: 0)\n\
        \x20      CPU 0/KVM-101   [000] .....   11.040000: sys_ioctl(fd: d, cmd: ae80, arg: 0)\n";

    #[test]
    fn still_is_when_all_are_out() {
        // One vCPU's long exit is no pause while the other runs; another process's is none of this one's.
        let ms = longest(TRACE, &[101, 102, 103]).unwrap();
        assert!((ms - 20.0).abs() < 1e-6, "{ms}");
        assert_eq!(longest(TRACE, &[7]), None, "it has not come back");
        assert_eq!(longest(TRACE, &[103]), None);
    }
}
