//! A fault of the emulated host, told apart from faults of ours.
//!
//! QEMU's TCG (seen with 10.0) now and then writes the *host's* registers into a guest's VMCB when it emulates a #VMEXIT: the
//! guest then goes on at the host's own instruction behind VMRUN, with the host's stack and page table, and hangs or triple-faults. It
//! happened about once in ten boots on an emulated host with two processors, never yet (in 40) on one with one, and cannot happen on
//! hardware. The proof is an instruction pointer inside the host's `kvm_amd` module, which no guest could know: in the monitor's log,
//! where vCPUs that park say where they are, or in the kernel's trace of triple faults (the monitor sees the vCPU only after KVM
//! has reset it).
//!
//! A test that fails with this proof is run again; without it, never.

use std::cell::Cell;
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};

use super::run;

thread_local! {
    static SEEN: Cell<bool> = const { Cell::new(false) };
}

const TRACING: &str = "/sys/kernel/tracing";
/// `SVM_EXIT_SHUTDOWN` (AMD64 manual, volume 2, appendix C).
const ONLY_TRIPLE_FAULTS: &str = "exit_reason == 0x7f";

fn in_testbed() -> bool {
    std::env::var_os("TESTBED").is_some()
}

/// Lets the kernel trace triple faults of guests. Only in the testbed: elsewhere there is no emulator to blame.
pub fn arm() -> Result<()> {
    if !in_testbed() {
        return Ok(());
    }
    if !Path::new(TRACING).join("events").exists() {
        run("mount", &["-t", "tracefs", "tracefs", TRACING])?;
    }
    let event = Path::new(TRACING).join("events/kvm/kvm_exit");
    let set =
        |file: &str, value: &str| fs::write(event.join(file), value).with_context(|| format!("cannot set {file}"));
    set("filter", ONLY_TRIPLE_FAULTS)?;
    set("enable", "1")
}

/// Looks for the proof in a monitor's log and in the trace.
pub fn look(log: &str) {
    let modules = fs::read_to_string("/proc/modules").unwrap_or_default();
    let trace = fs::read_to_string(Path::new(TRACING).join("trace")).unwrap_or_default();
    let proof = |range: &Range<u64>| inside(log, "rip=0x", range) || inside(&trace, "rip 0x", range);
    if in_testbed() && module(&modules, "kvm_amd").is_some_and(|range| proof(&range)) {
        // Once told it counts for one test only.
        let _ = fs::write(Path::new(TRACING).join("trace"), "");
        SEEN.set(true);
    }
}

/// Whether the proof was seen on this thread since the last call.
pub fn seen() -> bool {
    SEEN.replace(false)
}

/// Where a module is, by `/proc/modules` (name, size, users, dependencies, state, address).
fn module(modules: &str, name: &str) -> Option<Range<u64>> {
    let line = modules.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    let mut fields = line.split_whitespace().skip(1);
    let size: u64 = fields.next()?.parse().ok()?;
    let start = u64::from_str_radix(fields.nth(3)?.strip_prefix("0x")?, 16).ok()?;
    (start != 0).then(|| start..start + size)
}

/// Whether a hexadecimal number behind `mark` lies in `range`.
fn inside(text: &str, mark: &str, range: &Range<u64>) -> bool {
    let mut pointers = text.split(mark).skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
        u64::from_str_radix(&rest[..end], 16).ok()
    });
    pointers.any(|rip| range.contains(&rip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pointer_into_the_hosts_module_is_proof() {
        let modules = "kvm 1425408 1 kvm_amd, Live 0xffffffffc0420000\nkvm_amd 245760 0 - Live 0xffffffffc05b0000\n";
        let range = module(modules, "kvm_amd").unwrap();
        assert_eq!(range, 0xffff_ffff_c05b_0000..0xffff_ffff_c05e_c000);
        assert_eq!(module("kvm_amd 245760 0 - Live 0x0000000000000000\n", "kvm_amd"), None);
        assert!(inside("x\nWARN ends vcpu=0 rip=0xffffffffc05b9c50 rsp=0x1: Reset\n", "rip=0x", &range));
        assert!(!inside("WARN ends vcpu=0 rip=0xffffffff810b9c50 rsp=0xffffffffc05b9c50: Reset\n", "rip=0x", &range));
        let trace = "kvm_exit: vcpu 0 reason shutdown rip 0xffffffffc05b9c50 info1 0x0\n";
        assert!(inside(trace, "rip 0x", &range));
        assert!(!inside("nothing", "rip=0x", &range));
    }
}
