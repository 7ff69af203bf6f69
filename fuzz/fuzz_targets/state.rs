//! See [`civic_fuzz::state`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::STATE), |bytes: &[u8]| (civic_fuzz::STATE.run)(bytes));
