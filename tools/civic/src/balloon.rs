//! `civic balloon`.

use civic_api::{BalloonConfig, BalloonInfo, ByteSize};

use crate::on;
use crate::rundir::RunDir;
use crate::show::{print, print_json};
use crate::table::printable;

/// Sets the balloon's target if there is one, else shows the balloon. JSON shows it in either case.
pub async fn balloon(dir: &RunDir, name: &str, target: Option<ByteSize>, json: bool) -> anyhow::Result<()> {
    if let Some(ByteSize(target_bytes)) = target {
        on(dir, name, async |vm| vm.set_balloon(&BalloonConfig { target_bytes }).await).await?;
        if !json {
            return Ok(());
        }
    }
    let balloon = on(dir, name, async |vm| vm.balloon().await).await?;
    if json { print_json(&balloon) } else { print(&describe(&balloon)) }
}

/// The balloon in a line.
pub fn summary(balloon: &BalloonInfo) -> String {
    format!("has {} of {}", ByteSize(balloon.actual_bytes), ByteSize(balloon.target_bytes))
}

fn describe(balloon: &BalloonInfo) -> String {
    let bytes = |bytes| ByteSize(bytes).to_string();
    let mut lines =
        vec![("target".to_owned(), bytes(balloon.target_bytes)), ("actual".to_owned(), bytes(balloon.actual_bytes))];
    for (name, &value) in &balloon.statistics {
        let (name, value) = match name.strip_suffix("_bytes") {
            Some(name) => (name, bytes(value)),
            None => (name.as_str(), value.to_string()),
        };
        lines.push((printable(name).replace('_', " "), value));
    }
    if balloon.statistics.is_empty() {
        lines.push(("guest".to_owned(), "has told nothing of its memory".to_owned()));
    }
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    lines.into_iter().map(|(name, value)| format!("{:width$} {value}\n", format!("{name}:"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown() {
        let mut balloon =
            BalloonInfo { target_bytes: 256 << 20, actual_bytes: 100 << 20, reports: 0, statistics: [].into() };
        assert_eq!(describe(&balloon), "target: 256M\nactual: 100M\nguest:  has told nothing of its memory\n");
        assert_eq!(summary(&balloon), "has 100M of 256M");
        balloon.statistics = [("free_bytes".to_owned(), 1 << 29), ("major_faults".to_owned(), 7)].into();
        assert_eq!(describe(&balloon), "target:       256M\nactual:       100M\nfree:         512M\nmajor faults: 7\n");
    }
}
