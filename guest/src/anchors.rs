//! Addresses at which the processor enters the kernel: they lie in its text, and their symbols have known names.
//!
//! Interrupt gate: Intel SDM volume 3, "64-Bit Mode IDT". With page table isolation before 4.20 SYSCALL enters a trampoline
//! outside the image, and with FRED nothing enters here; so either may be missing.

use crate::memory::{Gva, PhysicalMemory};
use crate::paging::{AddressSpace, IMAGE_WINDOW};
use crate::registers::Registers;
use crate::symbols::SymbolTable;

const PAGE_FAULT: u64 = 14;
const GATE_BYTES: u64 = 16;

/// Entries into the kernel, where they are in its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Anchors {
    /// Of SYSCALL.
    pub syscall: Option<Gva>,
    /// Of page faults.
    pub page_fault: Option<Gva>,
}

impl Anchors {
    /// A vCPU's.
    pub fn of(memory: &dyn PhysicalMemory, registers: &Registers) -> Self {
        let in_image = |at: &Gva| IMAGE_WINDOW.contains(at);
        Self {
            syscall: Some(registers.lstar).filter(in_image),
            page_fault: page_fault(memory, registers).filter(in_image),
        }
    }

    /// Those that there are.
    pub fn iter(&self) -> impl Iterator<Item = Gva> {
        [self.syscall, self.page_fault].into_iter().flatten()
    }

    /// Whether a symbol of the right name is at one of them; nothing if they are elsewhere, so that the symbols are another kernel's.
    pub(crate) fn confirm(&self, symbols: &SymbolTable) -> Option<bool> {
        let mut contradicted = false;
        for (names, anchor) in [
            (&["entry_SYSCALL_64"][..], self.syscall),
            // Since 5.8; before; and before with KVM's asynchronous page faults.
            (&["asm_exc_page_fault", "page_fault", "async_page_fault"], self.page_fault),
        ] {
            let Some(anchor) = anchor else { continue };
            for symbol in names.iter().flat_map(|name| symbols.named(name)) {
                if symbol.address == anchor {
                    return Some(true);
                }
                contradicted = true;
            }
        }
        (!contradicted).then_some(false)
    }
}

fn page_fault(memory: &dyn PhysicalMemory, registers: &Registers) -> Option<Gva> {
    if u64::from(registers.idt_limit) < (PAGE_FAULT + 1) * GATE_BYTES - 1 {
        return None;
    }
    let gate = registers.idt_base.plus(PAGE_FAULT * GATE_BYTES);
    let gate = AddressSpace::of(registers)?.walk(memory, gate).ok()?;
    let [low, high] = [memory.u64(gate.at).ok()?, memory.u64(gate.at.plus(8)).ok()?];
    Some(Gva(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::Builder;

    const SYSCALL: u64 = 0xffff_ffff_8100_0000;
    const FAULT: u64 = 0xffff_ffff_8100_1000;

    fn symbols(list: &[(u64, &str)]) -> SymbolTable {
        let mut builder = Builder::default();
        for (address, name) in list {
            builder.add(*address, b'T', name.as_bytes()).unwrap();
        }
        builder.finish()
    }

    #[test]
    fn symbols_are_confirmed_or_contradicted() {
        let anchors = Anchors { syscall: Some(Gva(SYSCALL)), page_fault: Some(Gva(FAULT)) };
        assert_eq!(anchors.iter().count(), 2);
        assert_eq!(anchors.confirm(&symbols(&[(SYSCALL, "entry_SYSCALL_64")])), Some(true));
        for name in ["asm_exc_page_fault", "page_fault", "async_page_fault"] {
            assert_eq!(
                anchors.confirm(&symbols(&[(1, "entry_SYSCALL_64"), (1, "page_fault"), (FAULT, name)])),
                Some(true)
            );
        }
        assert_eq!(anchors.confirm(&symbols(&[(1, "entry_SYSCALL_64"), (2, "page_fault")])), None);
        assert_eq!(anchors.confirm(&symbols(&[(1, "schedule")])), Some(false));
        assert_eq!(Anchors::default().confirm(&symbols(&[(1, "page_fault")])), Some(false));
    }
}
