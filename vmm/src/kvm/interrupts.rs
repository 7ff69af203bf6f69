//! Interrupt lines of the IOAPIC and PIC, and message-signalled sources by irqfd.
//!
//! `KVM_SET_GSI_ROUTING` replaces the whole table, so the table lives here: the legacy lines as a PC wires them, then one entry
//! for each message source that has been routed.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use civic_devices::irq::{IrqLine, MsiAllocator, MsiMessage, MsiSource};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use tracing::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Lines of the IOAPIC.
const LEGACY: u32 = 24;
/// Lines of the two PICs.
const PIC_LINES: u32 = 16;
/// The kernel's `KVM_MAX_IRQ_ROUTES`.
const MOST: u32 = 4096;

/// A VM's interrupt routing.
pub struct Interrupts {
    vm: Arc<VmFd>,
    /// Message sources by GSI. Leaf lock.
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    routed: BTreeMap<u32, MsiMessage>,
    taken: std::collections::BTreeSet<u32>,
}

impl Interrupts {
    /// Wires the legacy lines as a PC does: timer line 0 arrives at pin 2 of the IOAPIC.
    pub fn new(vm: Arc<VmFd>) -> io::Result<Arc<Self>> {
        let interrupts = Arc::new(Self { vm, table: Mutex::default() });
        interrupts.commit(&interrupts.table())?;
        Ok(interrupts)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn commit(&self, table: &Table) -> io::Result<()> {
        let mut entries = Vec::new();
        for line in 0..PIC_LINES {
            let chip = if line < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            entries.push(chip_entry(line, chip, line % 8));
        }
        for line in (0..LEGACY).filter(|line| *line != 2) {
            entries.push(chip_entry(line, KVM_IRQCHIP_IOAPIC, if line == 0 { 2 } else { line }));
        }
        entries.extend(table.routed.iter().map(|(gsi, message)| msi_entry(*gsi, message)));
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }

    /// The line of this GSI.
    pub fn line(self: &Arc<Self>, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Line { vm: Arc::clone(&self.vm), gsi })
    }
}

fn chip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_entry(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        if let Err(e) = self.vm.set_irq_line(self.gsi, high) {
            warn!(gsi = self.gsi, "KVM_IRQ_LINE failed: {e}");
        }
    }
}

/// [`MsiAllocator`] over [`Interrupts`].
pub struct Messages(pub Arc<Interrupts>);

impl MsiAllocator for Messages {
    fn allocate(&self) -> io::Result<Arc<dyn MsiSource>> {
        let mut table = self.0.table();
        let gsi = (LEGACY..MOST)
            .find(|gsi| !table.taken.contains(gsi))
            .ok_or_else(|| io::Error::other("all interrupt routes of the VM are taken"))?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        table.taken.insert(gsi);
        drop(table);
        Ok(Arc::new(Message { interrupts: Arc::clone(&self.0), gsi, event, armed: Mutex::new(false) }))
    }
}

struct Message {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: EventFd,
    /// Whether the irqfd is assigned.
    armed: Mutex<bool>,
}

impl MsiSource for Message {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        let mut table = self.interrupts.table();
        let before = table.routed.insert(self.gsi, message);
        if let Err(e) = self.interrupts.commit(&table) {
            match before {
                Some(before) => table.routed.insert(self.gsi, before),
                None => table.routed.remove(&self.gsi),
            };
            return Err(e);
        }
        drop(table);
        let mut armed = self.armed.lock().unwrap_or_else(|e| e.into_inner());
        if !*armed {
            self.interrupts.vm.register_irqfd(&self.event, self.gsi)?;
            *armed = true;
        }
        Ok(())
    }

    fn fire(&self) {
        // The counter cannot overflow: KVM resets it on every interrupt.
        let _ = self.event.write(1);
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if *self.armed.get_mut().unwrap_or_else(|e| e.into_inner()) {
            let _ = self.interrupts.vm.unregister_irqfd(&self.event, self.gsi);
        }
        let mut table = self.interrupts.table();
        table.taken.remove(&self.gsi);
        table.routed.remove(&self.gsi);
    }
}
