//! Starting a program in a guest from outside: what is placed in its kernel, what vCPUs do that meet it, and what is started. Pure: whoever
//! has the VM places it, and moves the vCPUs.
//!
//! [`targets`] says what is needed of the kernel, [`plan`] is that as it is handed on, [`site`] where the trap stands, [`code`] makes the
//! code for it, [`hook`] draws how it goes. The loader then speaks [`wire`].

pub mod code;
pub mod hook;
pub mod plan;
pub mod site;
pub mod targets;

use civic_guest::memory::Gva;
pub use civic_loader as wire;

/// The program that is brought into the guest, as an ELF file: `civic-loader`, built by this crate's `build.rs`.
pub static LOADER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/loader"));

/// Where the loader makes its hypercalls if it may use no port: see [`wire::KNOCK`].
pub fn knock() -> Gva {
    // The entry point of an ELF file of 64 bits (System V gABI, "ELF header").
    let entry = LOADER.get(24..32).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
    Gva(entry).plus(wire::KNOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_has_an_instruction_to_knock_at() {
        // Its one segment of code is mapped as it lies in the file, from the first byte on.
        let at = (knock().0 & 0xf_ffff) as usize;
        let text = LOADER;
        let nop_ret = [0x90, 0xc3];
        let found = text.windows(2).enumerate().filter(|(_, bytes)| *bytes == nop_ret).map(|(offset, _)| offset);
        assert!(found.into_iter().any(|offset| offset & 0xfff == at & 0xfff), "{at:#x}");
    }
}
