//! The testbed: a machine with real KVM, on a host that has none.
//!
//! A "host" (L1) runs under QEMU's TCG with AMD-V (SVM and nested paging) emulated, so that L1's own unmodified `kvm-amd`
//! drives unmodified guests. L1 is booted once and stays up; commands are sent to it:
//!
//! ```text
//!  testbed run ──┐  unix socket   ┌────────────────┐ virtio-serial ┌─────────────── L1 ───────────────┐
//!  testbed run ──┼────────────────┤ testbed daemon ├───────────────┤ testbed agent ── testbed job ─►  │
//!  testbed stop ─┘    [frame]     │  owns QEMU     │    [frame]    │  one mount namespace and         │
//!                                 └──────┬─────────┘               │  one cgroup a command            │
//!                                        └── QMP: disks, stop/cont └──────────────────────────────────┘
//! ```
//!
//! What lives where: [`client`] is the command line's side, [`daemon`] the owner of the machine, [`machine`] one QEMU
//! process, [`agent`] and [`job`] run inside L1, [`frame`] is what they say to each other. The rest prepares what L1 and
//! the project's test guests are made of ([`apt`], [`cache`], [`kernel`], [`modules`], [`cpio`]), and is shared with
//! `cargo xtask`.
//!
//! Invariants: QEMU never outlives its daemon; a command never outlives its client; L1 spends no CPU time while no
//! command runs; nothing a command writes outside the workspace outlives it.

pub mod agent;
pub mod apt;
pub mod cache;
pub mod client;
pub mod cpio;
pub mod daemon;
pub mod frame;
pub mod job;
pub mod kernel;
pub mod machine;
pub mod modules;
pub mod qmp;
pub mod setup;
