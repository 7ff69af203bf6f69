//! A row as others read it: one element of the list that `cargo xtask bench … --json OUT` writes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What ran the guest, and so what a time is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Where {
    /// A host that runs stock kernels.
    #[serde(rename = "hardware")]
    Hardware,
    /// A host that runs our own bare-metal guest code, and may run nothing else: its times are real.
    #[serde(rename = "bare-metal guest code")]
    Bare,
    /// An emulated host: its times mean nothing by themselves.
    #[serde(rename = "testbed")]
    Testbed,
}

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hardware => "hardware",
            Self::Bare => "bare-metal guest code",
            Self::Testbed => "testbed",
        })
    }
}

/// A row. A number that there is none of is null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// `boot.userspace`, ….
    pub name: String,
    /// Of the values.
    pub unit: String,
    /// How many were measured.
    pub n: usize,
    /// The median.
    pub p50: Option<f64>,
    /// See there.
    pub p90: Option<f64>,
    /// See there.
    pub p99: Option<f64>,
    /// The greatest.
    pub max: Option<f64>,
    /// The median of what it is compared with, taken in the same run: another monitor's, or where there is none the floor's.
    pub peer: Option<f64>,
    /// Of the peer: how much of it this is.
    pub ratio: Option<f64>,
    /// See there.
    #[serde(rename = "where")]
    pub place: Where,
    /// What measures it again.
    pub command: String,

    /// Whether it is a time or a rate, and not bytes, events or a share.
    pub timed: bool,
    /// The middle half of the values: how far it is spread, as a share of the median.
    pub spread: Option<f64>,
    /// What the peer is.
    pub beside: Option<String>,
    /// Its command line, where it is a program of its own.
    pub peer_command: Option<String>,
    /// The middle half of the rounds' ratios.
    pub ratio_p25: Option<f64>,
    /// See there.
    pub ratio_p75: Option<f64>,
    /// What of the machine's own there must be at least.
    pub floor: Option<Floor>,
    /// What is promised, in words.
    pub promised: Option<String>,
    /// What is wrong with it, if that is not held.
    pub broken: Option<String>,
    /// The host's facts, by name.
    pub host: Vec<(String, String)>,
    /// All values in the order they were measured, if they are not too many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<f64>,
    /// The peer's, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peer_samples: Vec<f64>,
}

/// A floor, and how far above it a figure is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// `fork(2)`, ….
    pub name: String,
    /// Its median, in the figure's unit.
    pub p50: Option<f64>,
    /// The figure as a multiple of it.
    pub multiple: Option<f64>,
}

impl Record {
    /// Whether its values may be shown by themselves.
    pub fn absolute(&self) -> bool {
        !self.timed || self.place != Where::Testbed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_was_written() {
        let text = r#"{"name":"fork.pause","unit":"ms","n":3,"p50":0.5,"p90":1.0,"p99":1.0,"max":1.0,"peer":20.0,"ratio":0.025,
            "where":"bare-metal guest code","command":"cargo xtask bench fork","timed":true,"spread":null,"beside":"fork(2)",
            "peer_command":null,"ratio_p25":null,"ratio_p75":null,"floor":{"name":"fork(2)","p50":20.0,"multiple":0.025},
            "promised":"p50 <= 2","broken":null,"host":[["CPU","2 x a"]]}"#;
        let record: Record = serde_json::from_str(text).unwrap();
        assert!(record.absolute() && record.place == Where::Bare && record.samples.is_empty());
        let again: Record = serde_json::from_value(serde_json::to_value(&record).unwrap()).unwrap();
        assert_eq!(again, record);
        assert!(!Record { place: Where::Testbed, ..record.clone() }.absolute());
        assert!(Record { place: Where::Testbed, timed: false, ..record }.absolute());
    }
}
