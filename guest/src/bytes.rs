//! Checked little-endian reads from a slice.

/// The array at `at`, if all of it is there.
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Two bytes.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

/// Four bytes.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// Four bytes with a sign.
pub fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    array(bytes, at).map(i32::from_le_bytes)
}

/// Eight bytes.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// What stands at `at` before the next NUL, if that comes within `most` bytes.
pub fn string_at(bytes: &[u8], at: usize, most: usize) -> Option<&[u8]> {
    let rest = bytes.get(at..)?;
    let rest = &rest[..rest.len().min(most + 1)];
    memchr::memchr(0, rest).map(|end| &rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_outside() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!((u16_at(&bytes, 7), u16_at(&bytes, 8)), (Some(0x0908), None));
        assert_eq!((u32_at(&bytes, 5), u32_at(&bytes, 6)), (Some(0x0908_0706), None));
        assert_eq!((u64_at(&bytes, 1), u64_at(&bytes, usize::MAX)), (Some(0x0908_0706_0504_0302), None));
        assert_eq!(i32_at(&[0xff; 4], 0), Some(-1));
        assert_eq!(string_at(b"ab\0c", 0, 2), Some(&b"ab"[..]));
        assert_eq!(
            (string_at(b"ab\0c", 0, 1), string_at(b"ab\0c", 3, 9), string_at(b"ab\0c", 5, 9)),
            (None, None, None)
        );
    }
}
