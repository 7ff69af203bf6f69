//! A fault of the emulated host, told apart from faults of ours.
//!
//! QEMU's TCG (seen with 10.0) now and then writes the *host's* registers into a guest's VMCB when it emulates a #VMEXIT: the
//! guest then goes on at the host's own instruction behind VMRUN, with the host's stack and page table, and hangs or triple-faults. It
//! happened about once in ten boots of an uncompressed kernel on 4 KiB pages and cannot happen on hardware. The proof is in the
//! monitor's log: an instruction pointer inside the host's `kvm_amd` module, which no guest could know.
//!
//! A test that fails with this proof is run again; without it, never.

use std::cell::Cell;
use std::fs;
use std::ops::Range;

thread_local! {
    static SEEN: Cell<bool> = const { Cell::new(false) };
}

/// Looks for the proof in a monitor's log. Only in the testbed: elsewhere there is no emulator to blame.
pub fn look(log: &str) {
    let modules = fs::read_to_string("/proc/modules").unwrap_or_default();
    if std::env::var_os("TESTBED").is_some() && module(&modules, "kvm_amd").is_some_and(|range| inside(log, &range)) {
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

fn inside(log: &str, range: &Range<u64>) -> bool {
    let mut pointers = log.split("rip=0x").skip(1).filter_map(|rest| {
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
        assert!(inside("x\nWARN ends vcpu=0 rip=0xffffffffc05b9c50 rsp=0x1: Reset\n", &range));
        assert!(!inside("WARN ends vcpu=0 rip=0xffffffff810b9c50 rsp=0xffffffffc05b9c50: Reset\n", &range));
        assert!(!inside("nothing", &range));
    }
}
