//! Whether the kernel lets this process watch page faults the way a fork needs.
//!
//! There are two ways to a userfaultfd that also serves the kernel's own faults, as KVM's are: the system call, which needs
//! `CAP_SYS_PTRACE` (or `vm.unprivileged_userfaultfd`) and which containers tend to forbid, and `/dev/userfaultfd` (Linux
//! 6.1), which needs permission on the file. Either will do, so both are tried, and the kernel is asked which features it
//! has instead of which version it is.
use std::io;

use crate::uffd::{by_device, by_syscall, handshake};

/// A feature of userfaultfd (`UFFD_FEATURE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Name in the kernel's header, without the prefix.
    pub name: &'static str,
    /// Its bit in `uffdio_api.features`.
    pub bit: u32,
    /// Whether a fork cannot do without. The rest is used where it is there.
    pub needed: bool,
}

const fn needed(name: &'static str, bit: u32) -> Feature {
    Feature { name, bit, needed: true }
}

const fn wanted(name: &'static str, bit: u32) -> Feature {
    Feature { name, bit, needed: false }
}

/// The features a fork uses, by bit.
pub const FEATURES: [Feature; 8] = [
    needed("PAGEFAULT_FLAG_WP", 0),   // The source's writes are noticed.
    needed("MISSING_SHMEM", 5),       // Holes in guest memory are noticed.
    needed("MINOR_SHMEM", 10),        // A child maps the source's own page.
    needed("WP_HUGETLBFS_SHMEM", 12), // Write protection works on a memfd.
    needed("WP_UNPOPULATED", 13),     // And on pages that are not there yet.
    wanted("POISON", 14),             // A page that is lost ends its child, not the monitor.
    wanted("WP_ASYNC", 15),           // Dirty tracking without a fault each.
    wanted("MOVE", 16),               // A page changes hands without a copy.
];

/// What the kernel offers to this process.
#[derive(Debug)]
pub struct Support {
    /// `userfaultfd(2)`: the feature bits, or why it is refused.
    pub syscall: io::Result<u64>,
    /// `/dev/userfaultfd`: likewise.
    pub device: io::Result<u64>,
}

impl Support {
    /// The kernel's feature bits, if either way is open.
    pub fn features(&self) -> Option<u64> {
        self.device.as_ref().or(self.syscall.as_ref()).ok().copied()
    }

    /// The features of [`FEATURES`] that are missing; all of them if neither way is open.
    pub fn missing(&self) -> impl Iterator<Item = Feature> {
        let features = self.features().unwrap_or(0);
        FEATURES.into_iter().filter(move |feature| features & (1 << feature.bit) == 0)
    }

    /// Whether this process can fork VMs as far as userfaultfd goes.
    pub fn is_enough(&self) -> bool {
        !self.missing().any(|feature| feature.needed)
    }
}

/// Tries both ways. Leaves nothing open.
pub fn probe() -> Support {
    // Asked for no feature, a userfaultfd lists all it has.
    let features = |fd| handshake(&fd, 0);
    Support { syscall: by_syscall().and_then(features), device: by_device().and_then(features) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_missing() {
        let all = FEATURES.iter().fold(0, |bits, feature| bits | 1 << feature.bit);
        let refused = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let full = Support { syscall: refused(), device: Ok(all) };
        assert!(full.is_enough());
        assert_eq!(full.missing().count(), 0);
        let old = Support { syscall: Ok(all & !(1 << 13) & !(1 << 16)), device: refused() };
        assert!(!old.is_enough());
        assert_eq!(old.missing().map(|feature| feature.name).collect::<Vec<_>>(), ["WP_UNPOPULATED", "MOVE"]);
        let none = Support { syscall: refused(), device: refused() };
        assert!(!none.is_enough());
        assert_eq!(none.missing().count(), FEATURES.len());
    }

    #[test]
    fn this_kernel_answers() {
        let support = probe();
        eprintln!("{support:?}, missing {:?}", support.missing().collect::<Vec<_>>());
        // Whichever way is open, it is the same kernel.
        if let (Ok(syscall), Ok(device)) = (&support.syscall, &support.device) {
            assert_eq!(syscall, device);
        }
    }
}
