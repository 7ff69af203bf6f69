//! `civic`: runs, lists, looks at and ends VMs.
//!
//! It starts a `civic-vmm` process per VM and speaks HTTP with it over the VM's socket (`civic-api`); nothing else knows
//! where VMs are but the run directory. Each option is defined once, in [`cli`], which yields parsing, help, completions and
//! manual pages.
//!
//! Exit status: 0 when what was asked is done, 125 when not. The last line on stderr then says what to do.

mod advice;
mod archive;
mod balloon;
mod birth;
mod cli;
mod console;
mod cp;
mod device;
mod devices;
mod exec;
mod fork;
mod guest;
mod inspect;
mod jail;
mod monitor;
mod process;
mod program;
mod run;
mod rundir;
mod save;
mod show;
mod stop;
mod store;
mod table;
mod talk;
mod terminal;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use civic_api::ErrorCode;
use civic_api::client::{Client, ClientError};
use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};
use crate::rundir::RunDir;

/// Exit status of what Civic itself could not do.
const FAILED: u8 = 125;

/// Ends with the status of a program that was run.
#[derive(Debug, thiserror::Error)]
#[error("the program has ended with status {0}")]
pub struct Ended(pub u8);

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for; the rest is a misuse.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS };
        }
    };
    match perform(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Ended>() => {
            ExitCode::from(error.downcast_ref::<Ended>().map_or(FAILED, |ended| ended.0))
        }
        Err(error) => {
            // A reader that went away, as `civic list | head` does, is no failure to talk about.
            if error.downcast_ref::<std::io::Error>().is_none_or(|e| e.kind() != std::io::ErrorKind::BrokenPipe) {
                let _ = writeln!(std::io::stderr(), "{}", advice::told(&error));
            }
            ExitCode::from(FAILED)
        }
    }
}

fn perform(cli: Cli) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    let dir = RunDir::new(&cli.run_dir)?;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run(&dir, *args).await,
            Command::List { json } => show::list(&dir, json).await,
            Command::Info { name, guest: true, files, json } => guest::info(&dir, &name, &files, json).await,
            Command::Info { name, guest: false, json, .. } => show::info(&dir, &name, json).await,
            Command::Console { name, port } => console::attach(&dir, &name, &port).await,
            Command::Pause { name } => on(&dir, &name, async |vm| vm.pause().await).await,
            Command::Resume { name } => on(&dir, &name, async |vm| vm.resume().await).await,
            Command::Stop { name, timeout, force } => stop::stop(&dir, &name, timeout, force).await,
            Command::Save { name, directory, after, json } => {
                save::save(&dir, &name, &directory, after.then(), json).await
            }
            Command::Fork(args) => fork::fork(&dir, *args).await,
            Command::Inspect(args) => inspect::inspect(&dir, *args).await,
            Command::Exec(args) => exec::exec(&dir, args).await,
            Command::Cp(args) => cp::cp(&dir, args).await,
            Command::Tree { json } => fork::tree(&dir, json).await,
            Command::Balloon { name, size, json } => balloon::balloon(&dir, &name, size, json).await,
            Command::Device { command } => device::device(&dir, command).await,
            Command::Store { command } => store::store(command).await,
            Command::Kill { name } => stop::kill(&dir, &name).await,
            Command::Doctor { json } => show::doctor(&dir, json),
            Command::Metrics { name } => {
                let text = on(&dir, &name, async |vm| vm.metrics().await).await?;
                Ok(std::io::stdout().write_all(text.as_bytes())?)
            }
            Command::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "civic", &mut script);
                Ok(std::io::stdout().write_all(&script)?)
            }
            Command::Man { command } => show::man(command.as_deref()),
        }
    });
    // A thread that reads the terminal may still be in its read: do not wait for it.
    runtime.shutdown_background();
    result
}

/// Asks the monitor of `name` for something, and explains if there is none.
async fn on<T>(dir: &RunDir, name: &str, ask: impl AsyncFnOnce(Client) -> Result<T, ClientError>) -> anyhow::Result<T> {
    ask(dir.client(name)).await.map_err(|error| explain(dir, name, error))
}

/// `error` of the monitor of `name`, in words that say what to do.
fn explain(dir: &RunDir, name: &str, error: ClientError) -> anyhow::Error {
    match error {
        ClientError::NotRunning { .. } => dir.not_running(name),
        ClientError::Refused(body) if body.hint.is_none() && body.code == ErrorCode::WrongState => {
            advice::error(body.message, format!("'civic info {name}' shows its state"))
        }
        ClientError::Refused(body) => body.into(),
        error => {
            let log = dir.log(name);
            let hint = format!("see {}; 'civic kill {name}' ends a VM that hangs", log.display());
            advice::error(advice::chain(&error), hint)
        }
    }
}
