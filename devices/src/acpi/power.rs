//! Fixed ACPI hardware: the PM1 event and control blocks, the PM timer, GPE block 0; and the i8042's reset line.
//!
//! ```text
//! port    register                            bytes
//! 0x600   PM1a status (write 1 to clear)      2
//! 0x602   PM1a enable                         2
//! 0x604   PM1a control: SCI_EN, SLP_TYP/EN    2
//! 0x608   PM timer, 3.579545 MHz, 32 bits     4
//! 0x620   GPE0 status (write 1 to clear)      4
//! 0x624   GPE0 enable                         4
//! ```
//!
//! Invariant: the SCI line is high exactly while `PM1 status & enable` or `GPE0 status & enable` is not zero.
//!
//! Lock order: the registers' lock, then whatever [`IrqLine::set`] takes. [`PowerEvents`] is called with no lock held.
//!
//! ACPI 6.5 §4.8.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// First port of the block that [`PowerManagement`] decodes.
pub const PORT: u16 = 0x600;
/// How many ports it decodes.
pub const PORTS: u16 = 0x28;
/// The system control interrupt: level-triggered, active high.
pub const SCI_GSI: u32 = 9;

/// PM1a event block and its length in bytes.
pub(crate) const PM1_EVENT: (u16, u8) = (PORT, 4);
/// PM1a control block.
pub(crate) const PM1_CONTROL: (u16, u8) = (PORT + 4, 2);
/// PM timer.
pub(crate) const PM_TIMER: (u16, u8) = (PORT + 8, 4);
/// General-purpose event block 0: half status, half enable.
pub(crate) const GPE0: (u16, u8) = (PORT + 0x20, 8);
/// General-purpose events there are.
pub const GPES: u32 = 32;

/// Which general-purpose event is whose. Each is edge-triggered: a handler `_E0x` in `\_GPE` notifies the device.
pub mod gpe {
    /// A PCI slot changed.
    pub const HOTPLUG: u32 = 1;
    /// The generation id changed.
    pub const GENERATION_ID: u32 = 2;
    /// The clock page changed.
    pub const CLOCK: u32 = 3;
}

/// First port of the i8042.
pub const I8042_PORT: u16 = 0x60;
/// Ports from its data to its command register; those between belong to others in a PC, here to nobody.
pub const I8042_PORTS: u16 = 5;

/// The sleep type that `\_S5` names and a guest writes to turn the machine off.
pub(crate) const SLP_TYP_S5: u8 = 5;

const POWER_BUTTON: u16 = 1 << 8;
/// TMR, GBL, PWRBTN, SLPBTN, RTC and PCIEXP_WAKE_DIS: the enable bits that ACPI defines.
const PM1_ENABLES: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 14;
const SCI_EN: u16 = 1 << 0;
/// BM_RLD, and SLP_TYP; GBL_RLS and SLP_EN are commands and read as zero.
const CONTROL_STORED: u16 = 1 << 1 | 7 << 10;
const SLP_EN: u16 = 1 << 13;

const PM_TIMER_HZ: u128 = 3_579_545;

/// What the guest asks of the machine's owner.
pub trait PowerEvents: Send + Sync {
    /// The guest entered S5: it is done. Called from a vCPU thread, which goes on until it is stopped.
    fn power_off(&self);
}

/// A guest's reset request.
pub trait ResetEvents: Send + Sync {
    /// Called from a vCPU thread, which goes on until it is stopped.
    fn reset(&self);
}

/// Saved [`PowerManagement`]; what it holds is untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerStateV1 {
    /// PM1 status.
    pub pm1_status: u16,
    /// PM1 enable.
    pub pm1_enable: u16,
    /// PM1 control.
    pub pm1_control: u16,
    /// GPE0 status.
    pub gpe_status: u32,
    /// GPE0 enable.
    pub gpe_enable: u32,
    /// The PM timer at the moment of saving: it continues from there.
    pub timer_ticks: u32,
}

struct Registers {
    pm1_status: u16,
    pm1_enable: u16,
    pm1_control: u16,
    gpe_status: u32,
    gpe_enable: u32,
    /// Enabled at some time since power-on.
    gpe_known: u32,
    timer_start: Instant,
    timer_base: u32,
    line: Arc<dyn IrqLine>,
    line_high: bool,
}

impl Registers {
    fn timer(&self) -> u32 {
        let ticks = self.timer_start.elapsed().as_nanos() * PM_TIMER_HZ / 1_000_000_000;
        self.timer_base.wrapping_add(ticks as u32)
    }

    /// Makes the line follow the registers.
    fn update_line(&mut self) {
        let high = self.pm1_status & self.pm1_enable != 0 || self.gpe_status & self.gpe_enable != 0;
        if high != self.line_high {
            self.line_high = high;
            self.line.set(high);
        }
    }

    fn byte(&self, offset: u64, timer: u32) -> u8 {
        let half = |word: u16, at: u64| word.to_le_bytes()[at as usize];
        let whole = |word: u32, at: u64| word.to_le_bytes()[at as usize];
        match offset {
            0x00..=0x01 => half(self.pm1_status, offset),
            0x02..=0x03 => half(self.pm1_enable, offset - 2),
            0x04..=0x05 => half(self.pm1_control | SCI_EN, offset - 4),
            0x08..=0x0b => whole(timer, offset - 8),
            0x20..=0x23 => whole(self.gpe_status, offset - 0x20),
            0x24..=0x27 => whole(self.gpe_enable, offset - 0x24),
            _ => 0xff,
        }
    }

    /// Writes one byte; true where it puts the machine into S5.
    fn set_byte(&mut self, offset: u64, value: u8) -> bool {
        let half = |word: u16, at: u64| replace(word.into(), at, value) as u16;
        match offset {
            0x00..=0x01 => self.pm1_status &= !(u16::from(value) << (8 * offset)),
            0x02..=0x03 => self.pm1_enable = half(self.pm1_enable, offset - 2) & PM1_ENABLES,
            0x04..=0x05 => {
                let written = half(self.pm1_control, offset - 4);
                self.pm1_control = written & CONTROL_STORED;
                return written & SLP_EN != 0 && written >> 10 & 7 == u16::from(SLP_TYP_S5);
            }
            0x20..=0x23 => self.gpe_status &= !(u32::from(value) << (8 * (offset - 0x20))),
            0x24..=0x27 => {
                self.gpe_enable = replace(self.gpe_enable, offset - 0x24, value);
                self.gpe_known |= self.gpe_enable;
            }
            _ => {}
        }
        false
    }
}

fn replace(word: u32, byte: u64, value: u8) -> u32 {
    let mut bytes = word.to_le_bytes();
    bytes[byte as usize] = value;
    u32::from_le_bytes(bytes)
}

/// The fixed hardware, a device for [`PORT`] and [`PORTS`].
pub struct PowerManagement {
    registers: Mutex<Registers>,
    events: Arc<dyn PowerEvents>,
}

impl PowerManagement {
    /// Hardware after power-on. `sci` is the line of [`SCI_GSI`].
    pub fn new(sci: Arc<dyn IrqLine>, events: Arc<dyn PowerEvents>) -> Self {
        let registers = Registers {
            pm1_status: 0,
            pm1_enable: 0,
            pm1_control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            gpe_known: 0,
            timer_start: Instant::now(),
            timer_base: 0,
            line: sci,
            line_high: false,
        };
        Self { registers: Mutex::new(registers), events }
    }

    /// Continues from `state`, with the line as the registers want it. To be called on new hardware, once the interrupt controllers
    /// have their state.
    pub fn restore(&self, state: &PowerStateV1) {
        let mut registers = self.lock();
        registers.pm1_status = state.pm1_status;
        registers.pm1_enable = state.pm1_enable & PM1_ENABLES;
        registers.pm1_control = state.pm1_control & CONTROL_STORED;
        registers.gpe_status = state.gpe_status;
        registers.gpe_enable = state.gpe_enable;
        registers.gpe_known = state.gpe_enable;
        registers.timer_base = state.timer_ticks;
        registers.timer_start = Instant::now();
        registers.update_line();
    }

    /// The registers at this moment; vCPUs must be paused for it to mean anything.
    pub fn save(&self) -> PowerStateV1 {
        let registers = self.lock();
        PowerStateV1 {
            pm1_status: registers.pm1_status,
            pm1_enable: registers.pm1_enable,
            pm1_control: registers.pm1_control,
            gpe_status: registers.gpe_status,
            gpe_enable: registers.gpe_enable,
            timer_ticks: registers.timer(),
        }
    }

    /// The power button is pressed: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        let mut registers = self.lock();
        registers.pm1_status |= POWER_BUTTON;
        registers.update_line();
    }

    /// General-purpose event `bit` happens. Events from [`GPES`] on do not exist and are ignored.
    pub fn raise_gpe(&self, bit: u32) {
        let mut registers = self.lock();
        registers.gpe_status |= 1u32.checked_shl(bit).unwrap_or(0);
        registers.update_line();
    }

    /// Whether the guest knows of general-purpose event `bit`: it has enabled it since power-on, or since this hardware was restored. While
    /// it handles one, Linux has it disabled.
    pub fn is_known(&self, bit: u32) -> bool {
        self.lock().gpe_known & 1u32.checked_shl(bit).unwrap_or(0) != 0
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl BusDevice for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let timer = registers.timer();
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = registers.byte(offset, timer);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut power_off = false;
        {
            let mut registers = self.lock();
            for (byte, offset) in data.iter().zip(offset..) {
                power_off |= registers.set_byte(offset, *byte);
            }
            registers.update_line();
        }
        if power_off {
            self.events.power_off();
        }
    }
}

/// As much of an i8042 as resets the machine: command 0xfe. A device for [`I8042_PORT`] and [`I8042_PORTS`].
///
/// Linux writes it when the ACPI reset register did not do. Its status reads as zero: ready for a command.
pub struct I8042Reset {
    events: Arc<dyn ResetEvents>,
}

impl I8042Reset {
    /// A controller that asks `events` for the reset.
    pub fn new(events: Arc<dyn ResetEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042Reset {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = if matches!(offset, 0 | 4) { 0 } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data) == (4, &[0xfe]) {
            self.events.reset();
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
