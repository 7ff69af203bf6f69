//! The jailer: starts one program, a monitor or a page server, as a user of its own with nothing around it but what it needs.
//!
//! ```text
//!  civic ─ starts ─▶ civic-jailer (root, outside) ─ forks ─▶ in new namespaces: build a root, enter it, become the user, exec
//!                      │ waits, forwards signals, kills                              │
//!                      │◀── leash: a byte from whoever holds its other end ──        ▼
//!                      └─ afterwards: takes away what was made for it            the program
//! ```
//!
//! * [`jail`] says what a jail is, and [`root`] what its file system consists of: pure, nothing is done there.
//! * [`mounts`], [`cgroup`], [`users`] and [`inside`] do it; [`guardian`] is what stays outside.
//!
//! Every jail has a user of its own, so that what is in one can neither signal nor trace nor read what is in another, and processes of two
//! jails cannot name each other. Who has a reason to end a jailed process (its source, when their page server is gone) holds its leash.
//!
//! There is no user namespace: the program has no capability and cannot get one, and in one of its own it could not tell who talks to it.

pub mod cgroup;
pub mod guardian;
pub mod inside;
pub mod jail;
pub mod libraries;
pub mod mounts;
pub mod root;
pub mod users;

use std::io;

use civic_api::{ErrorBody, ErrorCode};

/// Why there is no jail. Its hint is the way out.
pub type Refusal = ErrorBody;

/// A refusal: what cannot be done, what the system said, and what to do.
pub(crate) fn refusal(what: impl std::fmt::Display, e: impl Into<io::Error>, hint: impl Into<String>) -> Refusal {
    ErrorBody::new(ErrorCode::JailUnavailable, format!("{what}: {}", e.into())).with_hint(hint)
}

/// One that has no errno.
pub(crate) fn refused(what: impl Into<String>, hint: impl Into<String>) -> Refusal {
    ErrorBody::new(ErrorCode::JailUnavailable, what).with_hint(hint)
}
