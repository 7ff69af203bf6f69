//! Which system calls each kind of thread may make: filters from `resources/seccomp`, where each says why it lets what through.
//!
//! ```text
//!   begin(Monitor)  all threads, and all to come ─┬─ thread(Vcpu) ── thread(Device), which a vCPU starts
//!                                                 └─ thread(Api)
//!   begin(Pager)    the page server's only thread
//! ```
//!
//! A thread has the filters of whoever started it, and narrows them: nothing ever widens them again, so whatever a device's thread may do a
//! vCPU may. A call that none of them names is the end of the process: what a monitor never does is not its own idea. By `CIVIC_SECCOMP=audit` the
//! kernel lets it through and logs it instead (`dmesg`: type=1326, with the call's number), so that one that was forgotten can be found.
//!
//! `seccomp(2)`.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{BpfMap, TargetArch, apply_filter, apply_filter_all_threads, compile_from_json};

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A monitor's, if nothing else is said of it.
    Monitor,
    /// One that runs a guest's instructions.
    Vcpu,
    /// One that serves a device.
    Device,
    /// The one that serves the API.
    Api,
    /// The page server's.
    Pager,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Monitor, Self::Vcpu, Self::Device, Self::Api, Self::Pager];

    /// Its name, and its filters as they were reviewed.
    fn reviewed(self) -> (&'static str, &'static str) {
        match self {
            Self::Monitor => ("monitor", include_str!("../../resources/seccomp/monitor.json")),
            Self::Vcpu => ("vcpu", include_str!("../../resources/seccomp/vcpu.json")),
            Self::Device => ("device", include_str!("../../resources/seccomp/device.json")),
            Self::Api => ("api", include_str!("../../resources/seccomp/api.json")),
            Self::Pager => ("pager", include_str!("../../resources/seccomp/pager.json")),
        }
    }
}

/// What becomes of a call that is not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It ends the process.
    Enforce,
    /// It is logged, and made.
    Audit,
}

/// Why threads cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// `CIVIC_SECCOMP` is something else.
    #[error("CIVIC_SECCOMP is '{0}': set it to 'enforce' or 'audit', or unset it")]
    Mode(String),
    /// A filter is wrong.
    #[error("the filter '{name}' is wrong: {why}")]
    Filter {
        /// Which.
        name: &'static str,
        /// Why.
        why: String,
    },
    /// The kernel refuses.
    #[error("the kernel takes no filter of system calls: {0}; use one with CONFIG_SECCOMP_FILTER")]
    Kernel(String),
}

/// The filters of this process; none if it is not confined.
static FILTERS: OnceLock<BTreeMap<&'static str, BpfMap>> = OnceLock::new();

/// Whether this process was asked to confine itself: by `CIVIC_SECCOMP`, which the jailer sets.
///
/// # Errors
/// When that says something else.
pub fn wanted() -> Result<Option<Mode>, ConfineError> {
    match std::env::var("CIVIC_SECCOMP").as_deref() {
        Err(_) => Ok(None),
        Ok("enforce") => Ok(Some(Mode::Enforce)),
        Ok("audit") => Ok(Some(Mode::Audit)),
        Ok(other) => Err(ConfineError::Mode(other.to_owned())),
    }
}

/// Confines this process: all threads that there are to what `kind` may do, and those to come as they say by [`thread`]. To be called
/// once, before anything is read that others have made.
///
/// # Errors
/// When the kernel takes no filters.
pub fn begin(kind: Kind, mode: Mode) -> Result<(), ConfineError> {
    let mut filters = BTreeMap::new();
    for kind in Kind::ALL {
        filters.insert(kind.reviewed().0, compile(kind, mode)?);
    }
    for program in filters[kind.reviewed().0].values() {
        apply_filter_all_threads(program).map_err(|e| ConfineError::Kernel(e.to_string()))?;
    }
    // Two beginnings would be two sets of the same filters.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Narrows this thread to what `kind` may do, if this process is confined. One that cannot be narrowed ends the process.
pub fn thread(kind: Kind) {
    let Some(filters) = FILTERS.get() else { return };
    let (name, _) = kind.reviewed();
    for program in filters[name].values() {
        if let Err(e) = apply_filter(program) {
            eprintln!("civic: a thread cannot be confined as '{name}': {e}");
            std::process::abort();
        }
    }
}

fn compile(kind: Kind, mode: Mode) -> Result<BpfMap, ConfineError> {
    let (name, text) = kind.reviewed();
    let wrong = |why: String| ConfineError::Filter { name, why };
    let mut filters: serde_json::Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
    if mode == Mode::Audit {
        for filter in filters.as_object_mut().into_iter().flat_map(|filters| filters.values_mut()) {
            if filter["mismatch_action"] == "kill_process" {
                filter["mismatch_action"] = "log".into();
            }
        }
    }
    compile_from_json(filters.to_string().as_bytes(), TargetArch::x86_64).map_err(|e| wrong(e.to_string()))
}

#[cfg(test)]
mod tests;
