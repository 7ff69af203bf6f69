//! Bare-metal guests under the real monitor, on this host's `/dev/kvm`. See `civic_tests::bare`.

mod audited;
mod balloon;
mod console;
mod counts;
mod cpus;
mod endings;
mod exits;
mod fork_deaths;
mod forking;
mod hostile;
mod huge;
mod inspecting;
mod interrupts;
mod jailed;
mod memory;
mod pausing;
mod plugging;
mod refusals;
mod saving;
mod torn;
mod virtio;
