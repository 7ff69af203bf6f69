//! See [`civic_fuzz::archive`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::ARCHIVE), |bytes: &[u8]| (civic_fuzz::ARCHIVE.run)(bytes));
