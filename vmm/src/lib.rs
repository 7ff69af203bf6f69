//! civic-vmm.
