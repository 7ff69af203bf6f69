//! See [`civic_fuzz::image`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::IMAGE), |bytes: &[u8]| (civic_fuzz::IMAGE.run)(bytes));
