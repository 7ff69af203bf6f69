//! What the monitor and the loader, our program inside the guest, say to each other.
//!
//! ```text
//!   loader (guest)                                  monitor (host)
//!   Hello ─────────────────────────────────────────▶
//!         ◀───────────────────────────────── Launch, WindowSize, Stdin, …
//!   Stage: Configured … Execed ────────────────────▶
//!   Stdout, Stderr, Credit, Warning ───────────────▶
//!         ◀──────────────── Stdin, StdinEnd, Signal, WindowSize, Thaw
//!   Stage: Exited, the rest of the output, Exited ─▶   or Failed, at any time: one of the two is the last frame
//! ```
//!
//! A frame is a header of [`HEADER`] bytes, `{kind: u8, zero: [u8; 3], len: u32}`, and `len` bytes of payload, at most [`MAX_PAYLOAD`].
//! All numbers are little-endian. [`FromGuest`] and [`ToGuest`] are the frames, [`split`] finds them in a stream of bytes. How the bytes
//! travel is below this: a byte stream, or the hypercalls [`OP_SEND`] and [`OP_RECV`].
//!
//! Files are copied as [`archive`]s, which are the input or the output of what the loader then is itself: see [`Job`].
//!
//! Credit: the host may send as many bytes of input as [`FromGuest::Hello`] and all [`FromGuest::Credit`] say together. Output needs no
//! credit: who does not take it stops it.
//!
//! Both sides decode what the other side sent as untrusted: every function here is total.
#![no_std]

#[cfg(any(feature = "alloc", test))]
extern crate alloc;

pub mod archive;
mod bytes;
mod frames;
mod launch;
#[cfg(test)]
mod tests;

pub use bytes::{Full, Malformed, Sink};
pub use frames::{Exit, Frame, FromGuest, Output, Stage, Step, ToGuest, WindowSize, split};
#[cfg(any(feature = "alloc", test))]
pub use launch::pack;
pub use launch::{Disk, Freeze, Job, Launch, MAX_SERIAL, MAX_STRINGS, Mac, Network, Root, Store, Strings};

/// Of what is described here; what [`FromGuest::Hello`] says first.
pub const VERSION: u16 = 1;

/// Bytes of a frame's header.
pub const HEADER: usize = 8;

/// Bytes of a frame's payload at most.
pub const MAX_PAYLOAD: usize = 1 << 16;

/// Hypercall: the host takes bytes.
///
/// A hypercall is `out dx, eax`: DX the port, EAX one of these, RDI a buffer's address in the loader, RSI its length, R8 the token. RAX
/// becomes the count of bytes taken or given, which may be 0, or a negative errno: [`UNMAPPED`], or one after which there is no more.
pub const OP_SEND: u32 = 0x4356_0001;

/// Hypercall: the host gives bytes. As [`OP_SEND`].
pub const OP_RECV: u32 = 0x4356_0002;

/// Where the guest's kernel lets nobody use ports (lockdown), hypercalls are made here: so many bytes from the loader's first instruction,
/// where the host has a breakpoint. The registers are as otherwise, but for DX; the host goes on behind this instruction of one byte.
/// Without a breakpoint RAX stays what it was.
pub const KNOCK: u64 = 16;

/// Answer to a hypercall: a page of the buffer is not mapped now. Touch all of them and try again.
pub const UNMAPPED: i64 = -11;
