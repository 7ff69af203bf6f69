//! Network throughput, both ways, by iperf3 over a tap.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::guest::{BOOT, Guest, said};

/// A way for data to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the host to the guest.
    Rx,
    /// From the guest to the host.
    Tx,
}

impl Way {
    /// Seen by the guest.
    pub const BOTH: [Self; 2] = [Self::Rx, Self::Tx];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
        }
    }
}

/// A tap with an address, gone when dropped.
pub struct Tap {
    /// The interface.
    pub name: String,
    /// The guest's address. The host's ends with 1.
    pub guest: String,
}

impl Tap {
    /// Makes tap `n` and brings it up.
    pub fn new(n: u8) -> Result<Self> {
        let tap = Self { name: format!("civicb{n}"), guest: format!("10.78.{n}.2") };
        // A bench that was killed leaves its taps; without a carrier nobody has them.
        let carrier = fs::read_to_string(format!("/sys/class/net/{}/carrier", tap.name));
        if carrier.is_ok_and(|carrier| carrier.trim() == "0") {
            ip(&["link", "del", &tap.name])?;
        }
        ip(&["tuntap", "add", "dev", &tap.name, "mode", "tap"])?;
        ip(&["addr", "add", &format!("10.78.{n}.1/24"), "dev", &tap.name])?;
        ip(&["link", "set", &tap.name, "up"])?;
        Ok(tap)
    }

    /// The host's address.
    pub fn host(&self) -> String {
        self.guest.trim_end_matches('2').to_owned() + "1"
    }

    /// What tells the guest (`resources/bench/init`) that this is its card `n`.
    pub fn cmdline(&self, n: usize) -> String {
        format!("civic.ip.eth{n}={}/24", self.guest)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.name]);
    }
}

fn ip(args: &[&str]) -> Result<()> {
    said(Command::new("ip").args(args)).map(drop)
}

/// Starts the guest's end.
pub fn serve(guest: &mut Guest) -> Result<()> {
    guest.run("iperf3 -s -D", BOOT).map(drop)
}

/// MiB per second received, over so many seconds.
pub fn measure(tap: &Tap, way: Way, seconds: u32) -> Result<f64> {
    let deadline = Instant::now() + BOOT;
    loop {
        let mut c = Command::new("iperf3");
        c.args(["-c", &tap.guest, "-t", &seconds.to_string(), "-J", "--connect-timeout", "20000"]);
        if way == Way::Tx {
            c.arg("-R");
        }
        // The server daemonizes before it listens, and one that still clears up turns clients away.
        match said(&mut c).and_then(|said| parse(&said)) {
            Ok(rate) => return Ok(rate),
            Err(e) => ensure!(Instant::now() < deadline, "iperf3 to {}: {e:#}", tap.guest),
        }
    }
}

fn parse(said: &str) -> Result<f64> {
    let report: serde_json::Value = serde_json::from_str(said)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 reports no rate")?;
    ensure!(bits > 0.0, "iperf3 moved nothing");
    Ok(bits / 8.0 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iperfs_report() {
        assert_eq!(parse(r#"{"end":{"sum_received":{"bits_per_second":16777216.0}}}"#).unwrap(), 2.0);
        assert!(parse(r#"{"end":{}}"#).is_err());
        assert!(parse(r#"{"error":"busy"}"#).is_err());
    }
}
