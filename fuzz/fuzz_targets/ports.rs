//! See [`civic_fuzz::ports`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::PORTS), |bytes: &[u8]| (civic_fuzz::PORTS.run)(bytes));
