//! See [`civic_fuzz::api`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::API), |bytes: &[u8]| (civic_fuzz::API.run)(bytes));
