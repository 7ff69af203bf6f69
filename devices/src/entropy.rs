//! The host's random numbers: getrandom(2).
#![allow(unsafe_code)]

use std::io;

/// What one call gives: up to this getrandom(2) is never interrupted and never short.
pub const MAX: usize = 256;

/// Fills `bytes`, at most [`MAX`] of them.
///
/// # Errors
/// What getrandom(2) says; `UnexpectedEof` when it was asked for more and gave less.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer and length are those of a live mutable slice.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(got) {
        Ok(got) if got == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
