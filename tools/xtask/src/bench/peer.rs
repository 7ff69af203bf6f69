//! What Civic does with a VM, done with QEMU as the CIVIC paper did it (VEE'17, sections 3.2 to 3.6), by the parts that a stock QEMU and
//! Debian have for it today.
//!
//! ```text
//!  paper                                       here
//!  post-copy migration, source runs on         background-snapshot, streamed into a second QEMU; where the  clone.rs
//!                                              source is not looked at, a third by post-copy from that
//!  disk COW                                    blockdev-snapshot: the second one's disk is based on it      bench/inspect
//!  drive_add, host_net_add                     device_add into root ports                                   [`plug_store`]
//!  GDB at QEMU's stub                          the same: `gdb`, with a script                               gdb.rs
//!  System.map                                  /proc/kallsyms of the same boot, read beforehand             kernel.rs
//!  290 bytes at 16 MiB + 1 page                in the last page of the kernel's text: there is text now     kernel.rs
//!  do_mount() at schedule()                    path_mount(), in the helper's task: mounting may sleep       code.rs
//!  loader: a shell script on the store         the same
//! ```

pub mod clone;
pub mod code;
pub mod gdb;
pub mod kernel;
pub mod stub;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::qmp::Qmp;

/// A root port to plug into, as QEMU's option.
pub fn root_port(n: u8) -> [String; 2] {
    ["-device".to_owned(), format!("pcie-root-port,id=rp{n},chassis={},slot={}", n + 1, n + 1)]
}

/// Plugs a store into the first root port.
pub fn plug_store(qmp: &mut Qmp, store: &Path, limit: Duration) -> Result<()> {
    let file = json!({ "driver": "file", "filename": store });
    qmp.insist("blockdev-add", &json!({ "driver": "raw", "node-name": "store", "file": file }), limit)?;
    let device = json!({ "driver": "virtio-blk-pci", "id": "store", "bus": "rp0", "drive": "store" });
    qmp.execute("device_add", device, limit).map(drop)
}

/// Takes it out again, until QEMU has let go of it.
pub fn unplug_store(qmp: &mut Qmp, limit: Duration) -> Result<()> {
    qmp.execute("device_del", json!({ "id": "store" }), limit)?;
    qmp.event("DEVICE_DELETED", limit)?;
    qmp.insist("blockdev-del", &json!({ "node-name": "store" }), limit)
}
