//! `civic device`: plugs devices into running VMs, and removes them.

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use civic_api::{ConsoleConfig, DeviceInfo, GuestAnswer, NewDevice, PluggedDevice, VmInfo};

use crate::cli::{DeviceCommand, NewDevices, absolute};
use crate::rundir::RunDir;
use crate::show::{print, print_json};
use crate::table::table;
use crate::{advice, explain, on};

/// What `civic device` does.
pub async fn device(dir: &RunDir, command: DeviceCommand) -> anyhow::Result<()> {
    match command {
        DeviceCommand::Add { name, devices, wait, json } => add(dir, &name, &devices, wait, json).await,
        DeviceCommand::Remove { name, ids, wait, force } => remove(dir, &name, &ids, wait, force).await,
        DeviceCommand::List { name, json } => list(dir, &name, json).await,
    }
}

/// Plugs in all of them, at the same time.
async fn add(dir: &RunDir, name: &str, devices: &NewDevices, wait: u64, json: bool) -> anyhow::Result<()> {
    let info = on(dir, name, async |vm| vm.info().await).await?;
    let devices = devices.configured(|id| info.devices.iter().any(|device| device.id == id))?;
    if devices.is_empty() {
        return Err(advice::error("there is no device to add", "give one with --disk, --net or --console"));
    }
    let client = dir.client(name);
    let wait = Duration::from_secs(wait);
    let mut tasks = Vec::new();
    for device in devices {
        let client = client.clone();
        tasks.push(tokio::spawn(async move { client.plug(&device, wait).await }));
    }
    let (mut plugged, mut failed) = (Vec::new(), None);
    for task in tasks {
        match task.await.context("a request was not made")? {
            Ok(device) => plugged.push(device),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if json {
        print_json(&plugged)?;
    } else {
        let mut out = std::io::stdout().lock();
        for PluggedDevice { id, address, .. } in &plugged {
            writeln!(out, "{id} {address}")?;
        }
    }
    if let Some(error) = failed {
        return Err(explain(dir, name, error));
    }
    let Some(silent) = plugged.iter().find(|device| !device.driver) else { return Ok(()) };
    match on(dir, name, async |vm| vm.info().await).await? {
        // It will look when it runs.
        VmInfo { state, .. } if !matches!(state, civic_api::VmState::Running | civic_api::VmState::Stopping) => Ok(()),
        _ => Err(told(silent)),
    }
}

/// Why a device is of no use to the guest yet.
fn told(device: &PluggedDevice) -> anyhow::Error {
    let PluggedDevice { id, guest, waited_us, .. } = device;
    let seconds = waited_us / 1_000_000;
    let (message, hint) = match guest {
        GuestAnswer::Refused => ("the guest could not take it", "see the guest's kernel log"),
        GuestAnswer::Done => (
            "the guest has found it, and no driver uses it",
            "its kernel needs the driver (virtio_blk, virtio_net, virtio_console), built in or as a module that it can load",
        ),
        GuestAnswer::Unasked | GuestAnswer::Silent | GuestAnswer::Heard => (
            "the guest has not responded",
            "its kernel needs CONFIG_HOTPLUG_PCI_ACPI, as docs/support.md says; or wait longer with --wait",
        ),
    };
    advice::error(format!("'{id}' is plugged in, but after {seconds} s {message}"), hint)
}

async fn remove(dir: &RunDir, name: &str, ids: &[String], wait: u64, force: bool) -> anyhow::Result<()> {
    let client = dir.client(name);
    let wait = Duration::from_secs(wait);
    let mut tasks = Vec::new();
    for id in ids {
        let (client, id) = (client.clone(), id.clone());
        tasks.push(tokio::spawn(async move { client.unplug(&id, wait, force).await }));
    }
    let mut failed = None;
    for task in tasks {
        if let Err(error) = task.await.context("a request was not made")? {
            failed = failed.or(Some(error));
        }
    }
    failed.map_or(Ok(()), |error| Err(explain(dir, name, error)))
}

async fn list(dir: &RunDir, name: &str, json: bool) -> anyhow::Result<()> {
    let info = on(dir, name, async |vm| vm.info().await).await?;
    if json {
        return print_json(&info.devices);
    }
    let row = |device: &DeviceInfo| {
        let address = device.address.clone().unwrap_or_default();
        [device.id.clone(), device.kind.clone(), address, state(device).to_owned()]
    };
    let rows: Vec<_> = info.devices.iter().map(row).collect();
    print(&table(["ID", "KIND", "ADDRESS", "STATE"], &rows))
}

/// What has become of a device.
pub fn state(device: &DeviceInfo) -> &'static str {
    match (device.leaving, device.driver, device.guest) {
        (true, ..) => "leaving",
        (_, Some(true) | None, _) => "in use",
        (_, _, GuestAnswer::Silent | GuestAnswer::Heard) => "waits for the guest",
        _ => "no driver",
    }
}

impl NewDevices {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty() && self.nets.is_empty() && self.consoles.is_empty()
    }

    /// The same for one of several VMs: with its number where `{n}` stands.
    pub fn numbered(&self, number: usize) -> Self {
        let number = number.to_string();
        let put = |text: &str| text.replace("{n}", &number);
        Self {
            disks: self.disks.iter().map(|disk| disk.with(put)).collect(),
            nets: self.nets.iter().map(|net| net.with(put)).collect(),
            consoles: self.consoles.iter().map(|id| put(id)).collect(),
        }
    }

    /// What the options say, with ids for those that have none: the first of `disk0`, `disk1`, … that is not `taken`.
    pub fn configured(&self, taken: impl Fn(&str) -> bool) -> anyhow::Result<Vec<NewDevice>> {
        let mut devices: Vec<NewDevice> = Vec::new();
        let free = |devices: &[NewDevice], kind: &str| {
            let used = |index: &usize| {
                let id = format!("{kind}{index}");
                taken(&id) || devices.iter().any(|device| device.id() == id)
            };
            (0..).find(|index| !used(index)).unwrap_or_default()
        };
        for disk in &self.disks {
            let mut disk = disk.config(free(&devices, "disk"));
            disk.path = absolute(&disk.path, "--disk")?;
            devices.push(NewDevice::Disk(disk));
        }
        for net in &self.nets {
            let net = net.config(free(&devices, "net"));
            devices.push(NewDevice::Net(net));
        }
        let consoles = self.consoles.iter().map(|id| NewDevice::Console(ConsoleConfig { id: id.clone() }));
        devices.extend(consoles);
        Ok(devices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_get_the_next_free_ids() {
        let devices = NewDevices {
            disks: ["path=/a", "path=/b,id=data", "path=/c"].map(|spec| spec.parse().unwrap()).into(),
            nets: ["tap=t"].map(|spec| spec.parse().unwrap()).into(),
            consoles: vec!["tools".into()],
        };
        let devices = devices.configured(|id| ["disk0", "net0", "net1"].contains(&id)).unwrap();
        let ids: Vec<_> = devices.iter().map(NewDevice::id).collect();
        assert_eq!(ids, ["disk1", "data", "disk2", "net2", "tools"]);
    }

    #[test]
    fn each_child_has_its_own() {
        let devices = NewDevices {
            disks: vec!["path=/a-{n}/{n}.img,id=d{n}".parse().unwrap()],
            nets: vec!["tap=t{n}".parse().unwrap()],
            consoles: vec!["c{n}".into()],
        };
        let third = devices.numbered(3).configured(|_| false).unwrap();
        let NewDevice::Disk(disk) = &third[0] else { panic!("{third:?}") };
        let NewDevice::Net(net) = &third[1] else { panic!("{third:?}") };
        assert_eq!((disk.path.as_os_str(), disk.id.as_str()), ("/a-3/3.img".as_ref(), "d3"));
        assert_eq!((net.tap.as_str(), third[2].id()), ("t3", "c3"));
    }

    #[test]
    fn what_the_guest_did_not_do_is_told() {
        let device = |guest| PluggedDevice {
            id: "data".into(),
            address: "0000:00:06.0".into(),
            guest,
            driver: false,
            waited_us: 10_000_001,
        };
        for (guest, part) in [
            (GuestAnswer::Silent, "not responded"),
            (GuestAnswer::Done, "no driver uses it"),
            (GuestAnswer::Refused, "could not take it"),
        ] {
            let text = advice::told(&told(&device(guest)));
            assert!(text.contains("'data' is plugged in, but after 10 s") && text.contains(part), "{text}");
        }
    }
}
