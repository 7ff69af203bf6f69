//! What the kernel exports to modules (`include/linux/export-internal.h`, `struct kernel_symbol`), found without any symbol.
//!
//! ```text
//!  since 5.4   value · name · namespace     12 bytes each
//!  before      value · name                  8 bytes
//! ```
//!
//! All are 32-bit distances from themselves. Entries are sorted by name; `__ksymtab` and `__ksymtab_gpl` stand one behind the other; newer
//! kernels have one table. Kernels without symbols of their data (`CONFIG_KALLSYMS_ALL=n`) tell here where that is. Names share their tails, so a name need
//! not begin behind a NUL.

use crate::bytes::{i32_at, string_at};
use crate::image::Image;
use crate::memory::Gva;
use crate::paging::IMAGE_WINDOW;
use crate::symbols::{Builder, LONGEST_NAME, SymbolTable};

/// The fewest entries that are believed.
const FEWEST: usize = 1_000;
/// Where to look: every table that is large enough has many such places.
const STEP: usize = 4096;
/// Entries in a row that have to look like some before all are read.
const SAMPLE: usize = 8;
/// Entries that are looked at in all, so that an image full of them takes no longer.
const MOST_LOOKS: usize = 1 << 20;
/// Times that names may begin again from A: two tables are the most that there are.
const MOST_TABLES: usize = 4;
/// Per-CPU variables have offsets below this, until 6.14.
const MOST_PER_CPU: u64 = 16 << 20;

/// What is exported.
#[derive(Debug)]
pub struct Exports {
    /// All of it; its kind is `?`.
    pub symbols: SymbolTable,
    /// Bytes of an entry: 12, or 8 before 5.4.
    pub entry_bytes: usize,
}

/// Entries found, by their places in the image.
struct Run {
    start: usize,
    count: usize,
    stride: usize,
}

impl Exports {
    /// Finds them.
    pub fn find(image: &Image) -> Option<Self> {
        let mut scan = Scan { image, looks: MOST_LOOKS };
        let run = scan.runs().into_iter().max_by_key(|run| run.count)?;
        let mut builder = Builder::with_capacity(run.count);
        for at in (run.start..).step_by(run.stride).take(run.count) {
            let (name, value) = entry(image, at, run.stride)?;
            builder.add(value.0, b'?', name).ok()?;
        }
        Some(Self { symbols: builder.finish(), entry_bytes: run.stride })
    }
}

struct Scan<'a> {
    image: &'a Image,
    looks: usize,
}

impl<'a> Scan<'a> {
    fn runs(&mut self) -> Vec<Run> {
        let mut runs = Vec::new();
        let (mut at, len) = (0, self.image.bytes().len());
        while at < len && self.looks > 0 {
            let places =
                [12, 8].into_iter().flat_map(|stride| (0..stride).step_by(4).map(move |phase| (stride, phase)));
            let run = places.into_iter().find_map(|(stride, phase)| self.around(at + phase, stride));
            at = match &run {
                Some(run) => (run.start + run.count * run.stride).max(at + 1).next_multiple_of(STEP),
                None => at + STEP,
            };
            runs.extend(run);
        }
        runs
    }

    /// The entries before and behind `middle`, if it is one and they are enough.
    fn around(&mut self, middle: usize, stride: usize) -> Option<Run> {
        for n in 0..SAMPLE {
            self.look(middle + n * stride, stride)?;
        }
        let (mut start, mut end, mut tables) = (middle, middle, 1);
        let mut name = self.look(middle, stride)?;
        while let Some(before) = start.checked_sub(stride).and_then(|at| Some((at, self.look(at, stride)?))) {
            tables += usize::from(before.1 >= name);
            (start, name) = before;
        }
        let mut name = self.look(middle, stride)?;
        while let Some(next) = self.look(end + stride, stride) {
            tables += usize::from(next <= name);
            (end, name) = (end + stride, next);
        }
        let count = (end - start) / stride + 1;
        (count >= FEWEST && tables <= MOST_TABLES).then_some(Run { start, count, stride })
    }

    fn look(&mut self, at: usize, stride: usize) -> Option<&'a [u8]> {
        self.looks = self.looks.checked_sub(1)?;
        entry(self.image, at, stride).map(|(name, _)| name)
    }
}

/// The entry at `at`, if there can be one.
fn entry(image: &Image, at: usize, stride: usize) -> Option<(&[u8], Gva)> {
    let target = |field: usize| {
        let distance = i32_at(image.bytes(), at + field)?;
        Some(Gva(image.address(at + field).0.wrapping_add_signed(distance.into())))
    };
    let value = target(0).filter(|value| value.0 < MOST_PER_CPU || IMAGE_WINDOW.contains(value))?;
    let name = string_at(image.bytes(), image.offset(target(4)?)?, LONGEST_NAME)?;
    let identifier = |name: &[u8]| {
        name.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'_')
            && name.first().is_some_and(|c| !c.is_ascii_digit())
    };
    if stride == 12 {
        // Of those in none it is empty, or missing.
        image.offset(target(8)?)?;
    }
    identifier(name).then_some((name, value))
}

#[cfg(test)]
mod tests;
