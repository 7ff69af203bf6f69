//! See [`civic_fuzz::virtio::qcow2`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::QCOW2), |bytes: &[u8]| (civic_fuzz::QCOW2.run)(bytes));
