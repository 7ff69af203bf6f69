//! See [`civic_fuzz::kernel`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::KERNEL), |bytes: &[u8]| (civic_fuzz::KERNEL.run)(bytes));
