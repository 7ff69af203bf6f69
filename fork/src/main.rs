//! `civic-pager`: the page server of a VM that has forks, in a process of its own, so that nothing that goes wrong in it reaches the VM.
//! `civic fork` starts it.

use std::path::PathBuf;
use std::process::ExitCode;

use civic_confine::Kind;
use civic_fork::hello::{Hello, Role, VERSION, socket};
use civic_fork::pager::server::{ServeError, serve};
use civic_fork::wire::{Wire, WireError};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const USAGE: &str = "\
civic-pager: keeps for a VM's forks what the VM overwrites

usage: civic-pager DIRECTORY
       civic-pager --introduced

DIRECTORY is the VM's own, with its fork.sock. In a jail the jailer has connected already, and left the
connection as descriptor 3. Started by 'civic fork'; ends with the last fork.";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let wire = match (args.next(), args.next()) {
        (Some(arg), None) if arg == "--help" || arg == "-h" => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        (Some(arg), None) if arg == "--version" || arg == "-V" => {
            println!("civic-pager {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        (Some(arg), None) if arg == "--introduced" => {
            Wire::inherited().map_err(|e| format!("descriptor 3 is no connection to a VM: {e}"))
        }
        (Some(dir), None) => {
            let path = socket(&PathBuf::from(dir));
            Wire::connect(&path).map_err(|e| format!("cannot connect to {}: {e}", path.display()))
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let wire = match wire {
        Ok(wire) => wire,
        Err(e) => {
            eprintln!("civic-pager: {e}");
            return ExitCode::FAILURE;
        }
    };
    // Each fork is two; the usual soft limit is for programs that use select(2).
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        eprintln!("civic-pager: cannot raise the limit of open files: {e}");
    }
    let confined = match civic_confine::wanted() {
        Ok(Some(mode)) => civic_confine::begin(Kind::Pager, mode),
        Ok(None) => Ok(()),
        Err(e) => Err(e),
    };
    if let Err(e) = confined {
        eprintln!("civic-pager: {e}");
        return ExitCode::FAILURE;
    }
    let hello = Hello { version: VERSION, role: Role::PageServer };
    match wire.send(&hello, &[]).map_err(ServeError::from).and_then(|()| serve(wire)) {
        // Another one serves that VM, or the VM is gone.
        Ok(()) | Err(ServeError::Wire(WireError::Closed)) => ExitCode::SUCCESS,
        Err(e) => {
            let chain = std::iter::successors(Some(&e as &dyn std::error::Error), |e| e.source());
            eprintln!("civic-pager: {}", chain.map(ToString::to_string).collect::<Vec<_>>().join(": "));
            ExitCode::FAILURE
        }
    }
}
