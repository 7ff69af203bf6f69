//! The VM's figures as OpenMetrics text, which Prometheus reads.
//!
//! The VM's own figures are read when asked for and put into a registry that lives as long as the answer, so a scrape sees
//! one moment and nothing is counted twice. Only the requests are counted here.

use std::fmt;
use std::sync::atomic::AtomicU64;

use civic_api::{VmInfo, VmState};
use hyper::{Method, StatusCode};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// The format's media type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Requests answered, by route, method and status.
#[derive(Clone, Default)]
pub struct Requests(Family<RequestLabels, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    method: &'static str,
    status: u16,
}

impl Requests {
    /// Counts an answered request. `route` is a route's pattern, never what the client sent: labels are for ever.
    pub fn count(&self, route: &str, method: &Method, status: StatusCode) {
        let method = match *method {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::PUT => "PUT",
            _ => "other",
        };
        let labels = RequestLabels { route: route.to_owned(), method, status: status.as_u16() };
        self.0.get_or_create(&labels).inc();
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExitLabels {
    vcpu: u32,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    device: String,
    kind: String,
    counter: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BalloonLabels {
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemoryLabels {
    kind: &'static str,
}

/// All figures at this moment.
pub fn encode(info: &VmInfo, requests: &Requests) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("civic");
    vm(&mut registry, info);

    let exits = Family::<ExitLabels, Counter>::default();
    for vcpu in &info.vcpus {
        for (reason, &count) in &vcpu.exits {
            exits.get_or_create(&ExitLabels { vcpu: vcpu.index, reason: reason.clone() }).inc_by(count);
        }
    }
    registry.register("vcpu_exits", "KVM exits to the monitor by vCPU and reason", exits);

    let devices = Family::<DeviceLabels, Counter>::default();
    for device in &info.devices {
        for (counter, &count) in &device.counters {
            let labels =
                DeviceLabels { device: device.id.clone(), kind: device.kind.clone(), counter: counter.clone() };
            devices.get_or_create(&labels).inc_by(count);
        }
    }
    registry.register("device_events", "What devices count: requests, bytes, packets, kicks, interrupts", devices);
    registry.register("api_requests", "API requests answered by route, method and status", requests.0.clone());

    let memory = Family::<MemoryLabels, Gauge>::default();
    for (kind, bytes) in resident_memory(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()) {
        memory.get_or_create(&MemoryLabels { kind }).set(bytes.try_into().unwrap_or(i64::MAX));
    }
    let help = "Resident memory of the monitor by kind: its own (anon), its code (file), guest RAM (shmem)";
    registry.register_with_unit("process_resident", help, Unit::Bytes, memory);

    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

fn vm(registry: &mut Registry, info: &VmInfo) {
    let labels = vec![("name", info.name.clone()), ("version", info.version.clone())];
    registry.register("vm", "The VM", Info::new(labels));

    let states = Family::<StateLabels, Gauge>::default();
    use VmState::{Created, Paused, Running, Stopped, Stopping, Waiting};
    for state in [Waiting, Created, Running, Paused, Stopping, Stopped] {
        states.get_or_create(&StateLabels { state: state.as_str() }).set(i64::from(state == info.state));
    }
    registry.register("vm_state", "1 for the state the VM is in", states);

    let boots = Counter::<u64>::default();
    boots.inc_by(info.boots);
    registry.register("vm_boots", "How often the guest has started", boots);

    let run = Counter::<f64, AtomicU64>::default();
    run.inc_by(info.run_ms as f64 / 1000.0);
    registry.register_with_unit("vm_run", "How long the vCPUs have been let run", Unit::Seconds, run);

    let cpus = Gauge::<i64>::default();
    cpus.set(info.cpus.into());
    registry.register("vm_vcpus", "vCPUs", cpus);

    let memory = Gauge::<i64>::default();
    memory.set(info.memory_bytes.try_into().unwrap_or(i64::MAX));
    registry.register_with_unit("vm_memory", "Guest RAM", Unit::Bytes, memory);

    if let Some(balloon) = &info.balloon {
        let parts = Family::<BalloonLabels, Gauge>::default();
        for (part, bytes) in [("target", balloon.target_bytes), ("actual", balloon.actual_bytes)] {
            parts.get_or_create(&BalloonLabels { part }).set(bytes.try_into().unwrap_or(i64::MAX));
        }
        let help = "Guest RAM that the balloon is to take (target) and has taken (actual)";
        registry.register_with_unit("vm_balloon", help, Unit::Bytes, parts);
    }
}

/// `RssAnon`, `RssFile` and `RssShmem` of a `/proc/PID/status`, in bytes.
fn resident_memory(status: &str) -> impl Iterator<Item = (&'static str, u64)> {
    [("RssAnon:", "anon"), ("RssFile:", "file"), ("RssShmem:", "shmem")].into_iter().filter_map(|(key, kind)| {
        let rest = status.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some((kind, kib.saturating_mul(1024)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_resident_memory() {
        let status = "Name:\tx\nRssAnon:\t    1024 kB\nRssFile:\t 4 kB\nRssShmem:\t bad kB\n";
        assert_eq!(resident_memory(status).collect::<Vec<_>>(), [("anon", 1 << 20), ("file", 4096)]);
        assert_eq!(resident_memory(&std::fs::read_to_string("/proc/self/status").unwrap()).count(), 3);
    }
}
