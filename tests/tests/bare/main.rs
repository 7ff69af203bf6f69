//! Bare-metal guests under the real monitor, on this host's `/dev/kvm`. See `civic_tests::bare`.

mod cpus;
mod exits;
mod interrupts;
