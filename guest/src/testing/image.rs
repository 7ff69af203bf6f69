//! Parts of an image.

use crate::memory::Gva;

/// Writes `bytes` over those at `at`.
///
/// # Panics
/// When they do not fit.
pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A table of exports (name, value), which are in the order of their names, with entries of 12 or 8 bytes and then the names, to be put at
/// `at`.
pub fn exports(symbols: &[(&str, u64)], entry_bytes: usize, at: Gva) -> Vec<u8> {
    let table = symbols.len() * entry_bytes;
    let mut bytes = vec![0; table];
    let mut names = vec![0];
    for (n, (name, value)) in symbols.iter().enumerate() {
        let entry = n * entry_bytes;
        let place = |field: usize| at.0 + (entry + field) as u64;
        let distance = |field, to: u64| (to.wrapping_sub(place(field)) as u32).to_le_bytes();
        let first_name = at.0 + table as u64;
        put(&mut bytes, entry, &distance(0, *value));
        put(&mut bytes, entry + 4, &distance(4, first_name + names.len() as u64));
        if entry_bytes == 12 {
            put(&mut bytes, entry + 8, &distance(8, first_name));
        }
        names.extend(name.bytes());
        names.push(0);
    }
    bytes.extend(names);
    bytes
}
