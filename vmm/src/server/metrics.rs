//! The VM's figures as OpenMetrics text, which Prometheus reads.
//!
//! The VM's own figures are read when asked for and put into a registry that lives as long as the answer, so a scrape sees
//! one moment and nothing is counted twice. Only the requests are counted here.

use std::fmt;
use std::sync::atomic::AtomicU64;

use civic_api::{VmInfo, VmState};
use civic_fork::pager::times::Times;
use hyper::{Method, StatusCode};
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::fork::family::Sharing;

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
            Method::DELETE => "DELETE",
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
struct PagesLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    event: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GenerationLabels {
    generation: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChildLabels {
    child: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemoryLabels {
    kind: &'static str,
}

/// All figures at this moment.
pub fn encode(info: &VmInfo, sharing: Option<&Sharing>, requests: &Requests) -> Result<String, fmt::Error> {
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

    if let Some(sharing) = sharing {
        forks(&mut registry, sharing);
    }

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

/// What the page server does for this VM's forks. Its pages are of 4 KiB.
fn forks(registry: &mut Registry, sharing: &Sharing) {
    let Sharing { counters, stalls, generations, children } = sharing;
    let pages = Family::<PagesLabels, Gauge>::default();
    for (kind, count) in [("shared", counters.shared), ("stored", counters.stored)] {
        pages.get_or_create(&PagesLabels { kind }).set(count.try_into().unwrap_or(i64::MAX));
    }
    registry.register("fork_pages", "Pages of the source that a fork may have mapped, and pages in the store", pages);

    let events = Family::<EventLabels, Counter>::default();
    for (event, count) in [
        ("kept", counters.kept),
        ("punched", counters.punched),
        ("let_through_ahead", counters.ahead),
        ("holes_filled", counters.holes),
        ("mapped", counters.mapped),
        ("copied", counters.copied),
        ("zeroed", counters.zeroed),
    ] {
        events.get_or_create(&EventLabels { event }).inc_by(count);
    }
    let help = "What the page server has done with pages: kept or punched for a write of the source, mapped, copied or zeroed for forks";
    registry.register("fork_page_events", help, events);
    let help = "Writes of the source that waited for the page server, from when it read of them";
    registry.register_with_unit("fork_write_stall", help, Unit::Seconds, Spans(vec![(None, *stalls)]));

    let kept = Family::<GenerationLabels, Gauge>::default();
    for (generation, count) in generations {
        kept.get_or_create(&GenerationLabels { generation: *generation }).set((*count).into());
    }
    registry.register(
        "fork_generation_pages",
        "Pages kept for a fork point; in the store fork points share them",
        kept,
    );

    let given = Family::<ChildLabels, Gauge>::default();
    let mut service = Vec::new();
    for (child, report) in children {
        let labels = ChildLabels { child: child.clone() };
        given.get_or_create(&labels).set(report.given.into());
        service.push((Some(labels), report.service));
    }
    registry.register("fork_child_pages", "Pages that a fork was given", given);
    let help = "First touches of a fork that waited for the page server, from when it read of them";
    registry.register_with_unit("fork_child_service", help, Unit::Seconds, Spans(service));
}

/// Histograms that somebody else has counted, each with its labels.
#[derive(Debug)]
struct Spans(Vec<(Option<ChildLabels>, Times)>);

impl EncodeMetric for Spans {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        for (labels, times) in &self.0 {
            let buckets: Vec<_> = times
                .buckets()
                .map(|(limit, count)| (limit.map_or(f64::INFINITY, |limit| limit.as_secs_f64()), count))
                .collect();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let sum = times.sum().as_secs_f64();
            match labels {
                None => encoder.encode_histogram::<ChildLabels>(sum, count, &buckets, None)?,
                Some(labels) => {
                    encoder.encode_family(labels)?.encode_histogram::<ChildLabels>(sum, count, &buckets, None)?
                }
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
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
    use std::time::Duration;

    use civic_fork::pager::{ChildReport, Counters};

    use super::*;

    #[test]
    fn forks_are_told_of_by_their_names() {
        let mut stalls = Times::default();
        [3, 4, 200_000].into_iter().for_each(|micros| stalls.add(Duration::from_micros(micros)));
        let mut service = Times::default();
        service.add(Duration::from_micros(1));
        let sharing = Sharing {
            counters: Counters { shared: 7, kept: 3, ..Counters::default() },
            stalls,
            generations: vec![(2, 3)],
            children: vec![("web-1".into(), ChildReport { id: 9, given: 5, service })],
        };
        let mut registry = Registry::with_prefix("civic");
        forks(&mut registry, &sharing);
        let mut out = String::new();
        text::encode(&mut out, &registry).unwrap();
        for line in [
            "civic_fork_pages{kind=\"shared\"} 7",
            "civic_fork_page_events_total{event=\"kept\"} 3",
            "civic_fork_write_stall_seconds_count 3",
            "civic_fork_write_stall_seconds_bucket{le=\"0.000004\"} 2",
            "civic_fork_write_stall_seconds_bucket{le=\"+Inf\"} 3",
            "civic_fork_generation_pages{generation=\"2\"} 3",
            "civic_fork_child_pages{child=\"web-1\"} 5",
            "civic_fork_child_service_seconds_count{child=\"web-1\"} 1",
        ] {
            assert!(out.lines().any(|found| found == line), "{line} is not in\n{out}");
        }
    }

    #[test]
    fn reads_resident_memory() {
        let status = "Name:\tx\nRssAnon:\t    1024 kB\nRssFile:\t 4 kB\nRssShmem:\t bad kB\n";
        assert_eq!(resident_memory(status).collect::<Vec<_>>(), [("anon", 1 << 20), ("file", 4096)]);
        assert_eq!(resident_memory(&std::fs::read_to_string("/proc/self/status").unwrap()).count(), 3);
    }
}
