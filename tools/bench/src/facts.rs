//! What a reader must know of the host to read the figures.

use std::fs;
use std::process::Command;

use crate::record::Where;

/// The host where guests run.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What it is.
    pub place: Where,
    /// More of it, a line each.
    pub lines: Vec<(String, String)>,
}

impl Facts {
    /// Looks at this host, where guests run that are of our own code (`bare`) or stock ones.
    pub fn gather(bare: bool) -> Self {
        let place = match std::env::var_os("TESTBED") {
            Some(_) => Where::Testbed,
            None if bare => Where::Bare,
            None => Where::Hardware,
        };
        let what = match place {
            Where::Testbed => {
                "the TESTBED: a host emulated by QEMU's TCG. Times mean nothing by themselves; ratios do, roughly"
            }
            Where::Bare => "this machine; the guests are bare-metal code of our own",
            Where::Hardware => "hardware",
        };
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let thp = |file: &str| {
            let text = read(&format!("/sys/kernel/mm/transparent_hugepage/{file}")).unwrap_or_default();
            chosen(&text).unwrap_or("?").to_owned()
        };
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
        let load = read("/proc/loadavg").unwrap_or_default();
        let memory = read("/proc/meminfo").unwrap_or_default();
        let lines = [
            ("host", what.to_owned()),
            ("CPU", format!("{cpus} x {}", model(&cpuinfo))),
            ("memory", format!("{} GiB", gib(&memory))),
            ("kernel", read("/proc/sys/kernel/osrelease").unwrap_or_default()),
            ("THP", format!("{}, shmem {}", thp("enabled"), thp("shmem_enabled"))),
            ("governor", governor.unwrap_or_else(|| "none".to_owned())),
            ("load", format!("{} before it began (of a minute)", load.split(' ').next().unwrap_or_default())),
            ("date", now()),
        ];
        Self { place, lines: lines.map(|(name, fact)| (name.to_owned(), fact)).into() }
    }

    /// With another one.
    pub fn with(mut self, name: &str, fact: impl Into<String>) -> Self {
        self.lines.push((name.to_owned(), fact.into()));
        self
    }
}

/// The day and time, in UTC.
fn now() -> String {
    let out = Command::new("date").args(["-u", "+%F %H:%M UTC"]).output();
    out.map_or_else(|_| "unknown".to_owned(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn model(cpuinfo: &str) -> &str {
    let line = cpuinfo.lines().find_map(|l| l.strip_prefix("model name"));
    line.and_then(|l| l.split_once(':')).map_or("unknown", |(_, name)| name.trim())
}

/// Of all memory, rounded.
fn gib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0);
    (kib + (1 << 19)) >> 20
}

/// The word in brackets: how sysfs shows a choice.
fn chosen(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always"), None);
        assert_eq!(model("processor\t: 0\nmodel name\t: AMD EPYC: Rome\nmodel name\t: x\n"), "AMD EPYC: Rome");
        assert_eq!(model(""), "unknown");
        assert_eq!((gib("MemTotal:       24576000 kB\nMemFree: 1 kB\n"), gib("")), (23, 0));
    }

    #[test]
    fn every_fact_that_is_promised_is_told() {
        let facts = Facts::gather(true).with("QEMU", "none");
        for name in ["host", "CPU", "kernel", "THP", "governor", "load", "date", "QEMU"] {
            assert!(facts.lines.iter().any(|(n, fact)| n == name && !fact.is_empty()), "{name}: {facts:?}");
        }
    }
}
