//! Where a kernel keeps the task that runs on a CPU: told by its symbols, or else by its own functions.
//!
//! A kernel that names functions only (`KALLSYMS` without `KALLSYMS_ALL`, and no modules) does not say where per-CPU variables are. But the
//! compiler has written it into every function that asks for `current`:
//!
//! ```text
//!   mov %gs:0x1fb80,%rax            GS is where a CPU's variables are             (before 6.15)
//!   mov %gs:0x21d7f48(%rip),%rax    GS is how far they are from those in the image (since 6.15)
//! ```

use std::collections::BTreeSet;

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

use crate::image::Image;
use crate::kernel::{MemberError, SymbolError};
use crate::memory::Gva;
use crate::paging::IMAGE_WINDOW;

/// Functions that ask for the current task in their first instructions. Those of BPF are there wherever the kernel describes its types
/// (`DEBUG_INFO_BTF` depends on `BPF_SYSCALL`).
pub const READERS: [&str; 7] = [
    "bpf_get_current_pid_tgid",
    "bpf_get_current_uid_gid",
    "bpf_get_current_comm",
    "task_work_run",
    "schedule",
    "__x64_sys_getpid",
    "__x64_sys_gettid",
];

/// So many of them have to agree.
const WITNESSES: usize = 3;
/// Bytes of a function that are looked at.
const FIRST: usize = 64;

/// Why the current task cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CurrentError {
    /// The per-CPU variable is not named, and functions do not agree on it.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The task's place in it is missing.
    #[error(transparent)]
    Member(#[from] MemberError),
}

/// What the kernel's GS base and the addresses of per-CPU variables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerCpu {
    /// GS is where a CPU's variables are, and symbols are offsets from there (before 6.15).
    Offsets,
    /// Symbols are addresses in the image, and GS is how far a CPU's variables are from those (since 6.15).
    Addresses,
}

/// Where the kernel keeps the task that runs on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Current {
    /// For an instruction in 64-bit mode with GS: `mov %gs:displacement, …`.
    pub displacement: i32,
    /// What GS is.
    pub per_cpu: PerCpu,
}

impl Current {
    /// With the pointer at this symbol's address.
    pub fn at(variable: Gva) -> Self {
        let per_cpu = if IMAGE_WINDOW.contains(&variable) { PerCpu::Addresses } else { PerCpu::Offsets };
        // Sign extension makes the whole of it of the lower half, for either.
        Self { displacement: variable.0 as i32, per_cpu }
    }

    /// As these functions have it, given by where they begin in the image: the only pointer that each of them reads which reads any. `None`
    /// where they do not agree on one, or are too few.
    pub fn in_code(image: &Image, functions: impl Iterator<Item = usize>) -> Option<Self> {
        let mut reads = functions.map(|at| pointers(image, at)).filter(|read| !read.is_empty());
        let (mut common, mut count) = (reads.next()?, 1);
        for read in reads {
            common.retain(|variable| read.contains(variable));
            count += 1;
        }
        let only = (common.len() == 1 && count >= WITNESSES).then(|| common.first().copied());
        only.flatten().map(Self::at)
    }
}

/// Per-CPU pointers that a function reads first.
fn pointers(image: &Image, at: usize) -> BTreeSet<Gva> {
    let code = image.bytes().get(at..).unwrap_or_default();
    let code = &code[..code.len().min(FIRST)];
    let decoder = Decoder::with_ip(64, code, image.address(at).0, DecoderOptions::NONE);
    let ends = [Mnemonic::Ret, Mnemonic::Jmp, Mnemonic::Ud2, Mnemonic::Int3, Mnemonic::INVALID];
    let run = decoder.into_iter().take_while(|instruction| !ends.contains(&instruction.mnemonic()));
    let pointers = run.filter(|instruction| {
        let (to, base) = (instruction.op0_register(), instruction.memory_base());
        instruction.mnemonic() == Mnemonic::Mov
            && to.is_gpr64()
            && instruction.op1_kind() == OpKind::Memory
            && instruction.segment_prefix() == Register::GS
            && matches!(base, Register::None | Register::RIP)
            && instruction.memory_index() == Register::None
    });
    pointers.map(|instruction| Gva(instruction.memory_displacement64())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Gva = Gva(0xffff_ffff_8100_0000);
    /// mov %gs:0x28,%rax: what guards the stack.
    const GUARD: [u8; 9] = [0x65, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0];
    /// mov %gs:0x1fb80,%rbx
    const OFFSET: [u8; 9] = [0x65, 0x48, 0x8b, 0x1c, 0x25, 0x80, 0xfb, 0x01, 0x00];

    /// Functions of 64 bytes each, full of returns behind what is given.
    fn found(functions: &[Vec<u8>]) -> Option<Current> {
        let mut bytes = vec![0xc3; functions.len() * FIRST];
        for (function, at) in functions.iter().zip((0..).step_by(FIRST)) {
            bytes[at..at + function.len()].copy_from_slice(function);
        }
        let image = Image::of(BASE, bytes);
        Current::in_code(&image, (0..functions.len()).map(|n| n * FIRST))
    }

    /// mov %gs:variable(%rip),%rax, as the function number `n`'s first instruction.
    fn relative(n: usize, variable: u64) -> Vec<u8> {
        let next = BASE.0 + (n * FIRST) as u64 + 8;
        [&[0x65, 0x48, 0x8b, 0x05][..], &(variable.wrapping_sub(next) as u32).to_le_bytes()].concat()
    }

    #[test]
    fn functions_that_agree_are_believed() {
        let current = Some(Current { displacement: 0x1fb80, per_cpu: PerCpu::Offsets });
        let traced = [&[0xe8, 1, 2, 3, 4, 0x55, 0x53][..], &OFFSET].concat();
        assert_eq!(found(&[OFFSET.to_vec(), traced, [GUARD, OFFSET].concat()]), current);
        // One that begins otherwise says nothing; one that returns before says nothing either.
        assert_eq!(found(&[OFFSET.to_vec(), vec![0x90], OFFSET.to_vec(), OFFSET.to_vec()]), current);
        let returns = [&[0xc3][..], &GUARD].concat();
        assert_eq!(found(&[OFFSET.to_vec(), returns, OFFSET.to_vec(), OFFSET.to_vec()]), current);
        let variable = 0xffff_ffff_831d_7f48;
        let current = Current { displacement: variable as i32, per_cpu: PerCpu::Addresses };
        assert_eq!(found(&[relative(0, variable), relative(1, variable), relative(2, variable)]), Some(current));
    }

    #[test]
    fn functions_that_do_not_are_not() {
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[OFFSET.to_vec(), OFFSET.to_vec()]), None, "too few");
        assert_eq!(found(&[OFFSET.to_vec(), GUARD.to_vec(), OFFSET.to_vec()]), None, "nothing in common");
        let both = [GUARD, OFFSET].concat();
        assert_eq!(found(&[both.clone(), both.clone(), both]), None, "two in common");
        // Half a word; a word relative to a register; a word that is written.
        for other in [&[0x65, 0x8b, 0x1c, 0x25, 0x80, 0xfb, 0x01, 0x00][..], &[0x65, 0x48, 0x8b, 0x18]] {
            assert_eq!(found(&vec![other.to_vec(); 3]), None);
        }
        let written = [0x65, 0x48, 0x89, 0x1c, 0x25, 0x80, 0xfb, 0x01, 0x00];
        assert_eq!(found(&vec![written.to_vec(); 3]), None);
        // The image ends within.
        let image = Image::of(BASE, OFFSET[..4].to_vec());
        assert_eq!(Current::in_code(&image, [0, 2, 4, 100].into_iter()), None);
    }
}
