//! How `civic run` and `civic-vmm` meet.
//!
//! ```text
//!  civic run                                     civic-vmm --config - --dir RUN_DIR/NAME
//!     │  VmConfig as JSON on stdin ──────────────►│  takes DIR/lock, binds DIR/api.sock, builds the VM
//!     │◄──────────── one line of JSON on stdout ───│  Launch::Ready or Launch::Failed; then closes stdout
//!     │  POST /v1/start over DIR/api.sock ────────►│
//! ```
//!
//! Files of a VM's directory. All but the log go when the VM ends; the log stays when it ended badly.

use serde::{Deserialize, Serialize};

use crate::ErrorBody;

/// Held with `flock` as long as the monitor lives. A directory whose lock is free is nobody's.
pub const LOCK_FILE: &str = "lock";
/// The API's socket.
pub const SOCKET_FILE: &str = "api.sock";
/// The monitor's stderr.
pub const LOG_FILE: &str = "vmm.log";

/// The one line a monitor writes to stdout: `{"ready":true,"pid":42}` or `{"error":{…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Launch {
    /// The VM is built and the API answers.
    Ready {
        /// Always true.
        ready: bool,
        /// The monitor's process id.
        pid: u32,
    },
    /// There will be no VM.
    Failed {
        /// Why.
        error: ErrorBody,
    },
}

impl Launch {
    /// The VM is built, by process `pid`.
    pub fn ready(pid: u32) -> Self {
        Self::Ready { ready: true, pid }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorCode;

    #[test]
    fn lines_are_as_documented() {
        let check = |launch: Launch, line: &str| {
            assert_eq!(serde_json::to_string(&launch).unwrap(), line);
            assert_eq!(serde_json::from_str::<Launch>(line).unwrap(), launch);
        };
        check(Launch::ready(42), r#"{"ready":true,"pid":42}"#);
        let error = ErrorBody::new(ErrorCode::NameInUse, "taken");
        check(Launch::Failed { error }, r#"{"error":{"code":"name_in_use","message":"taken"}}"#);
    }
}
