//! The figures that a whole run has to have.

use crate::record::Record;

/// Each by its name, and the bench that it belongs to.
pub const FIGURES: [(&str, &str); 21] = [
    ("boot.userspace", "boot"),
    ("boot.monitor_memory", "boot"),
    ("blk.randread4k", "io"),
    ("blk.randwrite4k", "io"),
    ("blk.seqread1m", "io"),
    ("net.tcp_rx", "io"),
    ("net.tcp_tx", "io"),
    ("fork.pause", "fork"),
    ("fork.pause_per_gib", "fork"),
    ("fork.first_instruction", "fork"),
    ("fork.siblings_32", "fork"),
    ("fork.child_memory", "fork"),
    ("fork.write_stall", "fork"),
    ("fork.write_cost_vs_floor", "fork"),
    ("fork.source_slowdown_0.1hz", "fork"),
    ("fork.source_slowdown_1hz", "fork"),
    ("hotplug.blk", "hotplug"),
    ("hotplug.net", "hotplug"),
    ("inject.first_instruction", "inject"),
    ("inspect.first_output", "inspect"),
    ("inspect.child_memory", "inspect"),
];

/// Those that are not among `records` with a value, each with its bench.
pub fn missing(records: &[Record]) -> Vec<(&'static str, &'static str)> {
    let there = |name: &str| records.iter().any(|record| record.name == name && record.p50.is_some());
    FIGURES.into_iter().filter(|(name, _)| !there(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Facts;
    use crate::record::Where;
    use crate::report::{Report, Row};

    #[test]
    fn what_has_no_value_is_missing() {
        let mut report = Report::new(Facts { place: Where::Bare, lines: Vec::new() }, "cargo xtask bench all");
        for (name, _) in &FIGURES[..20] {
            report.add(Row::new(*name, "ms", [1.0].into_iter().collect()));
        }
        report.add(Row::new(FIGURES[20].0, "MiB", std::iter::empty().collect()));
        assert_eq!(missing(&report.records()), [("inspect.child_memory", "inspect")]);
        assert_eq!(missing(&[]).len(), FIGURES.len());
    }
}
