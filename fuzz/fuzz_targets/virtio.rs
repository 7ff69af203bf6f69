//! See [`civic_fuzz::virtio`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::VIRTIO), |bytes: &[u8]| (civic_fuzz::VIRTIO.run)(bytes));
