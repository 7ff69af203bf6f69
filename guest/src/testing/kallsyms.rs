//! Symbol tables in every layout.

use crate::kallsyms::Addresses;
use crate::memory::Gva;

/// A layout, with what a reader need not know.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// The first kernel that has it.
    pub since: &'static str,
    /// Bytes of a count or mark.
    pub counter_bytes: u8,
    /// Whether offsets come after the names.
    pub offsets_last: bool,
    /// How addresses are stored.
    pub addresses: Addresses,
    /// Whether there is the order of the names, of three bytes each.
    pub order: bool,
    /// Whether a name may have more than 127 tokens.
    pub long_names: bool,
}

const fn style(
    since: &'static str,
    counter_bytes: u8,
    offsets_last: bool,
    addresses: Addresses,
    more: [bool; 2],
) -> Style {
    let [order, long_names] = more;
    Style { since, counter_bytes, offsets_last, addresses, order, long_names }
}

/// All that there have been on x86-64.
pub const STYLES: [Style; 8] = [
    style("4.6", 8, false, Addresses::AbsolutePerCpu, [false, false]),
    style("4.20", 4, false, Addresses::AbsolutePerCpu, [false, false]),
    style("4.20, one processor", 4, false, Addresses::FromBase, [false, false]),
    style("6.1", 4, false, Addresses::AbsolutePerCpu, [false, true]),
    style("6.2", 4, false, Addresses::AbsolutePerCpu, [true, true]),
    style("6.4", 4, true, Addresses::AbsolutePerCpu, [true, true]),
    style("6.15", 4, true, Addresses::FromBase, [true, true]),
    style("7.0", 4, true, Addresses::FromThemselves, [true, true]),
];

/// Tokens that are more than a character.
const LONG_TOKENS: [(u8, &str); 3] = [(0x80, "filler_"), (0x81, "TCall_"), (0x01, "sys")];

fn token(number: u8) -> String {
    match LONG_TOKENS.iter().find(|(long, _)| *long == number) {
        Some((_, text)) => (*text).into(),
        None if number.is_ascii_graphic() => char::from(number).into(),
        None => format!("_unused{number}"),
    }
}

fn compress(text: &str) -> Vec<u8> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.bytes().next() {
        let (token, len) = match LONG_TOKENS.iter().find(|(_, long)| rest.starts_with(long)) {
            Some((token, long)) => (*token, long.len()),
            None => (first, 1),
        };
        tokens.push(token);
        rest = &rest[len..];
    }
    tokens
}

struct Blob {
    bytes: Vec<u8>,
    align: usize,
}

impl Blob {
    fn part(&mut self, bytes: &[u8]) {
        self.bytes.resize(self.bytes.len().next_multiple_of(self.align), 0);
        self.bytes.extend(bytes);
    }

    fn counter(&self, style: &Style, value: usize) -> Vec<u8> {
        (value as u64).to_le_bytes()[..usize::from(style.counter_bytes)].to_vec()
    }

    fn offsets(&mut self, style: &Style, symbols: &[(u64, char, &str)], at: Gva) {
        let base = symbols.iter().map(|symbol| symbol.0).find(|address| *address >= 1 << 63).expect("text");
        self.part(&[]);
        let own = at.0 + self.bytes.len() as u64;
        let offset = |(n, address): (u64, u64)| match style.addresses {
            Addresses::AbsolutePerCpu if address < 1 << 31 => address as u32,
            Addresses::AbsolutePerCpu => (base.wrapping_sub(1).wrapping_sub(address)) as u32,
            Addresses::FromBase => (address - base) as u32,
            Addresses::FromThemselves => address.wrapping_sub(own + 4 * n) as u32,
        };
        let offsets: Vec<_> = (0..).zip(symbols.iter().map(|symbol| symbol.0)).map(offset).collect();
        self.part(&offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect::<Vec<_>>());
        if style.addresses != Addresses::FromThemselves {
            self.part(&base.to_le_bytes());
        }
    }

    fn names(&mut self, style: &Style, symbols: &[(u64, char, &str)]) {
        self.part(&self.counter(style, symbols.len()));
        let (mut names, mut marks) = (Vec::new(), Vec::new());
        for (n, (_, kind, name)) in symbols.iter().enumerate() {
            if n % 256 == 0 {
                marks.extend(self.counter(style, names.len()));
            }
            let tokens = compress(&format!("{kind}{name}"));
            match tokens.len() {
                len @ ..0x80 => names.push(len as u8),
                len => {
                    assert!(style.long_names, "a name of {len} tokens");
                    names.extend([len as u8 & 0x7f | 0x80, (len >> 7) as u8]);
                }
            }
            names.extend(tokens);
        }
        self.part(&names);
        self.part(&marks);
    }

    fn tokens(&mut self) {
        let (mut tokens, mut index) = (Vec::new(), Vec::new());
        for number in 0..=255 {
            index.extend((tokens.len() as u16).to_le_bytes());
            tokens.extend(token(number).bytes());
            tokens.push(0);
        }
        self.part(&tokens);
        self.part(&index);
    }
}

/// A table of these symbols (address, type, name), which are in the order of their addresses, to be put at `at`.
///
/// # Panics
/// When they cannot be in a table of this style.
pub fn kallsyms(symbols: &[(u64, char, &str)], style: &Style, at: Gva) -> Vec<u8> {
    let order = vec![0x5a; if style.order { 3 * symbols.len() } else { 0 }];
    let align = if style.addresses == Addresses::FromThemselves { 4 } else { 8 };
    let mut blob = Blob { bytes: Vec::new(), align };
    if style.offsets_last {
        blob.names(style, symbols);
        blob.tokens();
        blob.offsets(style, symbols, at);
        blob.part(&order);
    } else {
        blob.offsets(style, symbols, at);
        blob.names(style, symbols);
        blob.part(&order);
        blob.tokens();
    }
    blob.bytes
}
