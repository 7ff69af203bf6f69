//! The monitor's own memory: what it costs beyond the guest's RAM.
//!
//! The proportional set size (`Pss`, `Documentation/filesystems/proc.rst`) of every mapping in `/proc/PID/smaps` but that of guest
//! RAM: Civic's memfd by its name, QEMU's private memory by its size. A page shared with other processes counts by its share.

use std::fs;

use anyhow::{Context, Result, ensure};

/// The memfd of guest RAM in `civic-vmm`.
const GUEST_RAM: &str = "/memfd:civic-ram";

/// A process's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Beyond guest RAM.
    pub own: u64,
    /// Guest RAM.
    pub guest: u64,
}

/// Of a monitor whose guest has so much RAM, in one piece. Fails if its guest RAM is not to be told from the rest.
pub fn of(pid: u32, ram: u64) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read the monitor's smaps")?;
    let memory = parse(&text, ram)?;
    ensure!(memory.guest > 0, "process {pid} has no guest RAM");
    Ok(memory)
}

/// `smaps`: for each mapping a head `start-end perms offset dev inode   path` and lines `Name:   number kB`.
fn parse(smaps: &str, ram: u64) -> Result<Memory> {
    let mut memory = Memory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let bytes = words.next().and_then(|n| n.parse::<u64>().ok()).map(|kib| kib << 10);
        match first {
            "Size:" => is_guest |= bytes == Some(ram),
            "Pss:" => {
                *(if is_guest { &mut memory.guest } else { &mut memory.own }) += bytes.context("a strange Pss")?
            }
            field if field.ends_with(':') => {}
            _ => is_guest = line.contains(GUEST_RAM),
        }
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_does_not_count() {
        let smaps = "55d0-55d9 r-xp 00000000 08:01 123    /usr/bin/civic-vmm\nSize: 9 kB\nRss: 8 kB\nPss: 7 kB\nPss_Dirty: 5 kB\n\
                     7f00-7f99 rw-s 00000000 00:01 1027    /memfd:civic-ram (deleted)\nSize: 9 kB\nPss:   1024 kB\nVmFlags: rd wr\n\
                     7fa0-7fa9 rw-p 00000000 00:00 0 \nSize: 9 kB\nPss: 3 kB\nPss_Anon: 3 kB\n\
                     7fb0-7fb9 rw-p 00000000 00:00 0 \nSize: 4096 kB\nPss: 1 kB\n";
        assert_eq!(parse(smaps, 4 << 20).unwrap(), Memory { own: 10 << 10, guest: 1025 << 10 });
        assert!(parse("7f-80 rw-p 0 0 0\nPss: x kB\n", 1).is_err());
    }

    #[test]
    fn this_process_has_no_guest() {
        assert!(of(std::process::id(), 5 << 40).is_err());
    }
}
