//! `testbed`: runs commands on a machine with real KVM, emulated where there is none.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use civic_testbed::frame::{Disk, Run, What};
use civic_testbed::machine::Size;
use civic_testbed::{agent, client, daemon, job, machine, setup};

/// Run commands on a machine with real KVM, emulated where there is none.
///
/// The machine boots with the first command and stays up; while no command runs it is stopped and costs no CPU time. It
/// sees this machine's root file system (writes there last as long as the command) and the workspace around the current
/// folder, read-write. /tmp, /run and /dev/shm are empty. What a command leaves running is killed when it ends.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Fetch and build what the machine is made of.
    Setup,
    /// Run a command in the current folder, with the current environment, and exit with its status.
    ///
    /// 128 + N if signal N killed it, 124 if it took too long, 125 if the testbed failed.
    Run(RunArgs),
    /// Say whether the machine is up and what runs on it.
    Status {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// End the machine.
    Stop,
    /// End the machine; the next command boots another.
    Restart,
    /// Show the daemon's, QEMU's and the machine's console's output.
    Logs,
    #[command(hide = true)]
    Daemon {
        #[arg(long)]
        workspace: PathBuf,
    },
    #[command(hide = true)]
    Agent,
    #[command(hide = true)]
    Job { file: PathBuf, cgroup: PathBuf },
}

#[derive(clap::Args)]
struct RunArgs {
    /// Plug in a raw disk image; `ro`: read-only, `snapshot`: discard writes. Its path is in $TESTBED_DISK0, ….
    #[arg(long = "disk", value_name = "FILE[,ro][,snapshot]", value_parser = parse_disk)]
    disks: Vec<Disk>,
    /// Set a variable.
    #[arg(long = "env", value_name = "K=V", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Give up after so many seconds: SIGTERM, then SIGKILL.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Memory in MiB; restarts an unused machine that has another size [default: 8192].
    #[arg(long, env = "TESTBED_MEM")]
    memory: Option<u32>,
    /// CPUs, likewise [default: 2].
    #[arg(long, env = "TESTBED_CPUS")]
    cpus: Option<u32>,
    /// The command.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    argv: Vec<String>,
}

fn parse_disk(text: &str) -> Result<Disk> {
    let (mut file, mut ro, mut snapshot) = (text, false, false);
    while let Some((rest, option)) = file.rsplit_once(',') {
        match option {
            "ro" => ro = true,
            "snapshot" => snapshot = true,
            _ => break,
        }
        file = rest;
    }
    let file = std::fs::canonicalize(file).with_context(|| format!("no disk image {file}"))?;
    Ok(Disk { file: file.display().to_string(), ro, snapshot })
}

fn parse_env(text: &str) -> Result<(String, String)> {
    let (k, v) = text.split_once('=').context("not of the form K=V")?;
    Ok((k.to_owned(), v.to_owned()))
}

fn run(args: RunArgs) -> Result<i32> {
    let text = |s: std::ffi::OsString| s.into_string().ok();
    let mut env: Vec<_> = std::env::vars_os().filter_map(|(k, v)| Some((text(k)?, text(v)?))).collect();
    env.extend(args.env);
    let cwd = std::env::current_dir()?.display().to_string();
    let run = Run { argv: args.argv, cwd, env, disks: args.disks, memory: args.memory, cpus: args.cpus };
    client::run(&client::workspace()?, run, args.timeout.map(Duration::from_secs))
}

fn status(json: bool) -> Result<String> {
    let answer = client::query(&client::workspace()?, What::Status)?;
    let Some(answer) = answer else {
        return Ok(if json { "{\"machine\":\"down\"}\n" } else { "the machine is down\n" }.into());
    };
    if json {
        return Ok(answer + "\n");
    }
    let v: serde_json::Value = serde_json::from_str(&answer)?;
    let machine = v["machine"].as_str().unwrap_or("?");
    let mut text = format!("the machine is {machine}: {} CPUs, {} MiB\n", v["cpus"], v["memory_mib"]);
    text += &format!("workspace {}, daemon {}, QEMU {}\n", v["workspace"], v["daemon_pid"], v["qemu_pid"]);
    for run in v["runs"].as_array().into_iter().flatten() {
        text += &format!("run {}: {}\n", run["id"], run["command"].as_str().unwrap_or("?"));
    }
    Ok(text)
}

fn logs() -> Result<Vec<u8>> {
    let dir = daemon::state_dir(&client::workspace()?)?;
    let mut text = Vec::new();
    for name in ["daemon.log", "qemu.log", machine::LAST_CONSOLE, machine::CONSOLE] {
        text.extend(format!("== {}\n", dir.join(name).display()).bytes());
        text.extend(std::fs::read(dir.join(name)).unwrap_or_default());
    }
    Ok(text)
}

/// Prints what was asked for; whoever reads may stop early.
fn print(text: impl AsRef<[u8]>) {
    let _ = std::io::stdout().write_all(text.as_ref());
}

fn real_main() -> Result<i32> {
    match Cli::parse().command {
        Cmd::Setup => setup::parts().map(drop)?,
        Cmd::Run(args) => return run(args),
        Cmd::Status { json } => print(status(json)?),
        Cmd::Stop => {
            let was = client::stop(&client::workspace()?)?;
            eprintln!("testbed: {}", if was { "stopped" } else { "was not up" });
        }
        Cmd::Restart => drop(client::stop(&client::workspace()?)?),
        Cmd::Logs => print(logs()?),
        Cmd::Daemon { workspace } => {
            daemon::serve(&workspace, Size { memory: machine::MEMORY, cpus: machine::CPUS })?;
        }
        Cmd::Agent => agent::serve()?,
        Cmd::Job { file, cgroup } => {
            job::become_command(&file, &cgroup)?;
            bail!("a command that ran does not come back");
        }
    }
    Ok(0)
}

fn main() -> ExitCode {
    match real_main() {
        Ok(status) => ExitCode::from(status as u8),
        Err(e) => {
            eprintln!("testbed: {e:#}");
            ExitCode::from(client::FAILED as u8)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let d = parse_disk("/dev/null,ro,snapshot").unwrap();
        assert_eq!(d, Disk { file: "/dev/null".into(), ro: true, snapshot: true });
        assert!(!parse_disk("/dev/null").unwrap().ro);
        assert!(parse_disk("/nowhere,rw").is_err());
    }
}
