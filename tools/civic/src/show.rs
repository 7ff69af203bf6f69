//! What is shown: lists, a VM, the host, manual pages. Text for eyes, JSON for programs.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use civic_api::doctor::{Report, Status};
use civic_api::{ByteSize, SaveProgress, VmInfo, VmState};
use clap::CommandFactory;
use serde::Serialize;

use crate::cli::Cli;
use crate::rundir::{Found, RunDir};
use crate::table::{printable, table};
use crate::{advice, balloon, monitor, on};

/// A line of `civic list --json`.
#[derive(Serialize)]
struct Listed {
    name: String,
    /// As in [`VmState`], or `dead` or `unresponsive`.
    state: &'static str,
    /// The monitor's own answer; null if there is none.
    info: Option<Box<VmInfo>>,
    log: PathBuf,
}

impl Listed {
    fn new(dir: &RunDir, name: String, found: Found) -> Self {
        let log = dir.log(&name);
        match found {
            Found::Alive(info) => Self { name, state: info.state.as_str(), info: Some(info), log },
            Found::Silent => Self { name, state: "unresponsive", info: None, log },
            Found::Dead => Self { name, state: "dead", info: None, log },
        }
    }

    fn row(&self) -> [String; 7] {
        let info = |show: &dyn Fn(&VmInfo) -> String| self.info.as_deref().map(show).unwrap_or_default();
        [
            self.name.clone(),
            self.state.to_owned(),
            info(&|i| i.pid.to_string()),
            info(&|i| i.cpus.to_string()),
            info(&|i| ByteSize(i.memory_bytes).to_string()),
            info(&|i| duration(i.run_ms)),
            info(&|i| i.boots.to_string()),
        ]
    }
}

/// `civic list`.
pub async fn list(dir: &RunDir, json: bool) -> anyhow::Result<()> {
    // All at once: one that hangs must not add its time to the others'.
    let shared = Arc::new(RunDir::new(dir.path())?);
    let tasks: Vec<_> = dir
        .names()?
        .into_iter()
        .map(|name| {
            let dir = shared.clone();
            tokio::spawn(async move {
                let found = dir.find(&name).await;
                Listed::new(&dir, name, found)
            })
        })
        .collect();
    let mut vms = Vec::new();
    for task in tasks {
        vms.push(task.await?);
    }
    // Ended orderly while we looked.
    vms.retain(|vm| vm.state != "dead" || vm.log.exists());
    if json {
        return print_json(&vms);
    }
    let rows: Vec<_> = vms.iter().map(Listed::row).collect();
    print(&table(["NAME", "STATE", "PID", "CPUS", "MEMORY", "RUNS", "BOOTS"], &rows))?;
    for vm in vms.iter().filter(|vm| vm.info.is_none()) {
        let _ = writeln!(std::io::stderr(), "{} is {}: see {}", vm.name, vm.state, vm.log.display());
    }
    Ok(())
}

/// `civic info`.
pub async fn info(dir: &RunDir, name: &str, json: bool) -> anyhow::Result<()> {
    let info = on(dir, name, async |vm| vm.info().await).await?;
    if json { print_json(&info) } else { print(&describe(&info)) }
}

fn describe(info: &VmInfo) -> String {
    let mut lines = vec![
        ("name", info.name.clone()),
        ("state", info.state.to_string()),
        ("monitor", format!("process {}, version {}", info.pid, info.version)),
        ("vcpus", info.cpus.to_string()),
        ("memory", ByteSize(info.memory_bytes).to_string()),
        ("kernel", info.kernel.display().to_string()),
        ("runs for", duration(info.run_ms)),
        ("boots", info.boots.to_string()),
        ("consoles", info.consoles.join(", ")),
    ];
    if let Some(balloon) = &info.balloon {
        lines.push(("balloon", balloon::summary(balloon)));
    }
    if let Some(SaveProgress { bytes_done, bytes_total }) = info.saving {
        lines.push(("saving", format!("{} of {}", ByteSize(bytes_done), ByteSize(bytes_total))));
    }
    if let Some(ended) = &info.ended {
        lines.push(("ended", format!("{ended:?}")));
    }
    if matches!(info.state, VmState::Waiting | VmState::Created) {
        lines.retain(|(key, _)| *key != "runs for");
    }
    let mut text = String::new();
    for (key, value) in lines {
        text.push_str(&format!("{:10}{}\n", format!("{key}:"), printable(&value)));
    }
    let devices: Vec<_> = info
        .devices
        .iter()
        .map(|device| {
            let settings: Vec<_> = device.settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let counters: Vec<_> = device.counters.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let address = device.address.clone().unwrap_or_default();
            [device.id.clone(), device.kind.clone(), address, settings.join(" "), counters.join(" ")]
        })
        .collect();
    text.push_str(&format!("\n{}", table(["DEVICE", "KIND", "ADDRESS", "SETTINGS", "COUNTERS"], &devices)));
    let vcpus: Vec<_> = info
        .vcpus
        .iter()
        .map(|vcpu| {
            let exits: Vec<_> = vcpu.exits.iter().map(|(reason, count)| format!("{reason}={count}")).collect();
            [vcpu.index.to_string(), exits.join(" ")]
        })
        .collect();
    text.push_str(&format!("\n{}", table(["VCPU", "EXITS"], &vcpus)));
    let programs: Vec<_> = info
        .programs
        .iter()
        .map(|program| {
            let state = if program.started { duration(program.age_ms) } else { "being started".into() };
            [program.id.to_string(), state, program.argv.join(" ")]
        })
        .collect();
    if !programs.is_empty() {
        text.push_str(&format!("\n{}", table(["PROGRAM", "RUNS", "COMMAND"], &programs)));
    }
    text
}

/// `civic doctor`: an error if VMs cannot run here.
pub fn doctor(dir: &RunDir, json: bool) -> anyhow::Result<()> {
    let report: Report = serde_json::from_slice(&monitor::doctor(dir.path())?).map_err(|error| {
        advice::error(
            format!("civic-vmm's report makes no sense: {error}"),
            "set CIVIC_VMM to a civic-vmm of this version",
        )
    })?;
    if json {
        print_json(&report)?;
    } else {
        print(&examination(&report))?;
    }
    if report.can_run {
        return Ok(());
    }
    let failed: Vec<_> =
        report.checks.iter().filter(|check| check.status == Status::Fail).map(|check| check.name.as_str()).collect();
    let message = format!("VMs cannot run on this host ({})", failed.join(", "));
    Err(advice::error(message, "mend what is marked 'fail' above"))
}

fn examination(report: &Report) -> String {
    let rows: Vec<_> = report
        .checks
        .iter()
        .map(|check| [check.status.as_str().to_owned(), check.name.clone(), check.found.clone()])
        .collect();
    let mut text = table(["STATUS", "CHECK", "FOUND"], &rows);
    for check in report.checks.iter().filter(|check| check.status != Status::Ok) {
        text.push_str(&format!("\n{}: {}\n", printable(&check.name), printable(&check.why)));
        if let Some(fix) = &check.fix {
            text.push_str(&format!("  {}\n", printable(fix)));
        }
    }
    text
}

/// `civic man`.
pub fn man(command: Option<&str>) -> anyhow::Result<()> {
    let mut civic = Cli::command();
    civic.build();
    let page = match command {
        None => civic,
        Some(name) => {
            let found = subcommand(&civic, name).cloned();
            found.ok_or_else(|| advice::error(format!("there is no command '{name}'"), "'civic help' lists them"))?
        }
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    Ok(std::io::stdout().write_all(&text)?)
}

/// The command that is called so, by the name of its page: `device-add`.
fn subcommand<'a>(of: &'a clap::Command, name: &str) -> Option<&'a clap::Command> {
    of.find_subcommand(name).or_else(|| {
        let (first, rest) = name.split_once('-')?;
        subcommand(of.find_subcommand(first)?, rest)
    })
}

pub fn print(text: &str) -> anyhow::Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// A time as people say it: `0.4s`, `59s`, `3m20s`, `2h05m`, `3d04h`.
pub fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..10 => format!("{s}.{}s", ms % 1000 / 100),
        10..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use civic_api::doctor::Check;
    use civic_api::{BalloonInfo, DeviceInfo, GuestAnswer, VcpuInfo};

    #[test]
    fn commands_within_commands_have_pages() {
        let mut civic = Cli::command();
        civic.build();
        let found = |name: &str| subcommand(&civic, name).map(clap::Command::get_name);
        assert_eq!((found("device"), found("device-add"), found("run")), (Some("device"), Some("add"), Some("run")));
        assert_eq!((found("device-fly"), found("add"), found("")), (None, None, None));
    }

    fn vm() -> VmInfo {
        VmInfo {
            name: "web".into(),
            state: VmState::Running,
            pid: 42,
            version: "0.1.0".into(),
            cpus: 2,
            memory_bytes: 3 << 29,
            kernel: "/boot/vmlinuz".into(),
            audit: None,
            boots: 1,
            started_at_ms: Some(0),
            run_ms: 200_000,
            devices: vec![DeviceInfo {
                id: "disk0".into(),
                kind: "blk".into(),
                address: Some("0000:00:03.0".into()),
                settings: [("path".to_owned(), "/r.img".to_owned()), ("queues".to_owned(), "4".to_owned())].into(),
                counters: [("read_bytes".to_owned(), 512), ("reads".to_owned(), 1)].into(),
                driver: Some(true),
                guest: GuestAnswer::Unasked,
                leaving: false,
            }],
            vcpus: vec![VcpuInfo { index: 0, exits: [("hlt".to_owned(), 7)].into() }],
            consoles: vec!["serial".into()],
            programs: vec![],
            balloon: None,
            family: civic_api::Family::default(),
            saving: None,
            ended: None,
        }
    }

    #[test]
    fn times() {
        let check = |ms, text: &str| assert_eq!(duration(ms), text);
        check(450, "0.4s");
        check(59_999, "59s");
        check(200_000, "3m20s");
        check(7_500_000, "2h05m");
        check(273_600_000, "3d04h");
    }

    #[test]
    fn a_list() {
        let dir = RunDir::new("/r".as_ref()).unwrap();
        let vms = [
            Listed::new(&dir, "web".into(), Found::Alive(Box::new(vm()))),
            Listed::new(&dir, "old".into(), Found::Dead),
            Listed::new(&dir, "stuck".into(), Found::Silent),
        ];
        let rows: Vec<_> = vms.iter().map(Listed::row).collect();
        let text = table(["NAME", "STATE", "PID", "CPUS", "MEMORY", "RUNS", "BOOTS"], &rows);
        assert_eq!(
            text,
            "NAME   STATE         PID  CPUS  MEMORY  RUNS   BOOTS\n\
             web    running       42   2     1.5G    3m20s  1\n\
             old    dead          -    -     -       -      -\n\
             stuck  unresponsive  -    -     -       -      -\n"
        );
        let json = serde_json::to_value(&vms[1]).unwrap();
        assert_eq!(json, serde_json::json!({"name": "old", "state": "dead", "info": null, "log": "/r/old/vmm.log"}));
    }

    #[test]
    fn a_vm() {
        assert_eq!(
            describe(&vm()),
            "name:     web\nstate:    running\nmonitor:  process 42, version 0.1.0\nvcpus:    2\nmemory:   1.5G\n\
             kernel:   /boot/vmlinuz\nruns for: 3m20s\nboots:    1\nconsoles: serial\n\n\
             DEVICE  KIND  ADDRESS       SETTINGS              COUNTERS\n\
             disk0   blk   0000:00:03.0  path=/r.img queues=4  read_bytes=512 reads=1\n\n\
             VCPU  EXITS\n0     hlt=7\n"
        );
    }

    #[test]
    fn a_vm_with_a_balloon_that_is_being_saved() {
        let balloon = BalloonInfo { target_bytes: 1 << 30, actual_bytes: 1 << 29, ..BalloonInfo::default() };
        let saving = SaveProgress { bytes_done: 1 << 20, bytes_total: 4 << 20 };
        let program =
            |id, started| civic_api::ProgramInfo { id, argv: vec!["ps".into(), "aux".into()], age_ms: 61_000, started };
        let programs = vec![program(3, true), program(4, false)];
        let text = describe(&VmInfo { programs, balloon: Some(balloon), saving: Some(saving), ..vm() });
        assert!(text.contains("3        1m01s          ps aux\n"), "{text}");
        assert!(text.contains("4        being started  ps aux\n"), "{text}");
        assert!(text.contains("\nballoon:  has 512M of 1G\nsaving:   1M of 4M\n"), "{text}");
    }

    #[test]
    fn an_examination() {
        let check = |name: &str, status, fix: Option<&str>| Check {
            name: name.into(),
            status,
            found: "x".into(),
            why: "it matters".into(),
            fix: fix.map(Into::into),
        };
        let checks = vec![check("kvm", Status::Fail, Some("modprobe kvm")), check("memfd", Status::Ok, None)];
        assert_eq!(
            examination(&Report::new("0.1.0", checks)),
            "STATUS  CHECK  FOUND\nfail    kvm    x\nok      memfd  x\n\nkvm: it matters\n  modprobe kvm\n"
        );
    }
}
