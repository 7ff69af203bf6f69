//! The kernel's own symbols (`kernel/kallsyms.c`, `scripts/kallsyms.c`), in every layout since Linux 4.6, told apart by what is there.
//!
//! ```text
//!              what is found first ┐
//!  4.6 ┄ 6.3   offsets · base · count · names · marks · (order) · tokens · token index
//!  6.4 ┄ 6.19  count · names · marks · tokens · token index · offsets · base · order
//!  7.0 ┄       count · names · marks · tokens · token index · offsets · order
//!
//!  name     length (7 bits, or 14 low ones first if bit 7 is set), then so many tokens; the first character is the symbol's type
//!  mark     where every 256th name begins
//!  token    a string that ends with NUL; of most printable characters there is one that is just it
//!  offset   since 7.0 from itself; before 6.15 from the base, downwards, if negative, else it is the address itself (per-CPU variables); else
//!           from the base, upwards
//! ```
//!
//! Counts and marks are of 4 bytes, before 4.20 of 8. All is little-endian and aligned to 8 bytes, since 7.0 to 4.
//!
//! `locate.rs` finds the tokens by those of the digits, confirmed by their index; the names by their count, confirmed by every mark; and
//! the offsets by their place, confirmed by addresses that never go down and by the addresses at which the processor enters the kernel. None
//! of it depends on what the kernel calls itself: stable and vendor trees take over later layouts.

mod locate;

use locate::{Names, Tokens};

use crate::anchors::Anchors;
use crate::bytes::{i32_at, u64_at};
use crate::image::Image;
use crate::memory::Gva;
use crate::paging::IMAGE_WINDOW;
use crate::symbols::{Builder, SymbolTable};

/// The fewest symbols that a table is believed to have.
pub const FEWEST_SYMBOLS: usize = 2_000;
/// Tables that are looked at: there is one, and what may lie where init sections were.
const MOST_TABLES: usize = 4;

/// Why no symbols were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoKallsyms {
    /// The kernel was built without (`CONFIG_KALLSYMS=n`), or is none.
    #[error("the kernel has no symbol table (CONFIG_KALLSYMS): give its System.map or vmlinux")]
    NoTokens,
    /// There are tokens, but names in no known layout.
    #[error("the kernel's symbol table is in a layout that is not known (its names): give its System.map or vmlinux")]
    NoNames,
    /// There are names, but addresses in no known layout.
    #[error(
        "the kernel's symbol table is in a layout that is not known (the addresses of its {count} symbols): give its \
         System.map or vmlinux"
    )]
    NoAddresses {
        /// How many names there are.
        count: usize,
    },
}

/// How symbols' addresses are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// Downwards from a base, those of per-CPU variables as they are (4.6 to 6.14).
    AbsolutePerCpu,
    /// Upwards from a base (6.15 to 6.19, and older kernels for one processor).
    FromBase,
    /// Each from where it is stored (since 7.0).
    FromThemselves,
}

/// The layout that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a count or mark: 4, or 8 before 4.20.
    pub counter_bytes: u8,
    /// Whether the offsets come after the names (since 6.4).
    pub offsets_last: bool,
    /// How addresses are stored.
    pub addresses: Addresses,
}

/// The kernel's symbols.
#[derive(Debug)]
pub struct Kallsyms {
    /// All of them.
    pub symbols: SymbolTable,
    /// How they were stored.
    pub layout: Layout,
    /// Whether an address at which the processor enters the kernel has the name that it should.
    pub confirmed: bool,
}

impl Kallsyms {
    /// Finds and reads them.
    pub fn find(image: &Image, anchors: &Anchors) -> Result<Self, NoKallsyms> {
        let mut why = NoKallsyms::NoTokens;
        let mut work = locate::Work::default();
        for tokens in locate::tokens(image.bytes()).take(MOST_TABLES) {
            // Of several tables, what is said is about the one that was read furthest.
            let Some(names) = locate::names(image.bytes(), &tokens, &mut work) else {
                why = if why == NoKallsyms::NoTokens { NoKallsyms::NoNames } else { why };
                continue;
            };
            match Self::read(image, anchors, &tokens, &names) {
                Some(found) => return Ok(found),
                None => why = NoKallsyms::NoAddresses { count: names.count },
            }
        }
        Err(why)
    }

    /// Whether data has names (`CONFIG_KALLSYMS_ALL`): if any has, then the first task.
    pub fn names_data(&self) -> bool {
        self.symbols.named("init_task").next().is_some()
    }

    fn read(image: &Image, anchors: &Anchors, tokens: &Tokens, names: &Names) -> Option<Self> {
        places(tokens, names).find_map(|place| {
            let (layout, addresses) = place.addresses(image, names)?;
            let symbols = symbols(image.bytes(), tokens, names, &addresses)?;
            let confirmed = anchors.confirm(&symbols)?;
            Some(Self { symbols, layout, confirmed })
        })
    }
}

fn symbols(bytes: &[u8], tokens: &Tokens, names: &Names, addresses: &[u64]) -> Option<SymbolTable> {
    let mut builder = Builder::with_capacity(names.count);
    let mut name = Vec::new();
    let mut at = names.at;
    for address in addresses {
        let (start, end) = locate::name(bytes, at)?;
        name.clear();
        tokens.expand(&bytes[start..end], &mut name)?;
        let (kind, rest) = name.split_first()?;
        builder.add(*address, *kind, rest).ok()?;
        at = end;
    }
    Some(builder.finish())
}

/// Where offsets, and their base, may be.
#[derive(Clone, Copy, Debug)]
struct Place {
    offsets: usize,
    base: usize,
    last: bool,
}

fn places(tokens: &Tokens, names: &Names) -> impl Iterator<Item = Place> {
    let bytes = 4 * names.count;
    let after = [8, 4].into_iter().map(move |align| {
        let offsets = tokens.end.next_multiple_of(align);
        Some(Place { offsets, base: (offsets + bytes).next_multiple_of(8), last: true })
    });
    let base = names.count_at.checked_sub(8);
    let before = base.and_then(|base| Some(Place { offsets: base.checked_sub(bytes)? & !7, base, last: false }));
    after.chain([before]).flatten()
}

impl Place {
    /// All addresses, if they are there.
    fn addresses(self, image: &Image, names: &Names) -> Option<(Layout, Vec<u64>)> {
        let bytes = image.bytes();
        let offsets = bytes.get(self.offsets..self.offsets.checked_add(4 * names.count)?)?;
        let offsets = || (0..names.count).filter_map(|n| i32_at(offsets, 4 * n));
        let base = u64_at(bytes, self.base).filter(|base| *base >= IMAGE_WINDOW.start.0);
        let (addresses, decoded): (_, Vec<u64>) = match base {
            None if !self.last => return None,
            None => {
                let own = (image.address(self.offsets).0..).step_by(4);
                (
                    Addresses::FromThemselves,
                    offsets().zip(own).map(|(n, own)| own.wrapping_add_signed(n.into())).collect(),
                )
            }
            Some(base) if offsets().any(|n| n < 0) => {
                let address = |n: i32| match u64::try_from(n) {
                    Ok(absolute) => absolute,
                    Err(_) => (base - 1).wrapping_add(u64::from(n.unsigned_abs())),
                };
                (Addresses::AbsolutePerCpu, offsets().map(address).collect())
            }
            Some(base) => {
                (Addresses::FromBase, offsets().map(|n| base.wrapping_add(u64::from(n.unsigned_abs()))).collect())
            }
        };
        let (first, last) = (*decoded.first()?, *decoded.last()?);
        let inside = |address: u64| IMAGE_WINDOW.contains(&Gva(address));
        let good = decoded.is_sorted()
            && inside(last)
            && match addresses {
                Addresses::AbsolutePerCpu => true,
                Addresses::FromBase => inside(first),
                // Text is before the table. Zeros would all lead to themselves.
                Addresses::FromThemselves => inside(first) && first < image.address(self.offsets).0,
            };
        let layout = Layout { counter_bytes: names.counter_bytes, offsets_last: self.last, addresses };
        good.then_some((layout, decoded))
    }
}

#[cfg(test)]
mod tests;
