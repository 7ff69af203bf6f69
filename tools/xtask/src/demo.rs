//! `cargo xtask demo`: Debian with systemd and nginx under load in `civic`, looked into from outside by tools of a store, without a request being lost.
//! What runs on the KVM host is `tests/examples/demo.rs`.

use anyhow::{Result, ensure};

use crate::place::{Job, Place};
use crate::setup;
use crate::test::{cargo, program};

/// Seconds it may take: the testbed takes most of them to boot the guest.
const TIMEOUT: u64 = 1800;

/// Runs the demo where guests can run.
pub fn run(testbed: bool) -> Result<bool> {
    setup::all()?;
    let (place, why) = if testbed { (Place::Testbed, "--testbed") } else { Place::for_guests() };
    let at = if place == Place::Here { "on this machine" } else { "in the testbed" };
    println!("== the demo runs {at}: {why}");
    if place == Place::Testbed {
        println!("times are those of an emulated machine, tens of times what hardware takes");
    }
    ensure!(cargo(&["build", "--quiet", "--release", "--workspace", "--bins"], &[])?, "cannot build civic");
    let program = program("example", "demo", &["build", "--release"])?;
    Job { program: &program, args: &[], root_image: true, timeout: TIMEOUT }.run(place)
}
