//! See [`civic_fuzz::program`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::PROGRAM), |bytes: &[u8]| (civic_fuzz::PROGRAM.run)(bytes));
