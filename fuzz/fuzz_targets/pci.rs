//! See [`civic_fuzz::pci`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: civic_fuzz::prepare(&civic_fuzz::PCI), |bytes: &[u8]| (civic_fuzz::PCI.run)(bytes));
