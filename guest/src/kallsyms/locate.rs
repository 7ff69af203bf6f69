//! Where the tokens and names of a symbol table are in an image.

use memchr::memmem;

use super::FEWEST_SYMBOLS;
use crate::bytes::{string_at, u16_at, u32_at, u64_at};
use crate::symbols::MOST_SYMBOLS;

/// `'0' NUL '1' NUL …`: digits stand for themselves in every table of tokens, in this order.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
/// Tokens in a table.
const TOKENS: usize = 256;
/// The longest token.
const LONGEST_TOKEN: usize = 63;
/// Runs of digits that are looked at.
const MOST_DIGITS: usize = 256;
/// The count is at most so far before the tokens.
const REACH: usize = 16 << 20;
/// Names that are read before all of them are.
const SAMPLE: usize = 300;
/// All types that a symbol may have.
const KINDS: &[u8] = b"aAbBdDrRtTvVwWnNuUiI";

/// A table of tokens.
#[derive(Debug)]
pub(super) struct Tokens {
    strings: Vec<Vec<u8>>,
    /// Its first byte.
    at: usize,
    /// Behind its index.
    pub(super) end: usize,
}

impl Tokens {
    /// Puts what these tokens stand for into `name`; nothing if it cannot be a name's.
    pub(super) fn expand(&self, tokens: &[u8], name: &mut Vec<u8>) -> Option<()> {
        for token in tokens {
            name.extend(self.strings.get(usize::from(*token))?);
        }
        Some(())
    }

    /// The first character of a name with these tokens: its type.
    fn kind(&self, tokens: &[u8]) -> Option<u8> {
        self.strings.get(usize::from(*tokens.first()?))?.first().copied()
    }
}

/// All tables of tokens, from the image's first byte on.
pub(super) fn tokens(bytes: &[u8]) -> impl Iterator<Item = Tokens> {
    memmem::find_iter(bytes, DIGITS).take(MOST_DIGITS).filter_map(|at| tokens_around(bytes, at))
}

/// The table whose tokens of the digits are at `digits`.
fn tokens_around(bytes: &[u8], digits: usize) -> Option<Tokens> {
    const FIRST: usize = b'0' as usize;
    let mut starts = Vec::with_capacity(TOKENS - FIRST);
    let mut end = digits;
    for _ in FIRST..TOKENS {
        starts.push(end - digits);
        end += string_at(bytes, end, LONGEST_TOKEN)?.len() + 1;
    }
    [4, 8].into_iter().find_map(|align| {
        let index = end.next_multiple_of(align);
        let entry = |token: usize| u16_at(bytes, index + 2 * token).map(usize::from);
        let zero = entry(FIRST)?;
        let matches = |(token, start): (usize, &usize)| entry(FIRST + token) == Some(zero + start);
        let at = digits.checked_sub(zero)?;
        if entry(0)? != 0 || !starts.iter().enumerate().all(matches) {
            return None;
        }
        let string = |token| string_at(bytes, at + entry(token)?, LONGEST_TOKEN).map(<[u8]>::to_vec);
        let strings = (0..TOKENS).map(string).collect::<Option<_>>()?;
        Some(Tokens { strings, at, end: index + 2 * TOKENS })
    })
}

/// The names of a table.
#[derive(Debug)]
pub(super) struct Names {
    /// Where their count is.
    pub(super) count_at: usize,
    /// How many there are.
    pub(super) count: usize,
    /// Bytes of the count and of a mark.
    pub(super) counter_bytes: u8,
    /// The first one.
    pub(super) at: usize,
}

/// Names that may still be read before the search is given up: a guest can make every position look like a count.
#[derive(Debug)]
pub(super) struct Work {
    names: usize,
}

impl Default for Work {
    fn default() -> Self {
        Self { names: 32 * MOST_SYMBOLS }
    }
}

/// The names that end before these tokens.
pub(super) fn names(bytes: &[u8], tokens: &Tokens, work: &mut Work) -> Option<Names> {
    let counts = (tokens.at.saturating_sub(REACH).next_multiple_of(4)..=tokens.at & !3).rev().step_by(4);
    // `rev` starts at the end of the range, which is a multiple of 4.
    for count_at in counts {
        let Some(count) = u32_at(bytes, count_at).map(|count| count as usize) else { continue };
        if !(FEWEST_SYMBOLS..MOST_SYMBOLS).contains(&count) {
            continue;
        }
        // Since 7.0, and before.
        let (close, aligned) = (count_at + 4, (count_at + 4).next_multiple_of(8));
        for at in [Some(close), Some(aligned).filter(|aligned| *aligned != close)].into_iter().flatten() {
            if !sample(bytes, tokens, at, work)? {
                continue;
            }
            if let Some(counter_bytes) = marks(bytes, at, count, work)? {
                return Some(Names { count_at, count, counter_bytes, at });
            }
        }
    }
    None
}

/// Whether the first names look like names; nothing when there is no more work to spend.
fn sample(bytes: &[u8], tokens: &Tokens, mut at: usize, work: &mut Work) -> Option<bool> {
    for _ in 0..SAMPLE {
        work.names = work.names.checked_sub(1)?;
        let Some((start, end)) = name(bytes, at) else { return Some(false) };
        if !tokens.kind(&bytes[start..end]).is_some_and(|kind| KINDS.contains(&kind)) {
            return Some(false);
        }
        at = end;
    }
    Some(true)
}

/// Whether the marks of all names stand behind them, and of how many bytes they are; nothing when there is no more work to spend.
fn marks(bytes: &[u8], first: usize, count: usize, work: &mut Work) -> Option<Option<u8>> {
    let mut marks = Vec::with_capacity(count.div_ceil(256));
    let mut at = first;
    for number in 0..count {
        if number % 256 == 0 {
            marks.push(at - first);
        }
        work.names = work.names.checked_sub(1)?;
        let Some((_, end)) = name(bytes, at) else { return Some(None) };
        at = end;
    }
    let are = |place: usize, width: usize| {
        marks.iter().enumerate().all(|(n, mark)| {
            let at = place + n * width;
            let found = if width == 8 { u64_at(bytes, at) } else { u32_at(bytes, at).map(u64::from) };
            found == Some(*mark as u64)
        })
    };
    let kinds = [(8, 4), (4, 4), (8, 8)];
    let width = kinds.into_iter().find(|(align, width)| are(at.next_multiple_of(*align), *width));
    Some(width.map(|(_, width)| width as u8))
}

/// The tokens of the name at `at`.
pub(super) fn name(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let low = usize::from(*bytes.get(at)?);
    let (len, start) = match low {
        0 => return None,
        1..0x80 => (low, at + 1),
        _ => (low & 0x7f | usize::from(*bytes.get(at + 1)?) << 7, at + 2),
    };
    let end = start + len;
    (end <= bytes.len()).then_some((start, end))
}
