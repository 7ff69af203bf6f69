//! Fuzz targets: everything that a guest, a file or a client can feed the monitor, each as a function of bytes that panics when
//! something does not hold that should.
//!
//! ```text
//! cargo xtask fuzz TARGET ── libFuzzer ──▶ fuzz_targets/TARGET.rs ──▶ Target::run ◀── tests/replay.rs: seeds and findings
//! ```
//!
//! A finding becomes a regression test of the crate that it was in, and its input a file in `findings/TARGET/`.

pub mod api;
pub mod archive;
pub mod family;
pub mod guest;
pub mod host;
pub mod image;
pub mod kernel;
pub mod pci;
pub mod ports;
pub mod program;
pub mod state;
pub mod virtio;

use std::panic::PanicHookInfo;
use std::path::PathBuf;

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, that of its program too.
    pub name: &'static str,
    /// Runs one input; panics when something is wrong.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 13] =
    [API, ARCHIVE, CONFIG, FAMILY, GUEST, IMAGE, KERNEL, PCI, PORTS, PROGRAM, QCOW2, STATE, VIRTIO];

/// [`api`]: requests.
pub const API: Target = Target { name: "api", run: api::run, seeds: api::seeds };
/// [`archive`].
pub const ARCHIVE: Target = Target { name: "archive", run: archive::run, seeds: archive::seeds };
/// [`api`]: configurations.
pub const CONFIG: Target = Target { name: "config", run: api::run_config, seeds: api::seeds_config };
/// [`family`].
pub const FAMILY: Target = Target { name: "family", run: family::run, seeds: family::seeds };
/// [`guest`].
pub const GUEST: Target = Target { name: "guest", run: guest::run, seeds: guest::seeds };
/// [`image`].
pub const IMAGE: Target = Target { name: "image", run: image::run, seeds: image::seeds };
/// [`kernel`].
pub const KERNEL: Target = Target { name: "kernel", run: kernel::run, seeds: kernel::seeds };
/// [`pci`].
pub const PCI: Target = Target { name: "pci", run: pci::run, seeds: pci::seeds };
/// [`ports`].
pub const PORTS: Target = Target { name: "ports", run: ports::run, seeds: ports::seeds };
/// [`program`].
pub const PROGRAM: Target = Target { name: "program", run: program::run, seeds: program::seeds };
/// [`virtio::qcow2`].
pub const QCOW2: Target = Target { name: "qcow2", run: virtio::qcow2::run, seeds: virtio::qcow2::seeds };
/// [`state`].
pub const STATE: Target = Target { name: "state", run: state::run, seeds: state::seeds };
/// [`virtio`].
pub const VIRTIO: Target = Target { name: "virtio", run: virtio::run, seeds: virtio::seeds };

/// The environment variable that says where a target's program puts its seeds.
pub const SEEDS: &str = "CIVIC_FUZZ_SEEDS";

/// Whether a panic is no finding: imago's, which the disk takes for an I/O error.
pub fn is_expected(panic: &PanicHookInfo<'_>) -> bool {
    panic.location().is_some_and(|location| location.file().contains("/imago-"))
}

/// Writes the target's seeds where [`SEEDS`] says, if it does, and has libFuzzer overlook panics that are expected.
///
/// # Panics
/// When they cannot be written.
pub fn prepare(target: &Target) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !is_expected(panic) {
            hook(panic);
        }
    }));
    let Some(dir) = std::env::var_os(SEEDS).map(PathBuf::from) else { return };
    for (number, seed) in (target.seeds)().into_iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{number}")), seed).expect("seeds can be written");
    }
}
