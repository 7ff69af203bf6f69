//! Devices that come and go while a VM runs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ConfigError, ConsoleConfig, DiskConfig, NetConfig, VmConfig};

/// How long a device's request waits for the guest, if nothing else is said, in milliseconds.
pub const DEVICE_WAIT_MS: u64 = 10_000;
/// Longest that it can.
pub const MAX_DEVICE_WAIT_MS: u64 = 600_000;

/// The id, and so the serial number in the guest, of a disk of tools that forks are given.
pub const STORE_ID: &str = "civic-store";

/// A device to be plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NewDevice {
    /// A disk.
    Disk(DiskConfig),
    /// A network card.
    Net(NetConfig),
    /// A console port.
    Console(ConsoleConfig),
}

impl NewDevice {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Net(net) => &net.id,
            Self::Console(console) => &console.id,
        }
    }

    /// The route that takes it, and what goes there.
    ///
    /// # Errors
    /// When it cannot be said in JSON: a path that is no Unicode.
    pub fn request(&self) -> Result<(&'static str, serde_json::Value), serde_json::Error> {
        Ok(match self {
            Self::Disk(disk) => (crate::routes::DISKS, serde_json::to_value(disk)?),
            Self::Net(net) => (crate::routes::NETS, serde_json::to_value(net)?),
            Self::Console(console) => (crate::routes::CONSOLES, serde_json::to_value(console)?),
        })
    }
}

/// What the guest has made of a device that was plugged in, or is to be removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestAnswer {
    /// It was not asked: the device was there when the VM was started or restored.
    #[default]
    Unasked,
    /// Nothing yet. A guest that is paused, or has not come so far, answers later.
    Silent,
    /// It has heard of it.
    Heard,
    /// It has done what it was asked.
    Done,
    /// It could not.
    Refused,
}

impl GuestAnswer {
    pub(crate) fn is_unasked(&self) -> bool {
        *self == Self::Unasked
    }
}

/// A device that was plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PluggedDevice {
    /// Its id.
    pub id: String,
    /// Its PCI address.
    #[schema(example = "0000:00:03.0")]
    pub address: String,
    /// What the guest said of it, as long as was waited.
    pub guest: GuestAnswer,
    /// Whether the guest has a driver for it, which uses it.
    pub driver: bool,
    /// How long was waited, in microseconds.
    pub waited_us: u64,
}

impl VmConfig {
    /// The same VM with one device more.
    ///
    /// # Errors
    /// When that is none.
    pub fn with(&self, device: NewDevice) -> Result<Self, ConfigError> {
        let mut config = self.clone();
        match device {
            NewDevice::Disk(disk) => config.disks.push(disk),
            NewDevice::Net(net) => config.nets.push(net),
            NewDevice::Console(console) => config.consoles.push(console),
        }
        config.validate()?;
        Ok(config)
    }

    /// The device of this id, if it is one that can come and go.
    pub fn device(&self, id: &str) -> Option<NewDevice> {
        let disk = self.disks.iter().find(|disk| disk.id == id).cloned().map(NewDevice::Disk);
        let net = || self.nets.iter().find(|net| net.id == id).cloned().map(NewDevice::Net);
        let console = || self.consoles.iter().find(|console| console.id == id).cloned().map(NewDevice::Console);
        disk.or_else(net).or_else(console)
    }

    /// The same VM without that device.
    #[must_use]
    pub fn without(&self, id: &str) -> Self {
        let mut config = self.clone();
        config.disks.retain(|disk| disk.id != id);
        config.nets.retain(|net| net.id != id);
        config.consoles.retain(|console| console.id != id);
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web() -> VmConfig {
        let json = r#"{"name":"web","kernel":"/k","memory_bytes":33554432,"cpus":1,
            "disks":[{"id":"root","path":"/a"}],"nets":[{"id":"net0","tap":"a"}]}"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn devices_come_and_go() {
        let web = web();
        let more = [
            NewDevice::Disk(DiskConfig::new("data", "/b")),
            NewDevice::Net(NetConfig::new("net1", "b")),
            NewDevice::Console(ConsoleConfig { id: "tools".into() }),
        ];
        for device in more {
            let with = web.with(device.clone()).unwrap();
            assert_eq!(with.device(device.id()), Some(device.clone()));
            assert_eq!(with.without(device.id()), web);
        }
        assert_eq!(web.device("rng"), None);
        assert_eq!(web.without("root").disks, []);
    }

    #[test]
    fn what_is_there_already_is_refused() {
        let web = web();
        for device in [
            NewDevice::Disk(DiskConfig::new("net0", "/b")),
            NewDevice::Disk(DiskConfig::new("data", "/a")),
            NewDevice::Net(NetConfig::new("net1", "a")),
            NewDevice::Console(ConsoleConfig { id: "root".into() }),
            NewDevice::Console(ConsoleConfig { id: "hvc0".into() }),
            NewDevice::Console(ConsoleConfig { id: "serial".into() }),
        ] {
            assert!(web.with(device.clone()).is_err(), "{device:?}");
        }
    }

    #[test]
    fn the_bus_is_full_some_time() {
        let mut web = web();
        while web.disks.len() + web.nets.len() < crate::MAX_DEVICES {
            let n = web.disks.len();
            web = web.with(NewDevice::Disk(DiskConfig::new(format!("d{n}"), format!("/{n}")))).unwrap();
        }
        let one_more = NewDevice::Console(ConsoleConfig { id: "one-more".into() });
        assert!(matches!(web.with(one_more), Err(ConfigError::TooManyDevices { .. })));
    }
}
