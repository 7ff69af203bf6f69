//! Programs that are started in a fork from outside.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::GuestFiles;

/// How long it may take to have a program started, if nothing else is said, in milliseconds.
pub const PROGRAM_WAIT_MS: u64 = 30_000;
/// The longest that may be asked for.
pub const MAX_PROGRAM_WAIT_MS: u64 = 600_000;

/// A program to be started in a fork, from outside, or files to be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProgramRequest {
    /// The program and its arguments. One without a slash is looked for in PATH of `env`. Empty if files are copied.
    #[serde(default)]
    pub argv: Vec<String>,
    /// Files to be copied, which needs no program: neither arguments nor environment, working directory or terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyRequest>,
    /// Its environment, all of it: `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Its working directory; `/` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// A terminal for its input and outputs, of this size; otherwise they are pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<TerminalSize>,
    /// What of the guest stands still while it runs.
    #[serde(default)]
    pub freeze: Freeze,
    /// Have what it leaves running end with it, and the store unmounted, before its end is told: for a VM that is about to end, so that the
    /// store's file system is found in order by the next.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tidy_up: bool,
    /// What it sees as `/`; the store, if the VM has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<ProgramRoot>,
    /// A network card of the VM's to be set up before it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<ProgramNetwork>,
    /// Its priority among real-time processes (`SCHED_FIFO`), if it is to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 99)]
    pub realtime: Option<u8>,
    /// Its niceness, if not the usual.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = -20, maximum = 19)]
    pub nice: Option<i8>,
    /// Its user's number; root if absent.
    #[serde(default, skip_serializing_if = "is_root")]
    pub uid: u32,
    /// Its group's number, which is its only group; root's if absent.
    #[serde(default, skip_serializing_if = "is_root")]
    pub gid: u32,
    /// What tells of the guest's kernel, if its own memory does not say enough.
    #[serde(default, skip_serializing_if = "GuestFiles::is_empty")]
    pub files: GuestFiles,
    /// How long it may take until it is started, in milliseconds.
    #[serde(default = "usual_wait")]
    pub wait_ms: u64,
}

impl Default for ProgramRequest {
    /// Nothing, in the usual way.
    fn default() -> Self {
        Self {
            argv: Vec::new(),
            copy: None,
            env: Vec::new(),
            cwd: None,
            tty: None,
            freeze: Freeze::None,
            tidy_up: false,
            root: None,
            network: None,
            realtime: None,
            nice: None,
            uid: 0,
            gid: 0,
            files: GuestFiles::default(),
            wait_ms: PROGRAM_WAIT_MS,
        }
    }
}

/// An IPv4 address for a network card of the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProgramNetwork {
    /// The card's id in the VM's configuration.
    pub id: String,
    /// Its address, and how many bits of it are the network's.
    #[schema(value_type = String, example = "10.0.0.2/24")]
    pub address: Ipv4Net,
    /// Where all other networks are, if anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub gateway: Option<Ipv4Addr>,
    /// Its greatest packet in bytes, if not what it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68)]
    pub mtu: Option<u16>,
    /// Leave the VM's other cards up. Otherwise they are taken down first: a fork's have its source's addresses, and lead nowhere.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_others: bool,
}

fn is_root(id: &u32) -> bool {
    *id == 0
}

fn usual_wait() -> u64 {
    PROGRAM_WAIT_MS
}

/// Files to be copied as a tar stream, which is the input or the output of what would be the program's stream. What cannot be copied is said
/// there as standard error, a line for each; the exit status is 0 if all was copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyRequest {
    /// Which way.
    pub direction: CopyDirection,
    /// What is copied, or the folder that it is copied into: an absolute path in the root of `root`.
    pub path: String,
    /// Whether what is copied in may also get the path's own name: if no folder is there, the path is what the first part of the stream's
    /// names stands for.
    #[serde(default)]
    pub rename: bool,
}

/// Which way files are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CopyDirection {
    /// Into the guest. Standard output says at the end how many files and bytes it were: two numbers in a line.
    In,
    /// Out of the guest. Names begin with the path's last part; with `.` if that is no name.
    Out,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// What of the guest stands still while a program runs, and goes on when it has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// Nothing.
    #[default]
    None,
    /// All processes but the first, by SIGSTOP.
    Stop,
    /// All control groups but the root's, by their freezer; as `stop` where there is none.
    Cgroup,
}

/// What a program sees as `/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgramRoot {
    /// What the guest's own programs see.
    Guest,
    /// The store, with the guest's root at `/guest`.
    Store,
}

/// A program that is being started: the loader runs in the guest, and says how it goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartedProgram {
    /// Its number in this VM.
    pub id: u64,
    /// How long what took.
    pub stages: InjectStages,
}

/// A program in a VM that was started from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProgramInfo {
    /// Its number in this VM.
    pub id: u64,
    /// It and its arguments.
    pub argv: Vec<String>,
    /// How long ago it was asked for, in milliseconds.
    pub age_ms: u64,
    /// Its loader has been heard of.
    pub started: bool,
}

/// How long the stages of starting a loader took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InjectStages {
    /// Finding the guest's kernel; 0 if it was known.
    pub find_us: u64,
    /// Placing what is placed there, while the vCPUs stand still.
    pub place_us: u64,
    /// Until a task came by.
    pub hook_us: u64,
    /// Until that task had queued the helper, and had its registers back.
    pub queue_us: u64,
    /// Until the helper had executed the loader.
    pub exec_us: u64,
    /// Taking away again what was placed, while the vCPUs stand still.
    pub remove_us: u64,
    /// Until the loader had said its first word.
    pub hello_us: u64,
    /// All.
    pub total_us: u64,
}
