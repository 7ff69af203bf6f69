//! Huge pages of a source's memory: there while nobody is forked from it, small ones while somebody is.
//!
//! The page server takes a page away from children by punching it out of the memfd. Where that page is a part of a huge one which Linux cannot
//! split just then, because somebody has a reference to it for a moment, `fallocate(2)` zeroes it, leaves it where it is and says that all is
//! well (`truncate_inode_partial_folio` in `mm/truncate.c`). So all are split beforehand, while the VM runs:
//!
//! ```text
//!   no new ones: MADV_NOHUGEPAGE
//!   as long as a second mapping, which the kernel fills by huge pages where there are some, shows one (PAGEMAP_SCAN):
//!       MADV_COLD on one of its small pages: "splits it, or does nothing" ──▶ look again
//! ```
//!
//! That moves no content, so there is no moment at which it could be lost: a huge page that is in use, as by a disk's direct I/O, stays one,
//! and is tried again. Whoever writes to it just then waits for it with a reference to it, which is in the way: one that stays for that
//! reason is split while the source's vCPUs stand still, a millisecond at a time. 60 to 200 µs each on the machine where this was made.
//!
//! `madvise(2)`; `madvise_cold_or_pageout_pte_range` in `mm/madvise.c`, `do_set_pmd` in `mm/memory.c`. Linux 6.7, for `PAGEMAP_SCAN`; before
//! that memory is in small pages from the start, as where there are huge pages of other sizes, which nothing shows.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::mman::munmap;
use nix::unistd::{Whence, lseek64};

use crate::mappings::Hva;
use crate::pagemap::PageMap;
use crate::ram::{PAGE, Ram};

/// Of a huge page, in bytes: what one entry of a page's middle directory maps.
pub const HUGE: u64 = 2 << 20;
/// Looked at in one go: page tables for it are made and go again.
const WINDOW: u64 = 64 << 20;
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(10);
/// So often in a row without success before the source stands still.
const TRIES: u32 = 3;
/// For as long as this, but one try at least.
const BURST: Duration = Duration::from_millis(1);
/// What the host has chosen.
const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// Why memory cannot be had in small pages.
#[derive(Debug, thiserror::Error)]
pub enum HugeError {
    /// The kernel does not want to.
    #[error("{call} failed on guest memory")]
    Call {
        /// What was asked of it.
        call: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Somebody has a reference to it, all the time.
    #[error("the huge page at {offset:#x} of guest memory is in use and cannot be split")]
    Held {
        /// In the memfd.
        offset: u64,
    },
}

fn failed(call: &'static str) -> impl Fn(Errno) -> HugeError {
    move |errno| HugeError::Call { call, source: errno.into() }
}

/// Whether a source's memory may be in huge pages: they must be all of one size, and it must be possible to see them.
pub fn usable() -> bool {
    let sizes = std::fs::read_dir(SETTINGS).into_iter().flatten().flatten();
    let others = sizes.filter(|size| size.file_name().into_string().is_ok_and(|name| is_another_size(&name)));
    let mut settings = others.filter_map(|size| std::fs::read_to_string(size.path().join("shmem_enabled")).ok());
    settings.all(|setting| chosen(&setting) == Some("never")) && PageMap::open().is_ok_and(|map| map.scans())
}

fn is_another_size(name: &str) -> bool {
    name.strip_prefix("hugepages-").is_some_and(|size| size != "2048kB")
}

/// The word in brackets: `always [madvise] never`.
pub fn chosen(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

/// What the host has chosen for shared memory; none without huge pages.
pub fn host_setting() -> Option<String> {
    chosen(&std::fs::read_to_string(format!("{SETTINGS}/shmem_enabled")).ok()?).map(str::to_owned)
}

/// Advises the kernel about a new mapping of a source's memory, according to what the host has chosen.
///
/// # Errors
/// When it is none.
pub fn begin(start: NonNull<u8>, len: usize) -> Result<(), HugeError> {
    if !usable() {
        return forbid(start, len);
    }
    match host_setting().as_deref() {
        Some("advise") => advise(Hva(start.as_ptr() as u64), len as u64, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
        _ => Ok(()),
    }
}

/// From now on no huge page comes about in a mapping.
///
/// # Errors
/// When it is none.
pub fn forbid(start: NonNull<u8>, len: usize) -> Result<(), HugeError> {
    no_new(Hva(start.as_ptr() as u64), len as u64)
}

fn no_new(start: Hva, len: u64) -> Result<(), HugeError> {
    match advise(start, len, libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE") {
        // A kernel without huge pages.
        Err(HugeError::Call { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}

/// Huge pages may come about again.
///
/// # Errors
/// When the memory is not mapped any more.
pub fn allow(ram: &Ram) -> Result<(), HugeError> {
    if !usable() || host_setting().is_none() {
        return Ok(());
    }
    ram.mappings().iter().try_for_each(|piece| advise(piece.start, piece.len, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"))
}

/// Has whoever writes to a source's memory stand still while the given work is done.
pub type Still = dyn Fn(&mut dyn FnMut()) + Send + Sync;

/// Has `ram` be in small pages, and no huge one come about, until [`allow`]. Gives up on one that cannot be split for as long as `patience`.
/// Returns how many there were.
///
/// # Errors
/// When one stays, or the kernel lacks what is needed.
pub fn split(ram: &Ram, patience: Duration, still: &Still) -> Result<usize, HugeError> {
    ram.mappings().iter().try_for_each(|piece| no_new(piece.start, piece.len))?;
    let map = PageMap::open().map_err(|source| HugeError::Call { call: "opening /proc/self/pagemap", source })?;
    if !map.scans() {
        // There was none from the start. What the host has chosen may be another thing now, and says nothing of what is there.
        return Ok(0);
    }
    let mut window = Window::new(ram.memfd())?;
    let mut done = 0;
    // One that the kernel had begun to put together may come after it was looked for: all of it again, if there were any.
    loop {
        let mut here = 0;
        for offset in (0..ram.bytes()).step_by(WINDOW as usize) {
            here += split_in(ram, &map, &mut window, offset, patience, still)?;
        }
        done += here;
        if here == 0 {
            return Ok(done);
        }
    }
}

fn split_in(
    ram: &Ram,
    map: &PageMap,
    window: &mut Window<'_>,
    offset: u64,
    patience: Duration,
    still: &Still,
) -> Result<usize, HugeError> {
    let len = WINDOW.min(ram.bytes() - offset);
    let mut huge = window.huge_pages(map, offset, len)?;
    let found = huge.len();
    let (mut since, mut in_vain) = (Instant::now(), 0);
    while let Some(&first) = huge.first() {
        if in_vain < TRIES {
            huge.iter().try_for_each(|offset| try_to_split(ram, *offset))?;
        } else {
            // Nothing tells when a reference is dropped.
            std::thread::sleep(PAUSE);
            let mut outcome = Ok(());
            still(&mut || {
                let start = Instant::now();
                let mut within = huge.iter().enumerate().take_while(|(n, _)| *n == 0 || start.elapsed() < BURST);
                outcome = within.try_for_each(|(_, offset)| try_to_split(ram, *offset));
            });
            outcome?;
        }
        let mut left = window.huge_pages(map, offset, len)?;
        if left.len() < huge.len() {
            (since, in_vain) = (Instant::now(), in_vain.min(TRIES));
        } else if since.elapsed() >= patience {
            return Err(HugeError::Held { offset: first });
        } else {
            in_vain += 1;
            // Whatever holds the first ones, the others' turn comes.
            let turn = in_vain as usize % left.len();
            left.rotate_left(turn);
        }
        huge = left;
    }
    Ok(found)
}

fn try_to_split(ram: &Ram, offset: u64) -> Result<(), HugeError> {
    ram.mappings().spans(offset, PAGE as u64).try_for_each(|(address, _)| {
        // It is split where it is mapped.
        advise(address, PAGE as u64, libc::MADV_POPULATE_READ, "MADV_POPULATE_READ")?;
        advise(address, PAGE as u64, libc::MADV_COLD, "MADV_COLD")
    })
}

/// Gives the kernel a piece of advice about mapped memory, of a kind that changes nothing of what is in it.
pub(crate) fn advise(start: Hva, len: u64, advice: libc::c_int, call: &'static str) -> Result<(), HugeError> {
    // SAFETY: each kind of advice that is given here changes how memory is kept, and nothing that is in it.
    let done = unsafe { libc::madvise(start.0 as _, len as usize, advice) };
    Errno::result(done).map(drop).map_err(failed(call))
}

/// A place where the memfd is mapped so that its huge pages are mapped as such.
struct Window<'a> {
    memfd: &'a File,
    /// Address space that nothing else uses, and its size.
    reserved: (NonNull<libc::c_void>, usize),
}

impl<'a> Window<'a> {
    fn new(memfd: &'a File) -> Result<Self, HugeError> {
        let len = (WINDOW + HUGE) as usize;
        let start = map(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        Ok(Self { memfd, reserved: (start, len) })
    }

    /// Where the huge pages among `len` bytes from `offset` on begin. Nothing stays mapped: one that is mapped twice is not split.
    fn huge_pages(&mut self, pages: &PageMap, offset: u64, len: u64) -> Result<Vec<u64>, HugeError> {
        use std::os::fd::AsRawFd;

        let start = (self.reserved.0.as_ptr() as u64).next_multiple_of(HUGE);
        let (at, shared) = (start as *mut libc::c_void, libc::MAP_SHARED | libc::MAP_FIXED);
        map(at, len as usize, libc::PROT_READ, shared, self.memfd.as_raw_fd(), offset)?;
        let found = (|| {
            for within in (0..len).step_by(HUGE as usize) {
                // A huge page has no hole.
                if self.has_data(offset + within)? {
                    advise(Hva(start + within), PAGE as u64, libc::MADV_POPULATE_READ, "MADV_POPULATE_READ")?;
                }
            }
            let failed = |source| HugeError::Call { call: "PAGEMAP_SCAN", source };
            let runs = pages.huge(Hva(start), len).map_err(failed)?;
            let within = runs.iter().flat_map(|(from, to)| (from.0..to.0).step_by(HUGE as usize));
            Ok(within.map(|address| offset + (address - start)).collect())
        })();
        let empty = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        map(at, len as usize, libc::PROT_NONE, empty, -1, 0)?;
        found
    }

    fn has_data(&self, offset: u64) -> Result<bool, HugeError> {
        match lseek64(self.memfd, offset as i64, Whence::SeekData) {
            Ok(data) => Ok(data as u64 == offset),
            Err(Errno::ENXIO) => Ok(false),
            Err(e) => Err(failed("lseek")(e)),
        }
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        let (start, len) = self.reserved;
        // SAFETY: the address space is this value's own, and nothing borrowed from it is left.
        let _ = unsafe { munmap(start, len) };
    }
}

/// With `MAP_FIXED`, `at` must lie in address space of the caller's own.
fn map(
    at: *mut libc::c_void,
    len: usize,
    access: libc::c_int,
    flags: libc::c_int,
    fd: libc::c_int,
    offset: u64,
) -> Result<NonNull<libc::c_void>, HugeError> {
    // SAFETY: without MAP_FIXED a new mapping, at an address that the kernel chooses; with it in place of one that only the caller uses. What is
    // mapped is never accessed by the program itself.
    let start = unsafe { libc::mmap(at, len, access, flags, fd, offset as i64) };
    match NonNull::new(start) {
        Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(start),
        _ => Err(failed("mmap")(Errno::last())),
    }
}

#[cfg(test)]
mod tests;
