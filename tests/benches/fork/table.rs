//! Rows, and which promises hold. Quantiles are by nearest rank: each is a value that was measured.

use std::cmp::Ordering;
use std::fmt;

use serde_json::{Value, json};

/// What a row has to be.
#[derive(Clone, Copy)]
pub enum Promise {
    /// It is only shown.
    None,
    /// These quantiles are at most so much.
    AtMost(&'static [(f64, f64)]),
}

/// One thing measured.
pub struct Row {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
    promise: Promise,
    /// What it is compared with: another row's name and values.
    peer: Option<(String, Vec<f64>)>,
}

impl Row {
    /// Of these values.
    pub fn new(name: impl Into<String>, unit: &'static str, values: Vec<f64>, promise: Promise) -> Self {
        Self { name: name.into(), unit, values, promise, peer: None }
    }

    /// With another row to compare it with.
    pub fn beside(mut self, name: String, values: Vec<f64>) -> Self {
        self.peer = Some((name, values));
        self
    }

    /// Its quantile as a share of that of what it is compared with.
    fn ratio(&self, share: f64) -> Option<f64> {
        self.peer.as_ref().map(|(_, values)| quantile(&self.values, share) / quantile(values, share))
    }

    /// The promised quantiles that are exceeded. Nothing measured exceeds everything.
    fn broken(&self) -> Vec<String> {
        let Promise::AtMost(limits) = self.promise else { return Vec::new() };
        let within = |share, limit| {
            matches!(quantile(&self.values, share).partial_cmp(&limit), Some(Ordering::Less | Ordering::Equal))
        };
        let over = limits.iter().filter(|(share, limit)| !within(*share, *limit));
        let text = |(share, limit): &(f64, f64)| {
            let value = quantile(&self.values, *share);
            format!("{}: p{:.0} is {value:.2} {}, promised at most {limit}", self.name, share * 100.0, self.unit)
        };
        over.map(text).collect()
    }
}

/// The smallest value that at least `share` of all do not exceed; NaN of nothing.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// The mean of all but the largest hundredth, which are the scheduler's; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.truncate(sorted.len() - sorted.len() / 100);
    sorted.iter().sum::<f64>() / sorted.len() as f64
}

/// All rows.
#[derive(Default)]
pub struct Table(Vec<Row>);

impl Table {
    /// Adds one.
    pub fn add(&mut self, row: Row) {
        self.0.push(row);
    }

    /// Whether all promises hold.
    pub fn holds(&self) -> bool {
        self.0.iter().all(|row| row.broken().is_empty())
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            let q = |share| quantile(&row.values, share);
            let limits = match row.promise {
                Promise::None => Vec::new(),
                Promise::AtMost(limits) => limits.to_vec(),
            };
            let place = if std::env::var_os("TESTBED").is_some() { "testbed" } else { "hardware" };
            json!({
                "name": row.name, "unit": row.unit, "n": row.values.len(), "p50": q(0.5), "p90": q(0.9), "p99": q(0.99),
                "max": q(1.0), "promised": limits, "broken": row.broken(), "where": place,
                "peer": row.peer.as_ref().map(|(_, values)| quantile(values, 0.5)), "ratio": row.ratio(0.5),
                "ratio_p99": row.ratio(0.99),
            })
        };
        self.0.iter().map(row).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let testbed = std::env::var_os("TESTBED").is_some();
        let place = if testbed { "the TESTBED: times mean nothing by themselves" } else { "this machine" };
        writeln!(f, "\n{place}; {cpus} CPUs; Linux {}\n", kernel.trim())?;
        let head = ["name", "unit", "n", "p50", "p90", "p99", "max", "promised"];
        writeln!(
            f,
            "{:36}{:7}{:>8}{:>10}{:>10}{:>10}{:>10}  {}",
            head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]
        )?;
        for row in &self.0 {
            let q = |share| format!("{:.2}", quantile(&row.values, share));
            let promised = match row.promise {
                Promise::None => String::new(),
                Promise::AtMost(limits) => {
                    let limits: Vec<_> = limits.iter().map(|(s, l)| format!("p{:.0} <= {l}", s * 100.0)).collect();
                    limits.join(", ")
                }
            };
            let (name, unit, n) = (&row.name, row.unit, row.values.len());
            writeln!(
                f,
                "{name:36}{unit:7}{n:>8}{:>10}{:>10}{:>10}{:>10}  {promised}",
                q(0.5),
                q(0.9),
                q(0.99),
                q(1.0)
            )?;
        }
        writeln!(f)?;
        for row in &self.0 {
            let (Some((peer, _)), Some(p50), Some(p99)) = (&row.peer, row.ratio(0.5), row.ratio(0.99)) else {
                continue;
            };
            writeln!(f, "{}: {p50:.2} of {peer}'s p50, {p99:.2} of its p99", row.name)?;
        }
        for line in self.0.iter().flat_map(Row::broken) {
            writeln!(f, "BROKEN: {line}")?;
        }
        Ok(())
    }
}
