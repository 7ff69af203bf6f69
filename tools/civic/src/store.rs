//! `civic store`: images of file systems that programs started in a fork have as their root.
//!
//! [`build`] makes them from packages, [`check`] looks at them; neither mounts one.

pub mod build;
pub mod build_hooks;
pub mod check;
mod programs;
mod tree;

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::advice;
use crate::cli::StoreCommand;

/// Where a store says what it was made of.
pub const RECORD: &str = "etc/civic-store.json";
/// Folders that something is mounted at when a program has the store as its root.
pub const FOLDERS: [&str; 6] = ["guest", "proc", "sys", "dev", "run", "tmp"];

/// What a store was made of.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Of this format.
    pub version: u32,
    /// The release that the packages are from.
    pub suite: String,
    /// Seconds since 1970 when it was made, or `SOURCE_DATE_EPOCH`.
    pub made: u64,
    /// The packages that were asked for.
    pub requested: Vec<String>,
    /// All packages, and their versions.
    pub packages: BTreeMap<String, String>,
}

/// Does what `command` says.
pub async fn store(command: StoreCommand) -> Result<()> {
    match command {
        StoreCommand::Build(args) => build::build(args).await,
        StoreCommand::Check { image, json } => check::check(&image, json),
    }
}

/// The error of a program that cannot be started.
fn cannot_start(program: &str, package: &str, error: &std::io::Error) -> anyhow::Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => advice::error(
            format!("there is no program {program} here"),
            format!("install it: apt-get install {package}; /usr/sbin must be in PATH"),
        ),
        _ => advice::error(format!("{program} cannot be started: {error}"), "see whether it runs by hand"),
    }
}
