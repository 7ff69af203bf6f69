//! Symbols, in little memory: names one behind the other, addresses in order, and an index of the names' hashes.
//!
//! A name may have many symbols, and an address too. Of 200,000 symbols all of it is 10 MB.

use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;

use crate::memory::Gva;

/// The longest name: the kernel's own limit (`KSYM_NAME_LEN`).
pub const LONGEST_NAME: usize = 512;
/// The most symbols in a table.
pub const MOST_SYMBOLS: usize = 2_000_000;
/// The most bytes that a table's names may have together.
const MOST_NAME_BYTES: usize = 64 << 20;

/// One symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its address. Per-CPU variables of kernels before 6.15 have an offset here.
    pub address: Gva,
    /// Its type, as `nm(1)` has it: `T` and `t` are text, `W` is weak, `A` absolute. `?` where the source tells none.
    pub kind: char,
}

impl Symbol<'_> {
    /// Whether it is a function's, as far as its type says.
    pub fn is_text(&self) -> bool {
        matches!(self.kind, 't' | 'T' | 'w' | 'W')
    }
}

/// A name that no symbol has, or more of them than a table takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

/// Puts a [`SymbolTable`] together.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    names: String,
    symbols: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    name: u32,
    len: u16,
    kind: u8,
}

impl Builder {
    /// For so many symbols.
    pub(crate) fn with_capacity(count: usize) -> Self {
        let count = count.min(MOST_SYMBOLS);
        Self { names: String::with_capacity(count * 24), symbols: Vec::with_capacity(count) }
    }

    /// One more.
    pub(crate) fn add(&mut self, address: u64, kind: u8, name: &[u8]) -> Result<(), Refused> {
        let good = (1..=LONGEST_NAME).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
        let room = self.names.len() + name.len() <= MOST_NAME_BYTES && self.symbols.len() < MOST_SYMBOLS;
        let (true, true, Ok(name)) = (good, room, std::str::from_utf8(name)) else { return Err(Refused) };
        let start = self.names.len();
        self.names.push_str(name);
        self.symbols.push(Entry { address, name: start as u32, len: name.len() as u16, kind });
        Ok(())
    }

    /// All that came.
    pub(crate) fn finish(mut self) -> SymbolTable {
        if !self.symbols.is_sorted_by_key(|symbol| symbol.address) {
            self.symbols.sort_by_key(|symbol| symbol.address);
        }
        self.names.shrink_to_fit();
        let names = |symbol: &Entry| &self.names[symbol.range()];
        let index = NameIndex::new(self.symbols.iter().map(names));
        SymbolTable { names: self.names, symbols: self.symbols, index }
    }
}

impl Entry {
    fn range(self) -> Range<usize> {
        let start = self.name as usize;
        start..start + usize::from(self.len)
    }
}

/// Symbols by name and by address.
#[derive(Debug)]
pub struct SymbolTable {
    names: String,
    /// By address.
    symbols: Vec<Entry>,
    index: NameIndex,
}

impl SymbolTable {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.symbols.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.symbols.is_empty()
    }

    /// All of them, by address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.symbols.iter().map(|entry| self.symbol(entry))
    }

    /// All of this name, by address.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        self.index.find(name).map(|at| self.symbol(&self.symbols[at])).filter(move |symbol| symbol.name == name)
    }

    /// The symbol that an address is most likely to belong to, by which it is preceded, and how many bytes lie between. Text before data,
    /// global before local; `__pfx_` symbols, the padding before functions, only if there is no other.
    pub fn nearest(&self, at: Gva) -> Option<(Symbol<'_>, u64)> {
        let before = self.symbols.partition_point(|entry| entry.address <= at.0);
        let address = self.symbols[..before].last()?.address;
        let same = self.symbols[..before].iter().rev().take_while(|entry| entry.address == address);
        let best = same.map(|entry| self.symbol(entry)).max_by_key(|symbol| {
            (!symbol.name.starts_with("__pfx_"), symbol.is_text(), symbol.kind.is_ascii_uppercase())
        })?;
        Some((best, at.0 - address))
    }

    fn symbol(&self, entry: &Entry) -> Symbol<'_> {
        Symbol { name: &self.names[entry.range()], address: Gva(entry.address), kind: char::from(entry.kind) }
    }
}

/// Finds names by their hashes. However many names a guest makes to have the same one, building it takes the same time.
#[derive(Debug)]
pub(crate) struct NameIndex(Vec<(u32, u32)>);

impl NameIndex {
    /// Of these names; a name's number is its place among them.
    pub(crate) fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut index: Vec<_> = names.zip(0..).map(|(name, number)| (hash(name), number)).collect();
        index.sort_unstable();
        Self(index)
    }

    /// Numbers of names that may be this one, in ascending order.
    pub(crate) fn find(&self, name: &str) -> impl Iterator<Item = usize> {
        let wanted = hash(name);
        let start = self.0.partition_point(|(hash, _)| *hash < wanted);
        self.0[start..].iter().take_while(move |(hash, _)| *hash == wanted).map(|(_, number)| *number as usize)
    }
}

fn hash(name: &str) -> u32 {
    let mut hasher = DefaultHasher::new();
    hasher.write(name.as_bytes());
    hasher.finish() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(symbols: &[(u64, char, &str)]) -> SymbolTable {
        let mut builder = Builder::default();
        for (address, kind, name) in symbols {
            builder.add(*address, *kind as u8, name.as_bytes()).unwrap();
        }
        builder.finish()
    }

    #[test]
    fn a_name_may_have_many_symbols() {
        let table = table(&[(30, 'd', "kern_path"), (10, 'T', "_text"), (20, 'T', "kern_path")]);
        let found: Vec<_> = table.named("kern_path").map(|symbol| (symbol.address.0, symbol.kind)).collect();
        assert_eq!(found, [(20, 'T'), (30, 'd')]);
        assert_eq!(table.named("kern_pat").count(), 0);
        assert_eq!(table.iter().map(|symbol| symbol.name).collect::<Vec<_>>(), ["_text", "kern_path", "kern_path"]);
        assert_eq!((table.len(), table.is_empty()), (3, false));
    }

    #[test]
    fn the_nearest_symbol_is_the_best_of_its_address() {
        let table = table(&[
            (10, 'T', "_text"),
            (20, 't', "__pfx_schedule"),
            (36, 'r', "data"),
            (36, 't', "local"),
            (36, 'T', "schedule"),
            (36, 'T', "__pfx_next"),
            (40, 't', "__pfx_only"),
        ]);
        let nearest = |at| table.nearest(Gva(at)).map(|(symbol, offset)| (symbol.name, offset));
        assert_eq!(nearest(9), None);
        assert_eq!(nearest(10), Some(("_text", 0)));
        assert_eq!(nearest(38), Some(("schedule", 2)));
        assert_eq!(nearest(41), Some(("__pfx_only", 1)));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let mut builder = Builder::default();
        for bad in [&b""[..], b"a b", b"a\0", b"\xff", &[b'a'; LONGEST_NAME + 1]] {
            assert_eq!(builder.add(0, b'T', bad), Err(Refused));
        }
        assert_eq!(builder.add(1, b'T', b"good"), Ok(()));
        let table = builder.finish();
        assert_eq!((table.len(), table.named("good").count()), (1, 1));
    }
}
