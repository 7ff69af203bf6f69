//! The counters of a machine's devices and vCPUs, for the API.

use std::collections::BTreeMap;
use std::sync::Arc;

use civic_api::{DeviceInfo, VcpuInfo, VmConfig};
use civic_devices::counters::Counters;
use civic_devices::virtio::DeviceType;

use super::{Machine, Plugged, Presence, effective_mac};

/// Counters of one machine, and what its predecessors' had come to.
struct Tally {
    counters: Arc<dyn Counters>,
    carried: BTreeMap<String, u64>,
}

impl Tally {
    /// Counts on from what `before` had come to. What is still there counts on by itself.
    fn go_on(&mut self, before: &Self) {
        let same = Arc::ptr_eq(&self.counters, &before.counters);
        self.carried = if same { before.carried.clone() } else { before.read() };
    }

    fn read(&self) -> BTreeMap<String, u64> {
        let mut sums = self.carried.clone();
        for (name, value) in self.counters.read() {
            *sums.entry(name.into()).or_default() += value;
        }
        sums
    }
}

struct Meter {
    id: String,
    kind: &'static str,
    address: Option<String>,
    presence: Option<Presence>,
    tally: Tally,
}

/// Reads the counters of a machine and of those before it: a reset does not set them back.
#[derive(Default)]
pub struct Meters {
    devices: Vec<Meter>,
    vcpus: Vec<Tally>,
}

impl Meters {
    /// Counts on from what `before`, of the machine that this one replaces, had come to.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        for meter in &mut self.devices {
            if let Some(before) =
                before.devices.iter().find(|before| before.id == meter.id && before.kind == meter.kind)
            {
                meter.tally.go_on(&before.tally);
            }
        }
        for (tally, before) in self.vcpus.iter_mut().zip(&before.vcpus) {
            tally.go_on(before);
        }
        self
    }

    /// The devices as the API shows them; `config` is what they were made from.
    pub fn devices(&self, config: &VmConfig) -> Vec<DeviceInfo> {
        let info = |meter: &Meter| DeviceInfo {
            id: meter.id.clone(),
            kind: meter.kind.into(),
            address: meter.address.clone(),
            settings: settings(config, &meter.id),
            counters: meter.tally.read(),
            driver: meter.presence.as_ref().map(Presence::driver),
            guest: meter.presence.as_ref().map(Presence::guest).unwrap_or_default(),
            leaving: meter.presence.as_ref().is_some_and(Presence::leaving),
        };
        self.devices.iter().map(info).collect()
    }

    /// The vCPUs as the API shows them.
    pub fn vcpus(&self) -> Vec<VcpuInfo> {
        let info = |(index, tally): (usize, &Tally)| VcpuInfo { index: index as u32, exits: tally.read() };
        self.vcpus.iter().enumerate().map(info).collect()
    }
}

/// What a device was given, and the address of a network card that was given none.
fn settings(config: &VmConfig, id: &str) -> BTreeMap<String, String> {
    let mut settings = config.settings(id);
    if let Some(net) = config.nets.iter().find(|net| net.id == id) {
        settings.insert("mac".into(), effective_mac(config, net).to_string());
    }
    settings
}

impl Machine {
    /// The counters of devices and vCPUs, which outlive the machine.
    pub fn meters(&self) -> Meters {
        let tally = |counters| Tally { counters, carried: BTreeMap::new() };
        let serial = tally(self.serial.counters());
        let (id, kind) = (String::from("serial"), "serial");
        let mut devices = vec![Meter { id, kind, address: None, presence: None, tally: serial }];
        for plugged in &self.plugged {
            let Plugged { slot, function, .. } = plugged;
            let kind = match function.kind() {
                DeviceType::Net => "net",
                DeviceType::Block => "blk",
                DeviceType::Console => "console",
                DeviceType::Rng => "rng",
                DeviceType::Balloon => "balloon",
                DeviceType::Vsock => "vsock",
            };
            let (id, address) = (function.id().to_owned(), Some(slot.to_string()));
            let presence = Some(Presence::new(plugged, &self.hotplug));
            devices.push(Meter { id, kind, address, presence, tally: tally(function.counters()) });
        }
        let vcpus = self.vcpus.exits().iter().map(|exits| tally(Arc::clone(exits) as Arc<dyn Counters>)).collect();
        Meters { devices, vcpus }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_card_shows_the_address_that_it_has() {
        let json = r#"{"name":"web","kernel":"/k","memory_bytes":33554432,"cpus":1,
            "nets":[{"id":"net0","tap":"a"},{"id":"net1","tap":"b","mac":"02:00:00:00:00:07"}]}"#;
        let mut config: VmConfig = serde_json::from_str(json).unwrap();
        let mac = |config: &VmConfig, id: &str| settings(config, id).remove("mac");
        let made = mac(&config, "net0").unwrap();
        assert_eq!(made, effective_mac(&config, &config.nets[0]).to_string());
        assert_eq!(mac(&config, "net1").as_deref(), Some("02:00:00:00:00:07"));
        assert_eq!(mac(&config, "rng"), None);
        config.name = "db".into();
        assert_ne!(mac(&config, "net0"), Some(made));
    }
}
