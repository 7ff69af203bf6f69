//! `cargo xtask`: what the project's developers do, in commands.

mod assets;
mod bench;
mod debian;
mod demo;
mod fuzz;
mod minimal;
mod place;
mod setup;
mod store;
mod test;
mod tiny;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use civic_testbed::kernel;
use clap::{Parser, Subcommand};

use crate::place::{Job, Place};

/// Set up, test, measure and show Civic.
///
/// What is fetched and built is kept in $CIVIC_CACHE (default: $XDG_CACHE_HOME/civic, ~/.cache/civic).
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Make this machine ready: packages, kernels, images and, where it is needed, the testbed.
    Setup,
    /// Run all checks and tests, each where it can run.
    Test(test::Args),
    /// Check the promises that are figures, side by side with QEMU.
    Bench(bench::Args),
    /// Write a page with tables and plots of what benches have measured.
    Performance {
        /// What `cargo xtask bench … --json` wrote.
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// The page. Its plots go beside it, into a folder of the same name.
        #[arg(long, default_value = "docs/performance.md")]
        to: PathBuf,
    },
    /// Feed the monitor's parts what a guest, a file or a client might, and look for what breaks them.
    Fuzz(fuzz::Args),
    /// Boot Debian with nginx under load in civic, and look into forks of it with tools of a store.
    Demo {
        /// In the testbed, even if this machine could.
        #[arg(long)]
        testbed: bool,
    },
    /// Run a program where guests can run, with the environment that integration tests have (CIVIC_ASSETS, …).
    Exec {
        /// In the testbed, even if this machine could.
        #[arg(long)]
        testbed: bool,
        /// The program's file.
        program: PathBuf,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fetch the guest kernels and build the tiny guest for each; or others, which the long tests run as well.
    #[command(alias = "kernel")]
    Kernels {
        /// Series and kind: 5.10-cloud, 6.18-generic, 7.3-rt, ….
        flavours: Vec<String>,
        /// The newest of each series and kind that Debian has, of this release and those before and after, and the minimal one.
        #[arg(long, conflicts_with = "flavours")]
        all: bool,
        /// One with little more than guests need, built from Debian's source package: no modules, no tracer, few symbols.
        #[arg(long, conflicts_with_all = ["all", "flavours"])]
        minimal: bool,
        /// Only say which those are.
        #[arg(long, conflicts_with_all = ["all", "minimal", "flavours"])]
        list: bool,
    },
    /// Build the Debian image and the stores.
    Images,
    /// Print the folder with kernels and images.
    Assets,
    /// Run the testbed's own command line (see `cargo xtask testbed help`).
    #[command(disable_help_flag = true)]
    Testbed {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    #[command(hide = true)]
    BenchHost(bench::HostArgs),
}

fn run() -> Result<ExitCode> {
    let passed = match Cli::parse().command {
        Cmd::Setup => setup::all().map(|()| true)?,
        Cmd::Test(args) => test::run(&args)?,
        Cmd::Bench(args) => bench::run(&args)?,
        Cmd::Performance { runs, to } => bench::page(&runs, &to)?,
        Cmd::Fuzz(args) => fuzz::run(&args)?,
        Cmd::Demo { testbed } => demo::run(testbed)?,
        Cmd::Exec { testbed, program, args } => {
            setup::all()?;
            let place = if testbed { Place::Testbed } else { Place::for_guests().0 };
            Job { program: &program, args: &args, root_image: true, timeout: 3600 }.run(place)?
        }
        Cmd::Kernels { list: true, .. } => {
            kernel::available()?.iter().for_each(|flavour| println!("{flavour}"));
            true
        }
        Cmd::Kernels { minimal: true, .. } => assets::kernel(minimal::FLAVOUR).map(|_| true)?,
        Cmd::Kernels { all: true, .. } => assets::every_kernel().map(|()| true)?,
        Cmd::Kernels { flavours, .. } if flavours.is_empty() => assets::kernels().map(|_| true)?,
        Cmd::Kernels { flavours, .. } => {
            flavours.iter().try_for_each(|flavour| assets::kernel(flavour).map(drop)).map(|()| true)?
        }
        Cmd::Images => {
            debian::build(&assets::kernels()?)?;
            store::build()?;
            store::examples().map(|()| true)?
        }
        Cmd::Assets => {
            println!("{}", assets::dir()?.display());
            true
        }
        Cmd::Testbed { args } => {
            let status = place::testbed()?.args(args).status().context("cannot run the testbed")?;
            return Ok(ExitCode::from(status.code().unwrap_or(125) as u8));
        }
        Cmd::BenchHost(args) => bench::host(&args)?,
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn main() -> ExitCode {
    run().unwrap_or_else(|e| {
        eprintln!("xtask: {e:#}");
        ExitCode::FAILURE
    })
}
