//! `civic-jailer`: starts a monitor or a page server in a jail of its own. `civic run --jail` and `civic fork --jail` start it.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use civic_api::launch::Launch;
use civic_api::{ByteSize, ErrorBody};
use civic_jailer::guardian::{self, Introduction, Places};
use civic_jailer::jail::{Jail, Limits, Net, Shown, Users};
use civic_jailer::{Refusal, users};
use clap::Parser;
use nix::unistd::geteuid;

/// Starts a program as a user of its own, in namespaces of its own, with nothing around it but what is named here.
///
/// Stays as its parent, passes signals on and ends as it does. What cannot be is told on standard output, as civic-vmm tells it.
#[derive(Debug, Parser)]
#[command(name = "civic-jailer", version)]
struct Cli {
    /// Users to take one from that no other jail has; the group has the same number.
    #[arg(long, value_name = "FIRST-LAST", default_value_t)]
    users: Users,
    /// The VM's own directory: becomes the user's.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A file or folder that can be read. Repeat for more.
    #[arg(long, value_name = "PATH")]
    read: Vec<PathBuf>,
    /// A file, folder or block device that can be written. Repeat for more.
    #[arg(long, value_name = "PATH")]
    write: Vec<PathBuf>,
    /// A folder that is empty inside; what is put there is gone with the jail, and takes space where the host has that folder.
    #[arg(long, value_name = "DIR")]
    scratch: Vec<PathBuf>,
    /// A device; left out where the host has none. Repeat for more.
    #[arg(long, value_name = "PATH")]
    device: Vec<PathBuf>,
    /// The network: none, host, or the path of a network namespace.
    #[arg(long, default_value = "none")]
    net: Net,
    /// Most memory, the guest's included.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Most processor time, in hundredths of a processor.
    #[arg(long, value_name = "PERCENT")]
    cpu: Option<u32>,
    /// Most processes and threads.
    #[arg(long, value_name = "COUNT")]
    threads: Option<u64>,
    /// Most bytes a second that are read from the disks of what is shown, and as many that are written.
    #[arg(long, value_name = "SIZE")]
    io_bps: Option<ByteSize>,
    /// The same, in requests.
    #[arg(long, value_name = "COUNT")]
    io_iops: Option<u64>,
    /// The control group (v2) below which one is made where there are limits.
    #[arg(long, value_name = "GROUP", default_value = "civic")]
    cgroup: PathBuf,
    /// Where the jailer keeps locks.
    #[arg(long, value_name = "DIR", default_value = "/run/civic-jail")]
    state: PathBuf,
    /// A VM's fork.sock: the program is introduced there, and has the connection as descriptor 3.
    #[arg(long, value_name = "SOCKET", requires = "role")]
    introduce: Option<PathBuf>,
    /// As what: 'pager' or 'child NAME'.
    #[arg(long, value_name = "ROLE", requires = "introduce")]
    role: Option<String>,
    /// The program and its arguments.
    #[arg(required = true, last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

fn main() -> ExitCode {
    match start(Cli::parse()) {
        Ok(jailed) => ExitCode::from(jailed.wait()),
        Err(e) => {
            eprintln!("civic-jailer: {e}");
            if let Ok(line) = serde_json::to_string(&Launch::Failed { error: e }) {
                // Whoever does not listen has the status.
                let _ = writeln!(std::io::stdout(), "{line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> Result<guardian::Jailed, Refusal> {
    if !geteuid().is_root() {
        let error = ErrorBody::new(civic_api::ErrorCode::JailUnavailable, "only root can make jails");
        return Err(error.with_hint("run civic as root, or leave --jail out"));
    }
    let taken = users::take(cli.users, &cli.state.join("users"))?;
    let shown = |write| move |path| Shown { path, write };
    let mut program = cli.program.into_iter();
    let jail = Jail {
        user: taken.user,
        dir: cli.dir,
        shown: cli.read.into_iter().map(shown(false)).chain(cli.write.into_iter().map(shown(true))).collect(),
        scratch: cli.scratch,
        devices: cli.device,
        net: cli.net,
        limits: Limits {
            memory: cli.memory.map(|size| size.0),
            cpu_percent: cli.cpu,
            threads: cli.threads,
            io_bps: cli.io_bps.map(|size| size.0),
            io_iops: cli.io_iops,
        },
        program: program.next().unwrap_or_default().into(),
        args: program.collect(),
    };
    let introduction = cli.introduce.zip(cli.role).map(|(socket, role)| Introduction { socket, role });
    guardian::start(&jail, taken, introduction.as_ref(), &Places { state: cli.state, group: cli.cgroup })
}
