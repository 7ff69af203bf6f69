//! All memory of any size, as part of the program: the kernel makes it zeroes, and with `mlockall(2)` all of it at once. On the stack each
//! page was a fault and was zeroed twice, which was most of the time until the first word.
#![allow(unsafe_code)]

use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::link::Pages;

/// Pages of the buffer for each direction: a greatest frame, and small ones beside it.
pub const LINK_PAGES: usize = 18;
/// Pages of the input that the program has not read yet.
pub const STDIN_PAGES: usize = 16;
/// Bytes of it where there is much: only then, for each page is brought before the program starts.
const MORE: usize = 256 << 10;

/// The monitor reads and writes the first two by itself: they are whole pages.
pub struct Room {
    /// What has come.
    pub from_host: Pages<LINK_PAGES>,
    /// What is to go.
    pub to_host: Pages<LINK_PAGES>,
    /// For the program.
    pub stdin: Pages<STDIN_PAGES>,
    /// What to do.
    pub launch: Pages<LINK_PAGES>,
    /// What a program that cannot be started says.
    pub report: Pages<1>,
}

struct Place(UnsafeCell<Room>);

// SAFETY: `take` gives it away once.
unsafe impl Sync for Place {}

static PLACE: Place = Place(UnsafeCell::new(Room {
    from_host: Pages::new(),
    to_host: Pages::new(),
    stdin: Pages::new(),
    launch: Pages::new(),
    report: Pages::new(),
}));
static TAKEN: AtomicBool = AtomicBool::new(false);

/// It, for who asks first.
pub fn take() -> Option<&'static mut Room> {
    // SAFETY: nobody else has come by here, so there is no other reference.
    (!TAKEN.swap(true, Ordering::Relaxed)).then(|| unsafe { &mut *PLACE.0.get() })
}

/// Memory for much input, for ever; none if the kernel gives none.
pub fn more() -> Option<&'static mut [u8]> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: it is put where nothing is.
    let at = unsafe { mmap_anonymous(null_mut(), MORE, access, flags) }.ok()?;
    // SAFETY: so many bytes were mapped there, full of zeroes, which nobody else knows of and which are never unmapped.
    Some(unsafe { slice::from_raw_parts_mut(at.cast(), MORE) })
}
