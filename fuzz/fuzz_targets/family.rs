//! See [`civic_fuzz::family`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::FAMILY), |bytes: &[u8]| (civic_fuzz::FAMILY.run)(bytes));
