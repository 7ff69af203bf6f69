//! Userfaultfd: the kernel asks this process for a page before it lets an access to it through.
//!
//! ```text
//! vCPU, device thread ── touches a page that is not there ──▶ sleeps in the kernel
//! whoever reads the userfaultfd  ◀── "fault at address" ──┘
//!                                ── UFFDIO_COPY, UFFDIO_ZEROPAGE ──▶ page is there, sleeper woken
//! ```
//!
//! Invariants:
//! * A userfaultfd of ours also answers for faults in the kernel (KVM's are), so it is never `UFFD_USER_MODE_ONLY`.
//! * The thread that answers never touches guest memory through a mapping itself: it would wait for its own answer.
//! * Closing the descriptor lets every sleeper go on, with a zero page. So whoever closes it first makes sure that this is
//!   what they may see.
//!
//! `userfaultfd(2)`, `ioctl_userfaultfd(2)`, `include/uapi/linux/userfaultfd.h`. The `userfaultfd` crate makes the calls. It
//! gives up where `/dev/userfaultfd` exists but is not for us, without trying the system call, and keeps the feature bits to
//! itself: hence the two ioctls here.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
pub use userfaultfd::FaultKind;
pub use userfaultfd::FeatureFlags;
use userfaultfd::{Error, Uffd};
pub(crate) use userfaultfd::{IoctlFlags, RegisterMode};
use vm_memory::VolatileSlice;

use crate::ram::{Hva, Mapping, Mappings, PAGE};

/// What went wrong with a userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither way to one is open.
    #[error(
        "this process may not watch page faults (/dev/userfaultfd: {device}; userfaultfd(2): {syscall}): give its user \
         read and write permission on /dev/userfaultfd, or CAP_SYS_PTRACE"
    )]
    Refused {
        /// What `/dev/userfaultfd` said.
        device: io::Error,
        /// What the system call said.
        syscall: io::Error,
    },
    /// The kernel lacks a feature.
    #[error("this host's kernel lacks features of userfaultfd ({missing:?}): a newer kernel has them")]
    Lacks {
        /// Those it lacks.
        missing: FeatureFlags,
    },
    /// The kernel has the feature, but not for this memory.
    #[error("the memory at {:#x} cannot be filled page by page: only memfds of 4 KiB pages can", address.0)]
    Unfillable {
        /// Where it is mapped.
        address: Hva,
    },
    /// A call that has no reason to fail did.
    #[error("{call} failed")]
    Call {
        /// Its name.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel tells of something that was not asked for.
    #[error("unexpected event on a userfaultfd: {event}")]
    Unexpected {
        /// The event, for the log.
        event: String,
    },
}

impl UffdError {
    /// Whether the process that the memory was of is no more.
    pub fn is_gone(&self) -> bool {
        self.is(libc::ESRCH)
    }

    /// Whether the memory is not registered.
    pub fn is_unwatched(&self) -> bool {
        self.is(libc::ENOENT)
    }

    fn is(&self, errno: i32) -> bool {
        matches!(self, Self::Call { source, .. } if source.raw_os_error() == Some(errno))
    }
}

/// An access that waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    /// Of the page, in the memfd.
    pub offset: u64,
    /// What it waits for.
    pub kind: FaultKind,
}

/// Bytes of a `struct uffd_msg`: its event first, a fault's flags and address at 8 and 16.
const MESSAGE: usize = 32;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

fn word(message: &[u8; MESSAGE], at: usize) -> u64 {
    message[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// Room for what a userfaultfd tells.
#[derive(Debug)]
pub(crate) struct EventBuffer(Vec<u8>);

impl EventBuffer {
    /// For so many events.
    pub(crate) fn new(events: usize) -> Self {
        Self(vec![0; events * MESSAGE])
    }
}

/// How often a call is tried again that Linux ends because the address space was changing. Each time something else has got on; one
/// that never ends is another process's doing.
const TRIES: u32 = 1000;

/// An open userfaultfd. Closed on drop.
#[derive(Debug)]
pub struct Userfault(Uffd);

impl Userfault {
    /// Opens one with `features`, by whichever way is open to this process.
    pub fn open(features: FeatureFlags) -> Result<Self, UffdError> {
        let uffd = any_way()?;
        match handshake(&uffd, features.bits()) {
            // SAFETY: the descriptor is a userfaultfd, open, and given up here by its only owner.
            Ok(_) => Ok(Self(unsafe { Uffd::from_raw_fd(uffd.into_raw_fd()) })),
            // A feature it does not know. A userfaultfd shakes hands only once, so a second one is asked which.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                let known = handshake(&any_way()?, 0).map_err(failed("UFFDIO_API"))?;
                Err(UffdError::Lacks { missing: features.difference(FeatureFlags::from_bits_retain(known)) })
            }
            Err(e) => Err(failed("UFFDIO_API")(e)),
        }
    }

    /// Takes one that another process opened, for the memory of that process.
    ///
    /// # Errors
    /// When it is none, or one that has a reader wait.
    pub fn of_another(fd: OwnedFd) -> Result<Self, UffdError> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(failed("readlink"))?;
        if kind.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(UffdError::Unexpected { event: format!("{} in place of a userfaultfd", kind.display()) });
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|e| failed("fcntl")(e.into()))?;
        if flags & libc::O_NONBLOCK == 0 {
            return Err(UffdError::Unexpected { event: "a userfaultfd that has its reader wait".into() });
        }
        // SAFETY: the descriptor is a userfaultfd, open, and given up here by its only owner.
        Ok(Self(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) }))
    }

    /// Another descriptor of the same.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// From now on a first access to a page that is not in the memfd waits for an answer.
    ///
    /// The page cache decides, not the mapping's page table: a page that came into the memfd by any way, be it `write(2)` or
    /// another mapping, is there. And only accesses through these mappings wait.
    pub(crate) fn register_missing(&self, mappings: &Mappings) -> Result<(), UffdError> {
        self.register(mappings, RegisterMode::MISSING, IoctlFlags::COPY | IoctlFlags::ZEROPAGE | IoctlFlags::WAKE)
    }

    /// From now on the kinds of access that `mode` names wait for an answer. The kernel must offer the calls `needs`.
    pub(crate) fn register(&self, mappings: &Mappings, mode: RegisterMode, needs: IoctlFlags) -> Result<(), UffdError> {
        for &Mapping { start, len, .. } in mappings.iter() {
            let can = self.0.register_with_mode(start.0 as _, len as usize, mode);
            let can = can.map_err(|e| failed("UFFDIO_REGISTER")(io_error(e)))?;
            if !can.contains(needs) {
                return Err(UffdError::Unfillable { address: start });
            }
        }
        Ok(())
    }

    /// Accesses wait no more, and those that do are let through; write protection goes.
    pub(crate) fn unregister(&self, mappings: &Mappings) -> Result<(), UffdError> {
        self.unregister_part(mappings, 0, mappings.bytes())
    }

    /// The same, for a part of the memory: the rest of the process is kept waiting for less long.
    pub(crate) fn unregister_part(&self, mappings: &Mappings, offset: u64, len: u64) -> Result<(), UffdError> {
        for (address, len) in mappings.spans(offset, len) {
            let done = self.0.unregister(address.0 as _, len as usize);
            done.map_err(|e| failed("UFFDIO_UNREGISTER")(io_error(e)))?;
            // The kernel wakes before it lets go. Who faults in between, under the lock of its mapping alone (Linux 6.6), goes to sleep
            // with nobody left to wake it: seen on 6.18, once in some hundred forks under load.
            self.wake_all(address, len)?;
        }
        Ok(())
    }

    /// The accesses that wait, as many as `events` has room for. Does not wait, even where somebody has taken `O_NONBLOCK` away meanwhile:
    /// that belongs to all copies of the descriptor.
    pub(crate) fn faults(&self, mappings: &Mappings, events: &mut EventBuffer) -> Result<Vec<Fault>, UffdError> {
        let len = match self.read(&mut events.0) {
            Ok(len) => len,
            Err(Errno::EAGAIN) => return Ok(Vec::new()),
            Err(e) => return Err(failed("reading a userfaultfd")(e.into())),
        };
        let fault = |message: &[u8; MESSAGE]| {
            let (event, flags, address) = (message[0], word(message, 8), word(message, 16));
            if event != UFFD_EVENT_PAGEFAULT {
                return Err(UffdError::Unexpected { event: format!("of kind {event:#x}") });
            }
            let outside = || UffdError::Unexpected { event: format!("fault at {address:#x}, outside guest memory") };
            let offset = mappings.offset_of(Hva(address)).ok_or_else(outside)?;
            let kind = match (flags & UFFD_PAGEFAULT_FLAG_WP, flags & UFFD_PAGEFAULT_FLAG_MINOR) {
                (0, 0) => FaultKind::Missing,
                (0, _) => FaultKind::Minor,
                _ => FaultKind::WriteProtected,
            };
            Ok(Fault { offset: offset - offset % PAGE as u64, kind })
        };
        events.0[..len].as_chunks().0.iter().map(fault).collect()
    }

    fn read(&self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let fd = self.0.as_raw_fd();
        let into = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the kernel writes at most `iov_len` bytes to `iov_base`, which are those of `bytes`, borrowed for as long as the call lasts.
        let read = Errno::result(unsafe { libc::preadv2(fd, &raw const into, 1, -1, libc::RWF_NOWAIT) });
        match read {
            // Before Linux 6.10 only the descriptor itself says that nobody waits.
            Err(Errno::EOPNOTSUPP) => nix::unistd::read(self.as_fd(), bytes),
            read => read.map(|len| len as usize),
        }
    }

    /// From now on the first write to each of these pages waits for an answer; the pages need not be there.
    pub(crate) fn protect(&self, mappings: &Mappings, offset: u64, len: u64) -> Result<(), UffdError> {
        for (address, len) in mappings.spans(offset, len) {
            let done = self.0.write_protect(address.0 as _, len as usize);
            done.map_err(|e| failed("UFFDIO_WRITEPROTECT")(io_error(e)))?;
        }
        Ok(())
    }

    /// Lets these pages be written, and who waits to do so go on.
    pub(crate) fn unprotect(&self, mappings: &Mappings, offset: u64, len: u64) -> Result<(), UffdError> {
        for (address, len) in mappings.spans(offset, len) {
            let done = self.0.remove_write_protection(address.0 as _, len as usize, true);
            done.map_err(|e| failed("UFFDIO_WRITEPROTECT")(io_error(e)))?;
        }
        Ok(())
    }

    /// Maps the memfd's own pages and wakes who waits for them. Leaves alone what is mapped already, and holes.
    ///
    /// Returns the pages that are mapped now.
    pub(crate) fn map_cached(&self, mappings: &Mappings, offset: u64, len: u64) -> Result<u64, UffdError> {
        let mut pages = 0;
        for (mut address, len) in mappings.spans(offset, len) {
            let end = address.0 + len;
            let mut tries = 0;
            while address.0 < end {
                match self.0.r#continue(address.0 as _, (end - address.0) as usize, true) {
                    Ok(mapped) => {
                        pages += mapped / PAGE as u64;
                        address.0 += mapped;
                    }
                    Err(Error::SystemError(errno)) if errno as i32 == libc::EEXIST => {
                        self.wake(address)?;
                        pages += 1;
                        address.0 += PAGE as u64;
                    }
                    Err(Error::SystemError(errno)) if errno as i32 == libc::EFAULT => address.0 += PAGE as u64,
                    Err(Error::SystemError(errno)) if errno as i32 == libc::EAGAIN && tries < TRIES => tries += 1,
                    Err(e) => return Err(failed("UFFDIO_CONTINUE")(io_error(e))),
                }
            }
        }
        Ok(pages)
    }

    /// Puts `bytes` (whole pages) at `offset`, but for the pages that are there already, and wakes whoever waits for any of
    /// them. Returns how many were there.
    pub(crate) fn copy(&self, mappings: &Mappings, offset: u64, bytes: &[u8]) -> Result<usize, UffdError> {
        // SAFETY: a live slice of this length, which is only read.
        let bytes = unsafe { VolatileSlice::new(bytes.as_ptr().cast_mut(), bytes.len()) };
        self.copy_volatile(mappings, offset, bytes)
    }

    /// The same, of bytes that somebody may change meanwhile.
    pub(crate) fn copy_volatile(
        &self,
        mappings: &Mappings,
        offset: u64,
        bytes: VolatileSlice<'_>,
    ) -> Result<usize, UffdError> {
        let (mut done, mut there) = (0, 0);
        for (address, len) in mappings.spans(offset, bytes.len() as u64) {
            // SAFETY: the spans together are as long as the slice.
            let from = unsafe { bytes.ptr_guard().as_ptr().add(done) };
            there += self.copy_mapped(address, from, len as usize)?;
            done += len as usize;
        }
        Ok(there)
    }

    /// From `from` on `len` bytes must be readable.
    fn copy_mapped(&self, mut address: Hva, mut from: *const u8, mut len: usize) -> Result<usize, UffdError> {
        let (mut tries, mut there) = (0, 0);
        while len > 0 {
            // SAFETY: the source is so long, as whoever calls has made sure, and is read by the kernel alone. The target lies in guest
            // memory, this process's or another's, which is only ever accessed as memory that others change; the kernel refuses what is
            // not registered.
            let copied = unsafe { self.0.copy(from.cast(), address.0 as _, len, true) };
            let done = match copied {
                Ok(copied) => copied,
                // Up to a page that is there. Linux says -EAGAIN where it copied nothing: the address space was changing.
                Err(Error::PartiallyCopied(copied)) if copied <= len => copied,
                Err(Error::PartiallyCopied(_)) if tries < TRIES => {
                    tries += 1;
                    0
                }
                Err(Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                    self.wake(address)?;
                    there += 1;
                    PAGE
                }
                Err(e) => return Err(failed("UFFDIO_COPY")(io_error(e))),
            };
            address.0 += done as u64;
            // SAFETY: the kernel copies at most what it was asked for.
            from = unsafe { from.add(done) };
            len -= done;
        }
        Ok(there)
    }

    /// Puts a zero page at `offset` unless there is a page already, and in either case wakes whoever waits for it.
    pub(crate) fn zero(&self, mappings: &Mappings, offset: u64) -> Result<(), UffdError> {
        for (address, len) in mappings.spans(offset, PAGE as u64) {
            // SAFETY: the target lies in guest memory, this process's or another's, which is only ever accessed as memory that others
            // change; the kernel refuses what is not registered.
            match unsafe { self.0.zeropage(address.0 as _, len as usize, true) } {
                Ok(_) => (),
                Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EEXIST => self.wake(address)?,
                Err(e) => return Err(failed("UFFDIO_ZEROPAGE")(io_error(e))),
            }
        }
        Ok(())
    }

    /// Wakes whoever waits for the page at `address`, which is there: one that came by another way than a userfaultfd woke nobody.
    fn wake(&self, address: Hva) -> Result<(), UffdError> {
        self.wake_all(address, PAGE as u64)
    }

    fn wake_all(&self, address: Hva, len: u64) -> Result<(), UffdError> {
        self.0.wake(address.0 as _, len as usize).map_err(|e| failed("UFFDIO_WAKE")(io_error(e)))
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn failed(call: &'static str) -> impl Fn(io::Error) -> UffdError {
    move |source| UffdError::Call { call, source }
}

/// The crate's errors wrap an errno, of another version of nix than ours.
fn io_error(error: Error) -> io::Error {
    match error {
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        other => io::Error::other(other),
    }
}

fn any_way() -> Result<OwnedFd, UffdError> {
    by_device().or_else(|device| by_syscall().map_err(|syscall| UffdError::Refused { device, syscall }))
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

/// `userfaultfd(2)`: needs `CAP_SYS_PTRACE` (or `vm.unprivileged_userfaultfd`), and containers tend to forbid it.
pub(crate) fn by_syscall() -> io::Result<OwnedFd> {
    // SAFETY: the call takes its one argument by value and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just returned this descriptor, so it is open and nobody else's; a descriptor fits an i32.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// `/dev/userfaultfd` (Linux 6.1): needs permission on the file.
pub(crate) fn by_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the descriptor is open for the call's duration; this ioctl takes its argument by value and touches no memory.
    let fd = unsafe { ioctl::userfaultfd_ioc_new(device.as_raw_fd(), FLAGS) }?;
    // SAFETY: the kernel has just returned this descriptor, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks a fresh userfaultfd for `features`, and returns all that it has. Works once on each.
pub(crate) fn handshake(uffd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the descriptor is open, and `api` is a live `struct uffdio_api` that only this call uses.
    unsafe { ioctl::uffdio_api(uffd.as_raw_fd(), &mut api) }?;
    Ok(api.features)
}

#[cfg(test)]
mod tests;
