//! Ports at which not only what a vCPU writes is wanted, but the vCPU itself: its registers, between two of its instructions.
//!
//! An `out` to such a port is completed first, so the instruction pointer is behind it, and whoever has the port may change any register.
//! Everybody else in the guest finds nobody at the port. Beside them there can be one breakpoint, where a vCPU stands before the instruction.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use kvm_ioctls::VcpuFd;

/// Somebody at a port.
pub trait Trap: Send + Sync {
    /// A vCPU has written to the port, or has come to the breakpoint, and stands still, on its own thread. Must not wait for another vCPU.
    ///
    /// # Errors
    /// When KVM refuses its registers: then it cannot go on.
    fn meet(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error>;
}

/// The ports of a machine that are such. Lock order: a leaf.
#[derive(Default)]
pub struct Traps {
    ports: RwLock<BTreeMap<u16, Arc<dyn Trap>>>,
    breakpoint: RwLock<Option<Arc<dyn Trap>>>,
    /// Mirrors that there are any, so that exits take no lock.
    any: AtomicBool,
}

impl Traps {
    /// Puts somebody at a port, in place of whoever was there.
    pub fn insert(&self, port: u16, trap: Arc<dyn Trap>) {
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        ports.insert(port, trap);
        self.any.store(true, Ordering::Release);
    }

    /// Leaves a port to the bus. A vCPU that has just left the guest there may still be met.
    pub fn remove(&self, port: u16) {
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        ports.remove(&port);
        self.any.store(!ports.is_empty(), Ordering::Release);
    }

    /// Puts somebody at the breakpoint, wherever that is, in place of whoever was there.
    pub fn insert_breakpoint(&self, trap: Arc<dyn Trap>) {
        *self.breakpoint.write().unwrap_or_else(PoisonError::into_inner) = Some(trap);
    }

    /// Who is at the breakpoint.
    pub fn at_breakpoint(&self) -> Option<Arc<dyn Trap>> {
        self.breakpoint.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who is at a port.
    pub fn at(&self, port: u16) -> Option<Arc<dyn Trap>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.ports.read().unwrap_or_else(PoisonError::into_inner).get(&port).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl Trap for Nobody {
        fn meet(&self, _: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
            Ok(())
        }
    }

    #[test]
    fn only_ports_with_somebody_are_traps() {
        let traps = Traps::default();
        assert!(traps.at(0xe4).is_none());
        traps.insert(0xe4, Arc::new(Nobody));
        assert!(traps.at(0xe4).is_some() && traps.at(0xe5).is_none());
        traps.remove(0xe4);
        assert!(traps.at(0xe4).is_none());
    }
}
