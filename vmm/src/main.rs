//! `civic-vmm`: the monitor process of one VM. `civic run` starts it; its API socket is how to talk to it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use civic_api::launch::{ForkConfig, Launch, LaunchRequest, RestoreConfig};
use civic_api::{EndReason, ErrorBody, ErrorCode, VmConfig};
use civic_confine::Kind;
use civic_vmm::audit::Audit;
use civic_vmm::control::{Command, Control};
use civic_vmm::directory::Directory;
use civic_vmm::fork::birth::Conceived;
use civic_vmm::resources::Resources;
use civic_vmm::saved::SavedVm;
use civic_vmm::supervisor::{Embryo, Supervisor};
use civic_vmm::{doctor, log, preflight, process, server};
use clap::{Args, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use tracing::{error, info, warn};

/// Longest configuration, in bytes.
const MAX_CONFIG: u64 = 64 << 10;

/// The monitor of one Civic VM. Started by 'civic run'; not meant to be typed.
#[derive(Parser)]
#[command(name = "civic-vmm", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Action {
    /// Print what this host can and cannot do, as JSON.
    Doctor {
        /// Where VMs' directories are to be.
        #[arg(long, default_value = "/run/civic")]
        run_dir: PathBuf,
    },
}

#[derive(Args)]
#[group(multiple = true)]
struct RunArgs {
    /// Read the VM's configuration (JSON) from this file; '-' is standard input.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The VM's own directory, for its lock, socket and logs.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The jailer has connected to the VM to be forked, and left the connection as descriptor 3.
    #[arg(long)]
    introduced: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log::start();
    if let Some(Action::Doctor { run_dir }) = cli.action {
        return doctor_json(&run_dir);
    }
    match confine().and_then(|()| prepare(&cli.run)) {
        Ok(vm) => vm.run(),
        Err(body) => {
            error!("{}", body.message);
            say(&Launch::Failed { error: body });
            ExitCode::FAILURE
        }
    }
}

/// Has the kernel let this process make no system call but those of a monitor, where that is wanted: before it reads anything.
fn confine() -> Result<(), ErrorBody> {
    let refused = |e: civic_confine::ConfineError| ErrorBody::from_error(ErrorCode::JailUnavailable, &e);
    match civic_confine::wanted().map_err(refused)? {
        Some(mode) => civic_confine::begin(Kind::Monitor, mode).map_err(refused),
        None => Ok(()),
    }
}

fn doctor_json(run_dir: &Path) -> ExitCode {
    let report = doctor::examine(run_dir);
    match serde_json::to_string(&report) {
        Ok(json) => println!("{json}"),
        Err(e) => {
            eprintln!("civic-vmm: {e}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Writes the one line that the starter waits for, then lets go of stdout so that it sees the end.
fn say(launch: &Launch) {
    if let Ok(line) = serde_json::to_string(launch) {
        let mut out = io::stdout().lock();
        // A starter that is gone is no reason to end: the socket tells the rest.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
    }
}

/// A VM that is built and answers on its socket.
struct Vm {
    directory: Directory,
    server: server::ServerHandle,
    supervisor: Supervisor,
    audit: Option<Arc<Audit>>,
    /// The starter has heard that it is ready.
    said: bool,
}

fn prepare(args: &RunArgs) -> Result<Vm, ErrorBody> {
    let request = read_request(args)?;
    let (config, saved) = match request {
        LaunchRequest::Fork(request) => return prepare_fork(args, &request),
        LaunchRequest::Boot(config) => (config, None),
        LaunchRequest::Restore(request) => {
            let saved = SavedVm::open(&request.restore)?;
            let config = moved(&saved, request)?;
            (config, Some(saved))
        }
    };
    config.validate()?;
    let invalid = |message: &str| ErrorBody::new(ErrorCode::InvalidRequest, message);
    let dir = args.dir.as_deref().ok_or_else(|| invalid("--dir is missing"))?;
    raise_descriptor_limit();
    let signals = block_signals().map_err(|e| ErrorBody::internal(format!("cannot block signals: {e}")))?;
    let directory = Directory::take(dir)?;
    match build(config, saved, &directory, signals) {
        Ok((server, supervisor, audit)) => Ok(Vm { directory, server, supervisor, audit, said: false }),
        Err(body) => {
            // The starter shows why; what it keeps is its own log.
            if let Err(e) = directory.remove(false) {
                warn!("cannot remove the VM's directory: {e}");
            }
            Err(body)
        }
    }
}

/// What answers, what it is of, and where that is written down.
type Served = (server::ServerHandle, Supervisor, Option<Arc<Audit>>);

fn build(
    config: VmConfig,
    saved: Option<SavedVm>,
    directory: &Directory,
    signals: SigSet,
) -> Result<Served, ErrorBody> {
    preflight::check(&config)?;
    let audit = audit(&config)?;
    let resources = Resources::open(&config, directory.path())?;
    let listener = directory.bind()?;
    let supervisor = match saved {
        None => Supervisor::new(config, resources)?,
        Some(saved) => Supervisor::restore(config, resources, saved)?,
    };
    if let Err(e) = supervisor.listen(directory.path()) {
        warn!("this VM cannot be forked: {e}");
    }
    let server = serve(listener, &supervisor, audit.clone(), signals)?;
    Ok((server, supervisor, audit))
}

fn audit(config: &VmConfig) -> Result<Option<Arc<Audit>>, ErrorBody> {
    config.audit.as_ref().map(|path| Audit::open(path, &config.name).map(Arc::new)).transpose()
}

fn serve(
    listener: UnixListener,
    supervisor: &Supervisor,
    audit: Option<Arc<Audit>>,
    signals: SigSet,
) -> Result<server::ServerHandle, ErrorBody> {
    let server = server::spawn(listener, supervisor.control(), audit).map_err(thread_refused)?;
    let control = supervisor.control();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || obey_signals(&signals, &control))
        .map_err(thread_refused)?;
    Ok(server)
}

fn thread_refused(e: io::Error) -> ErrorBody {
    ErrorBody::internal(format!("cannot start a thread: {e}"))
}

/// Waits to be forked from another VM. The starter hears when it does.
fn prepare_fork(args: &RunArgs, request: &ForkConfig) -> Result<Vm, ErrorBody> {
    civic_api::validate_name(&request.name).map_err(|e| ErrorBody::new(ErrorCode::InvalidRequest, e.to_string()))?;
    let dir = args.dir.as_deref().ok_or_else(|| ErrorBody::new(ErrorCode::InvalidRequest, "--dir is missing"))?;
    raise_descriptor_limit();
    let directory = Directory::take(dir)?;
    match fork(request, &directory, args.introduced) {
        Ok((server, supervisor, audit)) => Ok(Vm { directory, server, supervisor, audit, said: true }),
        Err(body) => {
            if let Err(e) = directory.remove(false) {
                warn!("cannot remove the VM's directory: {e}");
            }
            Err(body)
        }
    }
}

fn fork(request: &ForkConfig, directory: &Directory, introduced: bool) -> Result<Served, ErrorBody> {
    let signals = block_signals().map_err(|e| ErrorBody::internal(format!("cannot block signals: {e}")))?;
    let control = Arc::new(OnceLock::<Control>::new());
    let (to_be, dir) = (Arc::clone(&control), directory.path().to_owned());
    let obey = move || {
        // As long as it is not even known what it is to be, the first signal is its end.
        while to_be.get().is_none() {
            match signals.wait() {
                Ok(Signal::SIGHUP) => (),
                _ if to_be.get().is_some() => break,
                _ => {
                    let _ = std::fs::remove_dir_all(&dir);
                    std::process::exit(1);
                }
            }
        }
        if let Some(control) = to_be.get() {
            obey_signals(&signals, control);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(obey).map_err(thread_refused)?;
    let mut conceived = Conceived::new(request, directory.path(), introduced)?;
    conceived.config.audit.clone_from(&request.audit);
    preflight::check(&conceived.config)?;
    let audit = audit(&conceived.config)?;
    let (resources, mirrors) = conceived.resources(directory.path(), request.source_net)?;
    let listener = directory.bind()?;
    let embryo = Embryo::new(&conceived.config, &resources, &conceived.source);
    if let Err(e) = embryo.listen(directory.path()) {
        warn!("this VM cannot be forked: {e}");
    }
    let unborn = conceived.wait(resources, mirrors, embryo.report())?;
    let ours = embryo.control(unborn.quitter()?);
    let server = server::spawn(listener, ours.clone(), audit.clone()).map_err(thread_refused)?;
    let _ = control.set(ours);
    say(&Launch::ready(process::id()));
    let (supervisor, link) = match unborn.birth() {
        Ok(born) => Supervisor::adopt(embryo, born),
        Err(e) => {
            // Whoever asked for the end hears that it is.
            server.stop();
            return Err(e);
        }
    };
    link.started(supervisor.entered());
    Ok((server, supervisor, audit))
}

impl Vm {
    fn run(self) -> ExitCode {
        if !self.said {
            say(&Launch::ready(process::id()));
        }
        let reason = self.supervisor.run();
        self.server.stop();
        if let Some(audit) = self.audit {
            audit.ended(&reason);
        }
        let failed = matches!(reason, EndReason::Failed { .. });
        if let Err(e) = self.directory.remove(failed) {
            warn!("cannot remove the VM's directory: {e}");
        }
        if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}

/// The configuration of the VM that was saved, with what `request` says has moved.
fn moved(saved: &SavedVm, request: RestoreConfig) -> Result<VmConfig, ErrorBody> {
    let RestoreConfig {
        name,
        restore: _,
        disks,
        nets,
        vsock,
        kernel,
        initrd,
        allow_changed_disks,
        overcommit,
        any_kvm,
        audit,
    } = request;
    let mut config = VmConfig { name, overcommit, any_kvm, audit, ..saved.config.clone() };
    let unknown = |what: &str, id: &str| {
        let message = format!("the saved VM has no {what} '{id}'");
        ErrorBody::new(ErrorCode::InvalidConfig, message).with_hint("only what it has can be elsewhere now")
    };
    for moved in disks {
        let disk = config.disks.iter_mut().find(|disk| disk.id == moved.id);
        disk.ok_or_else(|| unknown("disk", &moved.id))?.path = moved.path;
    }
    for moved in nets {
        let net = config.nets.iter_mut().find(|net| net.id == moved.id);
        net.ok_or_else(|| unknown("network card", &moved.id))?.tap = moved.tap;
    }
    if let Some(uds) = vsock {
        let vsock = config.vsock.as_mut().ok_or_else(|| unknown("vsock at", &uds.display().to_string()))?;
        vsock.uds = uds;
    }
    config.kernel = kernel.unwrap_or(config.kernel);
    config.initrd = initrd.or(config.initrd);
    if !allow_changed_disks {
        saved.check_disks(&config)?;
    }
    Ok(config)
}

fn read_request(args: &RunArgs) -> Result<LaunchRequest, ErrorBody> {
    let invalid = |message: String| {
        ErrorBody::new(ErrorCode::InvalidConfig, message)
            .with_hint("'civic run' writes it; its fields are those of VmConfig in GET /v1/openapi.json")
    };
    let source: Box<dyn Read> = match &args.config {
        Some(path) if path == Path::new("-") => Box::new(io::stdin()),
        Some(path) => Box::new(File::open(path).map_err(|e| invalid(format!("cannot open {}: {e}", path.display())))?),
        None => return Err(invalid("--config is missing".into())),
    };
    let mut text = String::new();
    source
        .take(MAX_CONFIG + 1)
        .read_to_string(&mut text)
        .map_err(|e| invalid(format!("cannot read the configuration: {e}")))?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(ErrorBody::new(ErrorCode::TooLarge, format!("the configuration has more than {MAX_CONFIG} bytes")));
    }
    LaunchRequest::from_json(&text).map_err(|e| invalid(format!("the configuration is wrong: {e}")))
}

/// Lets this process have as many descriptors as it may: each connection of a vsock is one, and the usual soft limit is for programs
/// that use select(2).
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        warn!("cannot raise the limit of open files: {e}");
    }
}

/// Blocks the signals that end the VM, in this thread and all that it will start.
fn block_signals() -> nix::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(signals)
}

/// The first signal presses the power button, the next ends the VM. A terminal that hangs up is no reason to end.
fn obey_signals(signals: &SigSet, control: &Control) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    let mut asked = false;
    loop {
        match signals.wait() {
            Ok(Signal::SIGHUP) => info!("ignoring a hang-up"),
            Ok(signal) => {
                let command = if asked { Command::Kill } else { Command::Stop };
                info!(%signal, ?command, "signal");
                if runtime.block_on(control.command(command)).is_err() {
                    let _ = runtime.block_on(control.command(Command::Kill));
                }
                asked = true;
            }
            Err(e) => {
                warn!("waiting for signals failed: {e}");
                return;
            }
        }
    }
}
