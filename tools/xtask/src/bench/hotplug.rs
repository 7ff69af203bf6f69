//! A device plugged into a running guest, until the guest can use it: beside QEMU's `device_add` into a root port of its `q35`.
//!
//! ```text
//!  guest:  (begins to look, without a pause) ………………………………… finds it, reads it ─▶ says so
//!  host:                     asks the monitor ─────────────────────────────────────▶ hears it
//! ```
//!
//! Both guests are up all the time, the same kernel and initramfs with the same loop that looks; who is not measured stands still. What the
//! device is made of is there beforehand at QEMU's (`blockdev-add`, `netdev_add`); Civic opens it within its call.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_bench::report::{Peer, Promise, Report, Row};
use civic_bench::stats::Samples;
use serde_json::{Value, json};

use super::clock::Clock;
use super::guest::Guest;
use super::machine::{Image, Monitor, Spec, Tools, Userland, line};
use super::net::Tap;
use super::progress;
use super::qmp::Qmp;

const MEMORY_MIB: u32 = 256;
const CPUS: u8 = 1;
const DISK: u64 = 4 << 20;
const MAC: &str = "52:54:00:0b:00:77";
/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// The time, as a share of QEMU's.
const TIME: f64 = 1.0;

/// A kind of device, by how the guest looks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Disk,
    Net,
}

impl Device {
    const BOTH: [Self; 2] = [Self::Disk, Self::Net];

    fn name(self) -> &'static str {
        match self {
            Self::Disk => "blk",
            Self::Net => "net",
        }
    }

    /// Ends when the guest has read the disk, or the card's link is up.
    fn look(self) -> &'static str {
        match self {
            Self::Disk => "until dd if=/dev/vda of=/dev/null bs=4k count=1 2>/dev/null; do :; done",
            Self::Net => {
                "until ip link set eth0 up 2>/dev/null && read c < /sys/class/net/eth0/carrier && [ $c = 1 ]; do :; done 2>/dev/null"
            }
        }
    }

    /// Ends when it is gone.
    fn miss(self) -> &'static str {
        match self {
            Self::Disk => "while [ -e /sys/block/vda ]; do :; done",
            Self::Net => "while [ -e /sys/class/net/eth0 ]; do :; done",
        }
    }
}

/// What the devices are made of.
struct Parts {
    image: PathBuf,
    /// One for each monitor: QEMU keeps its own for a while.
    taps: [Tap; 2],
}

/// A monitor with a guest into which devices are plugged.
trait Plugs {
    /// Lets the guest run.
    fn resume(&mut self) -> Result<()>;
    /// Has it stand still.
    fn halt(&mut self) -> Result<()>;
    /// What need not be measured.
    fn prepare(&mut self, device: Device, parts: &Parts) -> Result<()>;
    fn plug(&mut self, device: Device, parts: &Parts) -> Result<()>;
    /// Until it is gone, for the monitor too.
    fn unplug(&mut self, device: Device) -> Result<()>;
    fn begin(&mut self, command: &str) -> Result<()>;
    /// When it ended.
    fn end(&mut self, command: &str) -> Result<Instant>;
}

struct Civic<'a>(Guest<'a>);

impl Plugs for Civic<'_> {
    fn resume(&mut self) -> Result<()> {
        self.0.ask("POST", "/v1/resume", &Value::Null).map(drop)
    }

    fn halt(&mut self) -> Result<()> {
        self.0.ask("POST", "/v1/pause", &Value::Null).map(drop)
    }

    fn prepare(&mut self, _: Device, _: &Parts) -> Result<()> {
        Ok(())
    }

    fn plug(&mut self, device: Device, parts: &Parts) -> Result<()> {
        let (path, body) = match device {
            Device::Disk => ("/v1/devices/disks", json!({ "id": "plugged", "path": parts.image })),
            Device::Net => ("/v1/devices/nets", json!({ "id": "plugged", "tap": parts.taps[0].name, "mac": MAC })),
        };
        self.0.ask("POST", &format!("{path}?wait_ms=0"), &body).map(drop)
    }

    fn unplug(&mut self, _: Device) -> Result<()> {
        self.0.ask("DELETE", "/v1/devices/plugged?wait_ms=60000", &Value::Null).map(drop)
    }

    fn begin(&mut self, command: &str) -> Result<()> {
        self.0.begin(command, PATIENCE)
    }

    fn end(&mut self, command: &str) -> Result<Instant> {
        Ok(self.0.end(command, PATIENCE)?.1)
    }
}

struct Qemu<'a> {
    guest: Guest<'a>,
    qmp: Qmp,
}

impl Plugs for Qemu<'_> {
    fn resume(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({}), PATIENCE)?;
        self.qmp.event("RESUME", PATIENCE).map(drop)
    }

    fn halt(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}), PATIENCE)?;
        self.qmp.event("STOP", PATIENCE).map(drop)
    }

    fn prepare(&mut self, device: Device, parts: &Parts) -> Result<()> {
        let (command, arguments) = match device {
            Device::Disk => {
                let file = json!({ "driver": "file", "filename": parts.image });
                ("blockdev-add", json!({ "driver": "raw", "node-name": "made", "file": file }))
            }
            Device::Net => (
                "netdev_add",
                json!({ "type": "tap", "id": "made", "ifname": parts.taps[1].name, "script": "no", "downscript": "no", "vhost": false }),
            ),
        };
        self.qmp.insist(command, &arguments, PATIENCE)
    }

    fn plug(&mut self, device: Device, _: &Parts) -> Result<()> {
        let arguments = match device {
            Device::Disk => json!({ "driver": "virtio-blk-pci", "id": "plugged", "bus": "rp0", "drive": "made" }),
            Device::Net => {
                json!({ "driver": "virtio-net-pci", "id": "plugged", "bus": "rp0", "netdev": "made", "mac": MAC })
            }
        };
        self.qmp.execute("device_add", arguments, PATIENCE).map(drop)
    }

    fn unplug(&mut self, device: Device) -> Result<()> {
        self.qmp.execute("device_del", json!({ "id": "plugged" }), PATIENCE)?;
        self.qmp.event("DEVICE_DELETED", PATIENCE)?;
        let (command, arguments) = match device {
            Device::Disk => ("blockdev-del", json!({ "node-name": "made" })),
            Device::Net => ("netdev_del", json!({ "id": "made" })),
        };
        self.qmp.insist(command, &arguments, PATIENCE)
    }

    fn begin(&mut self, command: &str) -> Result<()> {
        self.guest.begin(command, PATIENCE)
    }

    fn end(&mut self, command: &str) -> Result<Instant> {
        Ok(self.guest.end(command, PATIENCE)?.1)
    }
}

/// Measures and reports.
pub fn run(tools: &Tools, clock: &Clock, quick: bool, rounds: Option<u16>, report: &mut Report) -> Result<()> {
    let rounds = rounds.map_or(if quick { 5 } else { 30 }, usize::from);
    let parts = Parts { image: tools.work.join("plugged.img"), taps: [Tap::new(7)?, Tap::new(8)?] };
    File::create(&parts.image)?.set_len(DISK)?;
    let control = tools.work.join("hotplug.qmp");
    let spec = |monitor, more: Vec<String>| Spec {
        monitor,
        image: Image::BzImage,
        userland: Userland::Bench,
        cpus: CPUS,
        memory_mib: MEMORY_MIB,
        cmdline: "civic.bench=hotplug".to_owned(),
        disks: Vec::new(),
        taps: Vec::new(),
        vsock: None,
        more,
    };
    let (ours, peer) = (spec(Monitor::Civic, Vec::new()), spec(Monitor::Q35, options(&control)));
    for (name, spec) in [("civic", &ours), ("qemu q35", &peer)] {
        report.command(name, line(&tools.command(spec, "NAME")));
    }
    let mut civic = Civic(booted(tools, &ours)?);
    civic.halt()?;
    let guest = booted(tools, &peer)?;
    let mut qemu = Qemu { guest, qmp: Qmp::connect(&control, PATIENCE)? };
    qemu.halt()?;
    for device in Device::BOTH {
        let (mut coming, mut going) =
            ([Samples::default(), Samples::default()], [Samples::default(), Samples::default()]);
        // The first round warms up.
        for round in 0..=rounds {
            progress(&format!("plugging, {}: round {round} of {rounds}", device.name()));
            for who in [round % 2, (round + 1) % 2] {
                let plugs: &mut dyn Plugs = if who == 0 { &mut civic } else { &mut qemu };
                let (came, went) = once(plugs, device, &parts, clock)
                    .with_context(|| format!("round {round} of {}, {}", ["civic", "qemu"][who], device.name()))?;
                if round > 0 {
                    coming[who].push(came);
                    going[who].push(went);
                }
            }
        }
        let mut row = |name: String, promise, [ours, peer]: [Samples; 2]| {
            let peer = Peer::in_turns("qemu q35", "root port, ACPI", peer);
            report.add(Row::new(name, "ms", ours).promised(promise).beside(peer));
        };
        row(format!("hotplug.{}", device.name()), Promise::RatioAtMost(TIME), coming);
        row(format!("hotplug.{}.removed", device.name()), Promise::None, going);
    }
    Ok(())
}

/// A root port to plug into, and where QEMU is asked to.
fn options(control: &Path) -> Vec<String> {
    let qmp = format!("unix:{},server=on,wait=off", control.display());
    ["-device", "pcie-root-port,id=rp0,chassis=1,slot=1", "-qmp", &qmp].map(str::to_owned).into()
}

fn booted<'a>(tools: &'a Tools, spec: &Spec) -> Result<Guest<'a>> {
    progress(&format!("booting {}", spec.monitor.name()));
    let mut guest = Guest::start(tools, spec)?;
    guest.wait_ready()?;
    Ok(guest)
}

/// How long until the guest could use it, and until it had none any more, in milliseconds.
fn once(plugs: &mut dyn Plugs, device: Device, parts: &Parts, clock: &Clock) -> Result<(f64, f64)> {
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    plugs.resume()?;
    plugs.prepare(device, parts)?;
    plugs.begin(device.look())?;
    let (mark, call) = (clock.mark(), Instant::now());
    plugs.plug(device, parts)?;
    let usable = plugs.end(device.look())?;
    let came = ms(call, usable) / clock.stretch(&mark)?;
    ensure!(usable > call, "the guest had it before it was plugged in");
    plugs.begin(device.miss())?;
    let (mark, call) = (clock.mark(), Instant::now());
    plugs.unplug(device)?;
    let went = ms(call, plugs.end(device.miss())?) / clock.stretch(&mark)?;
    plugs.halt()?;
    Ok((came, went))
}
