//! The machine's balloon in the API's terms: bytes instead of pages.

use civic_api::BalloonInfo;
use civic_devices::virtio::balloon::{BalloonControl, PAGE};

/// The balloon as it is now. Only looks.
pub fn info(balloon: &BalloonControl) -> BalloonInfo {
    let (statistics, reports) = balloon.statistics();
    BalloonInfo {
        target_bytes: bytes(balloon.target()),
        actual_bytes: bytes(balloon.actual()),
        reports,
        statistics: statistics.named().map(|(name, value)| (name.to_owned(), value)).collect(),
    }
}

/// Asks the guest to give `bytes`, in whole pages.
pub fn set_target(balloon: &BalloonControl, bytes: u64) {
    balloon.set_target(u32::try_from(bytes / PAGE).unwrap_or(u32::MAX));
}

/// `pages` of the balloon's.
pub fn bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE
}
