//! A device's configuration as words, for [`crate::DeviceInfo`]: whoever reads that need not know every option there is.

use std::collections::BTreeMap;
use std::path::Path;

use super::{DiskConfig, NetConfig, RateLimit, VmConfig, VsockConfig};

/// Id of the vsock device.
pub const VSOCK_ID: &str = "vsock";
/// Id of the balloon.
pub const BALLOON_ID: &str = "balloon";

/// Words by the names that they have in the configuration's JSON.
type Settings = BTreeMap<String, String>;

impl VmConfig {
    /// What the device of this id was given. What is not there was left to the monitor, or is off.
    pub fn settings(&self, id: &str) -> BTreeMap<String, String> {
        let disk = self.disks.iter().find(|disk| disk.id == id).map(disk);
        let net = || self.nets.iter().find(|net| net.id == id).map(net);
        let vsock = || self.vsock.as_ref().filter(|_| id == VSOCK_ID).map(vsock);
        disk.or_else(net).or_else(vsock).unwrap_or_default()
    }
}

fn disk(disk: &DiskConfig) -> Settings {
    let mut settings =
        Settings::from([("path".into(), shown(&disk.path)), ("format".into(), disk.format.as_str().into())]);
    for (name, on) in [("read_only", disk.read_only), ("backing", disk.backing), ("overlay", disk.overlay)] {
        put(&mut settings, name, on.then_some(true));
    }
    put(&mut settings, "queues", disk.queues);
    put_rate(&mut settings, "", disk.rate);
    settings
}

fn net(net: &NetConfig) -> Settings {
    let mut settings = Settings::from([("tap".into(), net.tap.clone())]);
    put(&mut settings, "mac", net.mac);
    put(&mut settings, "queues", net.queues);
    put(&mut settings, "mtu", net.mtu);
    put_rate(&mut settings, "rx_", net.rx_rate);
    put_rate(&mut settings, "tx_", net.tx_rate);
    settings
}

fn vsock(vsock: &VsockConfig) -> Settings {
    let mut settings = Settings::from([("uds".into(), shown(&vsock.uds))]);
    put(&mut settings, "cid", Some(vsock.effective_cid()));
    settings
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn put(settings: &mut Settings, name: &str, value: Option<impl ToString>) {
    if let Some(value) = value {
        settings.insert(name.into(), value.to_string());
    }
}

fn put_rate(settings: &mut Settings, prefix: &str, rate: Option<RateLimit>) {
    let rate = rate.unwrap_or_default();
    put(settings, &format!("{prefix}bytes_per_second"), rate.bytes_per_second);
    put(settings, &format!("{prefix}operations_per_second"), rate.operations_per_second);
}
