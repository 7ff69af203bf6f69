//! Where in a function the trap stands: over an instruction that every call comes by.
//!
//! Best is the slot that compilers leave for tracers: whoever meets the trap there goes on behind it. Where there is none, or a tracer has
//! it, the trap stands over the first instruction that is as long as it is; whoever meets it waits there, trapping again and again, until
//! that instruction is given back, which is to be as soon as one task is diverted.

use civic_guest::entry::{EntrySlot, SLOT, SlotError, code};
use civic_guest::memory::{Gva, PhysicalMemory};
use civic_guest::paging::KernelImage;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use crate::code::OUT_LEN;

/// Bytes from a function's first on in which the instruction is looked for.
pub const PROLOGUE: usize = 32;

/// Why there is no place for a trap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSite {
    /// The function cannot be read.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// It begins as no function of a compiler's does: a breakpoint, perhaps.
    #[error("it begins with {0:02x?}")]
    Strange([u8; PROLOGUE]),
}

/// A place for a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its first byte.
    pub at: Gva,
    /// Where they go on who meet it: behind the slot, or at the instruction itself.
    pub on: Gva,
}

impl Site {
    /// In the function at `function`, as that is now.
    ///
    /// # Errors
    /// When it cannot be read, or begins with something else than slot or stack frame.
    pub fn of(image: &KernelImage, memory: &dyn PhysicalMemory, function: Gva) -> Result<Self, NoSite> {
        match EntrySlot::at(image, memory, function)? {
            EntrySlot::Free { at } => Ok(Self::slot(at)),
            EntrySlot::Traced { at } => Ok(Self::instruction(at)),
            EntrySlot::None => {
                let code: [u8; PROLOGUE] = code(image, memory, function)?;
                Self::in_prologue(function, &code).ok_or(NoSite::Strange(code))
            }
        }
    }

    /// The slot at `at`.
    pub fn slot(at: Gva) -> Self {
        Self { at, on: at.plus(SLOT as u64) }
    }

    /// The instruction at `at`.
    pub fn instruction(at: Gva) -> Self {
        Self { at, on: at }
    }

    /// Whether what stood there has to be given back before anybody can go on.
    pub fn waits(&self) -> bool {
        self.on == self.at
    }

    /// The first instruction that is long enough, behind none but such as save registers: all of them are run one after the other by
    /// every call, and none of them is jumped to.
    fn in_prologue(function: Gva, code: &[u8]) -> Option<Self> {
        let mut decoder = Decoder::with_ip(64, code, function.0, DecoderOptions::NONE);
        loop {
            let instruction = decoder.decode();
            let landing = matches!(instruction.mnemonic(), Mnemonic::Endbr64 | Mnemonic::Nop);
            match instruction.mnemonic() {
                Mnemonic::INVALID | Mnemonic::Int3 | Mnemonic::Int | Mnemonic::Ret => return None,
                Mnemonic::Push => {}
                _ if landing && instruction.ip() == function.0 => continue,
                _ if (instruction.len() as u64) < OUT_LEN => return None,
                _ => {}
            }
            if instruction.len() as u64 >= OUT_LEN {
                return Some(Self::instruction(Gva(instruction.ip())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTION: Gva = Gva(0xffff_ffff_8190_0000);

    fn site(code: &[u8]) -> Option<u64> {
        let mut prologue = [0xcc; PROLOGUE];
        prologue[..code.len()].copy_from_slice(code);
        let site = Site::in_prologue(FUNCTION, &prologue)?;
        assert!(site.waits());
        Some(site.at.0 - FUNCTION.0)
    }

    #[test]
    fn the_first_instruction_of_two_bytes_is_taken() {
        // mov %gs:0x1fb80,%rax
        let load = [0x65, 0x48, 0x8b, 0x04, 0x25, 0x80, 0xfb, 0x01, 0x00];
        assert_eq!(site(&load), Some(0));
        // push %rbp; push %rbx; the load
        assert_eq!(site(&[&[0x55, 0x53][..], &load].concat()), Some(2));
        // push %r12
        assert_eq!(site(&[0x55, 0x41, 0x54]), Some(1));
        // endbr64, and what it is sealed with: an indirect call has to find it.
        assert_eq!(site(&[0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48, 0x89, 0xe5]), Some(5));
        assert_eq!(site(&[0x66, 0x0f, 0x1f, 0x00, 0x55, 0x48, 0x89, 0xe5]), Some(5));
    }

    #[test]
    fn what_is_no_stack_frame_is_left_alone() {
        // A breakpoint of a probe's; a return; nothing that a processor knows; nothing but single bytes.
        for strange in
            [&[0xcc, 0x55, 0x48][..], &[0xc3], &[0x06, 0x06], &[0x90, 0x90, 0x48, 0x89, 0xe5], &[0x55; PROLOGUE]]
        {
            assert_eq!(site(strange), None, "{strange:02x?}");
        }
    }
}
