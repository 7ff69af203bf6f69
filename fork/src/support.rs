//! Whether the kernel lets this process watch page faults the way a fork needs.
//!
//! There are two ways to a userfaultfd that also serves the kernel's own faults, as KVM's are: the system call, which needs
//! `CAP_SYS_PTRACE` (or `vm.unprivileged_userfaultfd`) and which containers tend to forbid, and `/dev/userfaultfd` (Linux
//! 6.1), which needs permission on the file. Either will do, so both are tried, and the kernel is asked which features it
//! has instead of which version it is.
//!
//! `userfaultfd(2)`, `ioctl_userfaultfd(2)`, `include/uapi/linux/userfaultfd.h`. The `userfaultfd` crate takes whichever way
//! it finds first and keeps the feature bits to itself, hence the two ioctls here.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

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
    Support { syscall: by_syscall().and_then(|fd| features(&fd)), device: by_device().and_then(|fd| features(&fd)) }
}

/// Not `UFFD_USER_MODE_ONLY`: KVM faults in kernel mode.
const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

const UFFD_API: u64 = 0xaa;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);

mod ioctl {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)] // nix's macros write the functions.

    nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, super::UffdioApi);
    nix::ioctl_write_int_bad!(userfaultfd_ioc_new, nix::request_code_none!(0xaa, 0x00));
}

fn by_syscall() -> io::Result<OwnedFd> {
    // SAFETY: the call takes its one argument by value and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just returned this descriptor, so it is open and nobody else's; a descriptor fits an i32.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn by_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the descriptor is open for the call's duration; this ioctl takes its argument by value and touches no memory.
    let fd = unsafe { ioctl::userfaultfd_ioc_new(device.as_raw_fd(), FLAGS) }?;
    // SAFETY: the kernel has just returned this descriptor, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks a fresh userfaultfd for all features it has (asking for none gets the whole list).
fn features(uffd: &OwnedFd) -> io::Result<u64> {
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the descriptor is open, and `api` is a live `struct uffdio_api` that only this call uses.
    unsafe { ioctl::uffdio_api(uffd.as_raw_fd(), &mut api) }?;
    Ok(api.features)
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
