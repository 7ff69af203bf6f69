//! The first word of a process that connects to a source: its page server, or a child that wants to be forked from it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The protocols' version: processes of two versions of Civic do not fork from each other.
pub const VERSION: u32 = 2;

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of whoever connects.
    pub version: u32,
    /// As what.
    pub role: Role,
}

/// What somebody connects as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// As the page server. If there is one already, the connection is closed.
    PageServer,
    /// As a child of this name.
    Child(String),
}

/// Where a source listens, in its directory.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("fork.sock")
}
