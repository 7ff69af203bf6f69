//! What a reader must know of the host to read the figures.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::guest::said;
use super::machine::Tools;

/// The host where guests run.
pub struct Facts {
    /// Whether times mean something.
    pub testbed: bool,
    /// What it is, a line each.
    pub lines: Vec<(&'static str, String)>,
}

impl Facts {
    /// The word for it in JSON.
    pub fn place(&self) -> &'static str {
        if self.testbed { "testbed" } else { "hardware" }
    }
}

/// Looks at this host.
pub fn gather(tools: &Tools) -> Result<Facts> {
    let testbed = std::env::var_os("TESTBED").is_some();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let cpus = std::thread::available_parallelism()?;
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    let thp = |file: &str| {
        let text = read(&format!("/sys/kernel/mm/transparent_hugepage/{file}")).unwrap_or_default();
        chosen(&text).unwrap_or("?").to_owned()
    };
    let place = if testbed {
        "the TESTBED: a host emulated by QEMU's TCG. Figures marked * mean nothing by themselves; ratios do, roughly"
    } else {
        "hardware"
    };
    let version = said(tools.qemu_version())?;
    Ok(Facts {
        testbed,
        lines: vec![
            ("host", place.to_owned()),
            ("CPU", format!("{cpus} x {}", model(&cpuinfo))),
            ("kernel", read("/proc/sys/kernel/osrelease").unwrap_or_default()),
            ("THP", format!("{}, shmem {}", thp("enabled"), thp("shmem_enabled"))),
            ("governor", governor.unwrap_or_else(|| "none".to_owned())),
            ("QEMU", version.lines().next().unwrap_or_default().to_owned()),
            ("vhost", if Path::new("/dev/vhost-net").exists() { "there" } else { "not there" }.to_owned()),
        ],
    })
}

fn model(cpuinfo: &str) -> &str {
    let line = cpuinfo.lines().find_map(|l| l.strip_prefix("model name"));
    line.and_then(|l| l.split_once(':')).map_or("unknown", |(_, name)| name.trim())
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
    }
}
