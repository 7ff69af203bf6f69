//! The monitor's own memory: what it costs beyond the guest's RAM.
//!
//! The proportional set size (`Pss`, `Documentation/filesystems/proc.rst`) of every mapping in `/proc/PID/smaps` but those of the
//! memfd that is guest RAM. A page shared with other processes counts by its share.

use std::fs;

use anyhow::{Context, Result, ensure};

/// What the monitors call the memfd of guest RAM: `civic-vmm`, and QEMU with `memory-backend-memfd`.
const GUEST_RAM: [&str; 2] = ["/memfd:civic-ram", "/memfd:memory-backend-memfd"];

/// A process's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Beyond guest RAM.
    pub own: u64,
    /// Guest RAM.
    pub guest: u64,
}

/// Of a monitor. Fails if its guest RAM is not to be told from the rest.
pub fn of(pid: u32) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read the monitor's smaps")?;
    let memory = parse(&text)?;
    ensure!(memory.guest > 0, "process {pid} has no guest RAM");
    Ok(memory)
}

/// `smaps`: for each mapping a head `start-end perms offset dev inode   path` and lines `Name:   number kB`.
fn parse(smaps: &str) -> Result<Memory> {
    let mut memory = Memory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let Some(first) = line.split_whitespace().next() else { continue };
        if !first.ends_with(':') {
            is_guest = GUEST_RAM.iter().any(|name| line.contains(name));
        } else if first == "Pss:" {
            let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).context("a strange Pss")?;
            *(if is_guest { &mut memory.guest } else { &mut memory.own }) += kib << 10;
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
                     7f00-7f99 rw-s 00000000 00:01 1027    /memfd:civic-ram (deleted)\nPss:   1024 kB\nVmFlags: rd wr\n\
                     7fa0-7fa9 rw-p 00000000 00:00 0 \nPss: 3 kB\nPss_Anon: 3 kB\n\
                     7fb0-7fb9 rw-s 00000000 00:01 9    /memfd:memory-backend-memfd (deleted)\nPss: 1 kB\n";
        assert_eq!(parse(smaps).unwrap(), Memory { own: 10 << 10, guest: 1025 << 10 });
        assert!(parse("7f-80 rw-p 0 0 0\nPss: x kB\n").is_err());
    }

    #[test]
    fn this_process_has_no_guest() {
        assert!(of(std::process::id()).is_err());
    }
}
