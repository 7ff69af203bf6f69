//! The monitor's own memory: what it costs beyond the guest's RAM.
//!
//! The proportional set size (`Pss`, `Documentation/filesystems/proc.rst`) of every mapping in `/proc/PID/smaps` but that of guest
//! RAM: Civic's memfd by its name, QEMU's private memory by its size. A page shared with other processes counts by its share.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

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

/// What all of these processes cost together, in bytes: their proportional set sizes, and what of their memfds nobody has mapped.
pub fn of_all(pids: &[u32]) -> Result<u64> {
    let (mut all, mut mapped, mut memfds) = (0, 0, BTreeMap::new());
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("a monitor is gone")?;
        let field = |name| rolled_up(&text, name).with_context(|| format!("no {name} in {text}"));
        all += field("Pss:")?;
        mapped += field("Pss_Shmem:")?;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let to = fs::read_link(entry.path()).unwrap_or_default();
            if let (true, Ok(about)) = (to.to_string_lossy().starts_with("/memfd:"), fs::metadata(entry.path())) {
                memfds.insert((about.dev(), about.ino()), about.blocks() * 512);
            }
        }
    }
    Ok(all + memfds.values().sum::<u64>().saturating_sub(mapped))
}

fn rolled_up(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

/// The process whose command line begins with a program of this name and these arguments.
pub fn process_with(name: &str, arguments: &[&str]) -> Option<u32> {
    let is = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut words = line.split('\0');
        words.next().is_some_and(|program| program.rsplit('/').next() == Some(name))
            && arguments.iter().all(|argument| words.next() == Some(argument))
    };
    fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is)
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
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

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
    fn rollups() {
        let text = "5581-7ffd ---p 00000000 00:00 0    [rollup]\nRss:    9 kB\nPss:            1024 kB\nPss_Shmem:         3 kB\n";
        assert_eq!((rolled_up(text, "Pss:"), rolled_up(text, "Pss_Shmem:")), (Some(1 << 20), Some(3 << 10)));
        assert_eq!((rolled_up(text, "Swap:"), rolled_up("Pss: x kB", "Pss:")), (None, None));
        assert!(of_all(&[std::process::id()]).unwrap() > 0);
    }

    #[test]
    fn processes_are_known_by_their_command_line() {
        let own = format!("of-{}", std::process::id());
        let mut command = Command::new("cat");
        let mut child = command.args(["-", &own]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It has a command line of its own when it says something.
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let found = process_with("cat", &["-", &own]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, Some(child.id()));
        assert_eq!(process_with("cat", &["-", "of-nobody"]), None);
    }

    #[test]
    fn this_process_has_no_guest() {
        assert!(of(std::process::id(), 5 << 40).is_err());
    }
}
