//! A Debian guest forked while clients ask its nginx for pages and it writes its disk: no request is lost, and each child serves the page of
//! the moment it was forked at. How long requests take is for `cargo xtask bench fork --only load`.

use std::time::Duration;

use anyhow::{Result, ensure};
use civic_tests::linux::Spec;
use civic_tests::load::served::Served;

use super::ROOT_IMAGE;

/// A fork every so often, for as long as this; one pair after the other, in seconds.
pub fn debian(spec: &Spec, phases: &[(u64, u64)]) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let mut served = Served::start(spec)?;
    let rate = served.rate()?;
    for &(every, length) in phases {
        let phase = served.phase(rate, Some(Duration::from_secs(every)), Duration::from_secs(length))?;
        let (lost, forks) = (phase.lost(), phase.forks.len());
        let (asked, longest) = (phase.answers.len(), phase.latencies().into_iter().fold(0.0, f64::max));
        eprintln!(
            "a fork every {every} s, {rate:.0} requests/s: {forks} forks in {length} s, {asked} requests, the longest took {longest:.0} ms, \
             {} were lost; {:.1} rounds/s of the disk's writer",
            lost.len(),
            phase.disk
        );
        ensure!(lost.is_empty(), "{} of {asked} requests were lost in {forks} forks: {}", lost.len(), lost[0]);
        ensure!(forks > 0 && asked > 0, "{forks} forks, {asked} requests");
    }
    served.end()
}
