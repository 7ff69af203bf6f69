//! See [`civic_fuzz::guest`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::GUEST), |bytes: &[u8]| (civic_fuzz::GUEST.run)(bytes));
