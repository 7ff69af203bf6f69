//! The monitor of a bare-metal guest, driven as `civic run` drives it: a process, its one line on stdout, its API socket.
//!
//! Whatever waits has a deadline; when it passes, the test fails with the console's text and the monitor's log.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use civic_api::client::{Client, ClientError};
use civic_api::launch::{ForkConfig, Launch, SOCKET_FILE, SourceNet};
use civic_api::{
    AfterSave, CONSOLE_PORT_SERIAL, DiskConfig, DiskFormat, ErrorBody, FORK_SOCKET_FILE, ForkReport, ForkRequest,
    ForksConfig, NewDevice, SaveReport, SaveRequest, VmConfig, VmInfo, VmState,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// How long a test may wait in all: ten times what the slowest needs, so that a loaded machine is no failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a test that waits for the console looks whether the monitor is still there.
const GLANCE: Duration = Duration::from_millis(100);

/// The monitor's binary: in `CIVIC_BIN_DIR`, or where cargo put it beside the tests.
pub fn monitor_binary() -> PathBuf {
    binary("civic-vmm")
}

/// One of the product's binaries.
pub fn binary(name: &str) -> PathBuf {
    let dir = match std::env::var_os("CIVIC_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let test = std::env::current_exe().expect("a test knows its own path");
            let deps = test.parent().expect("a test lies in a directory");
            deps.parent().expect("the directory of tests lies in one of binaries").to_owned()
        }
    };
    let binary = dir.join(name);
    assert!(
        binary.is_file(),
        "{} does not exist: 'cargo build --bins' makes it, or set CIVIC_BIN_DIR",
        binary.display()
    );
    binary
}

/// A VM to be: its configuration, and a directory of its own for everything it needs.
pub struct Setup {
    root: TempDir,
    /// As the monitor will get it; tests may spoil it.
    pub config: VmConfig,
    user: Option<(u32, u32)>,
    run_dir: PathBuf,
    jailed: bool,
    /// Where its images may be besides its own directory.
    beside: Option<PathBuf>,
    /// The directory of the VM that it is to be forked from.
    source: Option<PathBuf>,
}

/// Whether monitors and page servers are jailed where a test does not say: `CIVIC_TEST_JAIL=1` has every test do so.
fn jail_all() -> bool {
    std::env::var_os("CIVIC_TEST_JAIL").is_some_and(|value| value == "1")
}

/// The jailer, as `civic run --jail` starts it, with `options`.
fn jailer(options: &[(&str, &Path)]) -> Command {
    let mut command = Command::new(binary("civic-jailer"));
    for (option, value) in options {
        command.arg(option).arg(value);
    }
    command
}

impl Setup {
    /// One vCPU, 32 MiB, and `kernel`'s bytes as its kernel.
    pub fn new(kernel: &[u8]) -> Self {
        let root = tempfile::Builder::new().prefix("civic-bare.").tempdir().expect("a directory for the test");
        let path = root.path().join("kernel");
        fs::write(&path, kernel).expect("the kernel can be written");
        let config = VmConfig {
            name: "bare".into(),
            kernel: path,
            initrd: None,
            cmdline: None,
            memory_bytes: 32 << 20,
            cpus: 1,
            disks: Vec::new(),
            nets: Vec::new(),
            consoles: Vec::new(),
            vsock: None,
            balloon: None,
            forks: ForksConfig::default(),
            overcommit: false,
            any_kvm: true,
            allow_programs: false,
            audit: None,
        };
        let run_dir = root.path().join("run");
        Self { root, config, user: None, run_dir, jailed: jail_all(), beside: None, source: None }
    }

    /// With so many vCPUs.
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.config.cpus = cpus;
        self
    }

    /// With so much memory.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.memory_bytes = bytes;
        self
    }

    /// With a disk: a raw image of so many bytes.
    pub fn disk(mut self, id: &str, bytes: u64) -> Self {
        let path = self.root.path().join(format!("{id}.img"));
        let file = File::create(&path).expect("an image can be made");
        file.set_len(bytes).expect("an image can be made");
        self.config.disks.push(DiskConfig::new(id, path));
        self
    }

    /// With a disk: a qcow2 image of so many bytes, with nothing in it.
    pub fn qcow2(mut self, id: &str, bytes: u64) -> Self {
        let path = self.root.path().join(format!("{id}.qcow2"));
        let mut command = Command::new("qemu-img");
        let made = command.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(bytes.to_string()).status();
        assert!(made.expect("this test needs qemu-img: `cargo xtask setup` installs it").success());
        let disk = DiskConfig::new(id, path);
        self.config.disks.push(DiskConfig { format: DiskFormat::Qcow2, ..disk });
        self
    }

    /// With another name.
    pub fn name(mut self, name: &str) -> Self {
        self.config.name = name.into();
        self
    }

    /// With another run directory.
    pub fn run_dir(mut self, dir: PathBuf) -> Self {
        self.run_dir = dir;
        self
    }

    /// The monitor runs as this user and group.
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        self
    }

    /// The monitor, its forks and their page server run in jails.
    pub fn jailed(mut self) -> Self {
        self.jailed = true;
        self
    }

    /// With what is in `dir`, which its monitor may write even in a jail.
    pub fn beside(mut self, dir: &Path) -> Self {
        self.beside = Some(dir.to_owned());
        self
    }

    /// The test's own directory.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The VM's directory, as the monitor is told.
    pub fn dir(&self) -> PathBuf {
        self.run_dir.join(&self.config.name)
    }

    /// Writes `text` where the monitor is to read its configuration.
    fn write_config(&self, text: &str) -> PathBuf {
        let path = self.root.path().join("config.json");
        fs::write(&path, text).expect("the configuration can be written");
        path
    }

    fn command(&self, config: &Path) -> (Command, PathBuf) {
        let log = self.root.path().join("monitor.log");
        let mut binary = monitor_binary();
        if self.user.is_some() {
            // Another user may be kept from the build directory, and from ours.
            let copy = self.root.path().join("civic-vmm");
            fs::copy(&binary, &copy).expect("the monitor can be copied");
            binary = copy;
            for path in [self.root.path(), &binary] {
                fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("permissions can be set");
            }
            fs::create_dir_all(&self.run_dir).expect("a run directory can be made");
            fs::set_permissions(&self.run_dir, fs::Permissions::from_mode(0o777)).expect("permissions can be set");
        }
        let mut command = if self.jailed && self.user.is_none() { self.jail(&binary) } else { Command::new(binary) };
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command.arg("--config").arg(config).arg("--dir").arg(self.dir());
        let stderr = File::create(&log).expect("a log can be made");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        (command, log)
    }

    /// A jail for the monitor, in which there is what this test has.
    fn jail(&self, monitor: &Path) -> Command {
        let path = Path::new;
        let dir = self.dir();
        let mut options = vec![("--dir", &*dir), ("--write", self.root.path()), ("--scratch", path("/var/tmp"))];
        options.extend(self.beside.iter().map(|beside| ("--write", &**beside)));
        for device in ["/dev/kvm", "/dev/userfaultfd", "/dev/null", "/dev/net/tun"] {
            options.push(("--device", path(device)));
        }
        options.push(("--net", path("host")));
        let mut command = jailer(&options);
        if let Some(source) = &self.source {
            let role = format!("child {}", self.config.name);
            command.arg("--introduce").arg(source.join(FORK_SOCKET_FILE)).args(["--role", &role]);
        }
        command.arg("--").arg(monitor);
        if self.source.is_some() {
            command.arg("--introduced");
        }
        command
    }

    fn spawn(&self, config: &Path) -> (Process, Launch, PathBuf) {
        let (mut command, log) = self.command(config);
        let mut child = Process { child: command.spawn().expect("the monitor can be started"), pid: None };
        let stdout = child.child.stdout.take().expect("its stdout is a pipe");
        let (say, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = say.send(line);
        });
        let Ok(line) = heard.recv_timeout(PATIENCE) else {
            panic!("the monitor says nothing; its log:\n{}", read(&log));
        };
        let launch = serde_json::from_str(&line).unwrap_or_else(|e| {
            panic!("the monitor says {line:?}, which is no launch ({e}); its log:\n{}", read(&log))
        });
        if let Launch::Ready { pid, .. } = launch {
            match self.jailed && self.user.is_none() {
                true => assert_eq!(jailed_by(child.child.id(), "civic-vmm"), [pid]),
                false => assert_eq!(pid, child.child.id()),
            }
            child.pid = Some(pid);
        }
        (child, launch, log)
    }

    /// Starts the monitor and attaches to the serial console. The guest waits for [`Vm::start`].
    pub fn launch(self) -> Vm {
        let text = serde_json::to_string(&self.config).expect("a configuration is JSON");
        launch(Rc::new(self), &text)
    }

    /// As [`Setup::launch`], and lets the guest run.
    pub fn boot(self) -> Vm {
        let vm = self.launch();
        vm.start();
        vm
    }

    /// What a monitor is told to restore what was saved to `name`.
    pub fn restoring(&self, name: &str) -> String {
        let restore = self.root().join(name);
        let request = serde_json::json!({ "name": self.config.name, "restore": restore, "any_kvm": true });
        request.to_string()
    }

    /// Starts the monitor with `text` for a configuration; it gets ready and then ends by itself: its exit status and log.
    pub fn dies(&self, text: &str) -> (ExitStatus, String) {
        let (mut child, launch, log) = self.spawn(&self.write_config(text));
        assert!(matches!(launch, Launch::Ready { .. }), "{launch:?}; the log:\n{}", read(&log));
        let status = child.ends_by(Instant::now() + PATIENCE);
        (status.unwrap_or_else(|| panic!("the monitor does not end; its log:\n{}", read(&log))), read(&log))
    }

    /// Starts the monitor, which must refuse: the error, after exit status 1 and nothing left behind.
    pub fn refused(&self) -> ErrorBody {
        let text = serde_json::to_string(&self.config).expect("a configuration is JSON");
        self.refused_with(&text)
    }

    /// As [`Setup::refused`] with `text` in place of the configuration.
    pub fn refused_with(&self, text: &str) -> ErrorBody {
        self.refused_from(&self.write_config(text))
    }

    /// As [`Setup::refused`] with the configuration in the file `config`.
    pub fn refused_from(&self, config: &Path) -> ErrorBody {
        let there = self.dir().exists();
        let (mut child, launch, log) = self.spawn(config);
        let Launch::Failed { error } = launch else {
            panic!("the monitor is ready, though it should refuse; its log:\n{}", read(&log));
        };
        let status = child.child.wait().expect("the monitor is our child");
        assert_eq!(status.code(), Some(1), "{error:?}; the log:\n{}", read(&log));
        assert_eq!(self.dir().exists(), there, "{error:?}: the VM's directory is left behind");
        assert!(!error.message.is_empty() && !error.message.contains('\n'), "{error:?}");
        error
    }
}

fn launch(setup: Rc<Setup>, text: &str) -> Vm {
    let (child, launch, log) = setup.spawn(&setup.write_config(text));
    match launch {
        Launch::Ready { .. } => {}
        Launch::Failed { error } => panic!("there is no VM: {error:?}; the log:\n{}", read(&log)),
    }
    Vm::new(setup, child, log)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| format!("({e})"))
}

/// What `jailer` has jailed, by its number here, once that is `program`: it had other children before.
fn jailed_by(jailer: u32, program: &str) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{jailer}/task/{jailer}/children")).unwrap_or_default();
    let is_it =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == program);
    children.split_whitespace().filter(is_it).filter_map(|pid| pid.parse().ok()).collect()
}

/// A monitor's process, which does not outlive the test, however that ends.
struct Process {
    /// As it was started: where it is jailed, the jailer.
    child: Child,
    /// The number of the program itself.
    pid: Option<u32>,
}

impl Process {
    fn id(&self) -> u32 {
        self.pid.unwrap_or_else(|| self.child.id())
    }

    /// Waits for it to end: its status, or none at the deadline.
    fn ends_by(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            let status = self.child.try_wait().expect("the monitor is our child");
            if status.is_some() || Instant::now() > deadline {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the console's thread has received.
#[derive(Default)]
struct Received {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
}

impl Received {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A running monitor. Dropping it ends the process.
pub struct Vm {
    setup: Rc<Setup>,
    child: Process,
    log: PathBuf,
    deadline: Instant,
    runtime: Runtime,
    client: Client,
    console: Console,
    /// Its page server, and former ones.
    page_servers: RefCell<Vec<Process>>,
}

/// A monitor that waits to be forked from a VM. Dropping it ends the process.
pub struct Waiting {
    setup: Rc<Setup>,
    child: Process,
    log: PathBuf,
}

impl Waiting {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.setup.config.name
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks its API.
    pub fn api<T, F: Future<Output = T>>(&self, work: impl FnOnce(Client) -> F) -> T {
        runtime().block_on(work(Client::new(self.setup.dir().join(SOCKET_FILE))))
    }

    /// It lives.
    pub fn born(self) -> Vm {
        Vm::new(self.setup, self.child, self.log)
    }

    /// What the monitor has logged.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// What it is by now; none if it does not answer any more.
    pub fn state(&self) -> Option<VmState> {
        Some(self.api(|client| async move { client.info().await }).ok()?.state)
    }

    /// Waits for the monitor to end, be it that it waited in vain or lived: its exit status.
    pub fn ends(&mut self) -> ExitStatus {
        let status = self.child.ends_by(Instant::now() + PATIENCE);
        status.unwrap_or_else(|| panic!("the monitor does not end; its log:\n{}", read(&self.log)))
    }

    /// Waits for the monitor to end by itself: its exit status.
    pub fn ended(mut self) -> ExitStatus {
        let status = self.ends();
        assert!(!self.setup.dir().exists(), "its directory is left; the log:\n{}", read(&self.log));
        status
    }
}

/// A hostile program in the place of a fork's monitor. Dropping it ends the process.
pub struct Hostile {
    _child: Process,
    heard: std::sync::mpsc::Receiver<String>,
    _setup: Setup,
}

impl Hostile {
    /// The lines that it says before it says `word`.
    pub fn until(&mut self, word: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            match self.heard.recv_timeout(PATIENCE) {
                Ok(line) if line == word => return lines,
                Ok(line) => lines.push(line),
                Err(e) => panic!("the hostile program does not say {word:?} ({e}), but: {lines:#?}"),
            }
        }
    }
}

impl Drop for Vm {
    /// A test that has failed may have done so because of another VM than the one that it tells of.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of '{}'\n{}", self.setup.config.name, read(&self.log));
        }
    }
}

struct Console {
    received: Arc<Received>,
    input: mpsc::UnboundedSender<Vec<u8>>,
    /// What [`Vm::expect`] has consumed.
    cursor: usize,
}

impl Vm {
    fn new(setup: Rc<Setup>, child: Process, log: PathBuf) -> Self {
        let runtime = runtime();
        let client = Client::new(setup.dir().join(SOCKET_FILE));
        let console = attach(client.clone());
        let (deadline, page_servers) = (Instant::now() + PATIENCE, RefCell::default());
        Self { setup, child, log, deadline, runtime, client, console, page_servers }
    }

    /// Fails the test with all that is known.
    pub fn fail(&self, what: &str) -> ! {
        let info = self.runtime.block_on(self.client.info());
        let bytes = self.console.received.bytes().clone();
        let shown = &bytes[bytes.len().saturating_sub(1024)..];
        panic!(
            "{what}\n--- console ({} bytes, {} consumed)\n{}\n--- log\n{}\n--- info\n{info:?}",
            bytes.len(),
            self.console.cursor,
            shown.escape_ascii(),
            read(&self.log),
        );
    }

    fn ask<T>(&self, what: &str, work: impl Future<Output = Result<T, ClientError>>) -> T {
        match self.runtime.block_on(work) {
            Ok(value) => value,
            Err(e) => self.fail(&format!("{what}: {e}")),
        }
    }

    /// The API's client, and the runtime that it needs.
    pub fn api<T, F: Future<Output = T>>(&self, work: impl FnOnce(Client) -> F) -> T {
        self.runtime.block_on(work(self.client.clone()))
    }

    /// Lets the guest run.
    pub fn start(&self) {
        self.ask("start", self.client.start());
    }

    /// Pauses.
    pub fn pause(&self) {
        self.ask("pause", self.client.pause());
    }

    /// Resumes.
    pub fn resume(&self) {
        self.ask("resume", self.client.resume());
    }

    /// Presses the power button.
    pub fn stop(&self) {
        self.ask("stop", self.client.stop());
    }

    /// Pulls the plug.
    pub fn kill(&self) {
        self.ask("kill", self.client.kill());
    }

    /// The VM as it is now.
    pub fn info(&self) -> VmInfo {
        self.ask("info", self.client.info())
    }

    /// The VM's state.
    pub fn state(&self) -> VmState {
        self.info().state
    }

    /// A counter of a device, or fails.
    pub fn counter(&self, device: &str, counter: &str) -> u64 {
        let info = self.info();
        let found = info.devices.iter().find(|d| d.id == device).and_then(|d| d.counters.get(counter));
        *found.unwrap_or_else(|| self.fail(&format!("no counter {counter} of {device}")))
    }

    /// A kind of exits, summed over all vCPUs.
    pub fn exits(&self, kind: &str) -> u64 {
        self.info().vcpus.iter().filter_map(|vcpu| vcpu.exits.get(kind)).sum()
    }

    /// The monitor's metrics.
    pub fn metrics(&self) -> String {
        self.ask("metrics", self.client.metrics())
    }

    /// One of them, by its name with its labels, or fails.
    pub fn metric(&self, series: &str) -> u64 {
        let metrics = self.metrics();
        let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        let value = line.and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| self.fail(&format!("no {series} in\n{metrics}")))
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The VM's directory.
    pub fn dir(&self) -> PathBuf {
        self.setup.dir()
    }

    /// Its configuration and files.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Types `bytes` on the serial console.
    pub fn send(&self, bytes: &[u8]) {
        if self.console.input.send(bytes.to_vec()).is_err() {
            self.fail("the console is gone");
        }
    }

    /// Bytes printed so far, all in all.
    pub fn printed(&self) -> usize {
        self.console.received.bytes().len()
    }

    /// Waits for `text` behind what was expected before; returns everything up to and with it.
    pub fn expect(&mut self, text: &str) -> String {
        let bytes = self.wait(&format!("no {text:?} on the console"), |bytes| {
            let found = bytes.windows(text.len()).position(|window| window == text.as_bytes())?;
            Some(found + text.len())
        });
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for `len` bytes behind what was expected before.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        self.wait(&format!("no {len} bytes on the console"), |bytes| (bytes.len() >= len).then_some(len))
    }

    /// Waits for a line `NAME=XXXXXXXX` (see `Asm::print_value`) and returns its value.
    pub fn value(&mut self, name: &str) -> u32 {
        self.expect(&format!("{name}="));
        let line = self.expect("\n");
        u32::from_str_radix(line.trim(), 16).unwrap_or_else(|e| self.fail(&format!("{name}={line:?}: {e}")))
    }

    fn wait(&mut self, missing: &str, enough: impl Fn(&[u8]) -> Option<usize>) -> Vec<u8> {
        let cursor = self.console.cursor;
        let mut bytes = self.console.received.bytes();
        loop {
            if let Some(len) = enough(&bytes[cursor..]) {
                self.console.cursor += len;
                return bytes[cursor..cursor + len].to_vec();
            }
            // Looked at before waiting, so that the last words of a monitor that ends are still heard.
            let ended = matches!(self.child.child.try_wait(), Ok(Some(_)));
            let before = bytes.len();
            bytes = self.console.received.more.wait_timeout(bytes, GLANCE).unwrap_or_else(|e| e.into_inner()).0;
            if bytes.len() == before && (ended || Instant::now() > self.deadline) {
                drop(bytes);
                self.fail(missing);
            }
        }
    }

    /// Has patience for as long as this from now on: for who works with a VM for longer than a test.
    pub fn extend(&mut self, by: Duration) {
        self.deadline = Instant::now() + by;
    }

    /// Waits until `holds`.
    pub fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        while !holds(self) {
            if Instant::now() > self.deadline {
                self.fail(&format!("in vain waited for: {what}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the monitor to end; its directory must be gone then.
    pub fn ended(&mut self) -> ExitStatus {
        let status = self.wait_end();
        let dir = self.setup.dir();
        assert!(!dir.exists(), "{} is left behind; the log:\n{}", dir.display(), read(&self.log));
        status
    }

    /// What the monitor has logged.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Where the API is.
    pub fn socket(&self) -> PathBuf {
        self.dir().join(SOCKET_FILE)
    }

    /// Waits for the monitor to end after a failure: its status, and the files that it left.
    pub fn ended_badly(&mut self) -> (ExitStatus, Vec<String>) {
        let status = self.wait_end();
        let entries = fs::read_dir(self.setup.dir()).unwrap_or_else(|e| self.fail(&format!("no directory: {e}")));
        let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string();
        (status, entries.map(|entry| name(entry).expect("names are UTF-8")).collect())
    }

    /// Runs the VM once more, after it has ended.
    pub fn again(&self) -> Vm {
        let text = serde_json::to_string(&self.setup.config).expect("a configuration is JSON");
        let vm = launch(Rc::clone(&self.setup), &text);
        vm.start();
        vm
    }

    /// Saves the VM to `name` in the test's directory.
    pub fn save(&self, name: &str, then: AfterSave) -> SaveReport {
        match self.try_save(name, then) {
            Ok(report) => report,
            Err(e) => self.fail(&format!("it cannot be saved: {e}")),
        }
    }

    /// [`Vm::save`], which may fail.
    pub fn try_save(&self, name: &str, then: AfterSave) -> Result<SaveReport, ClientError> {
        let request = SaveRequest { directory: self.setup.root().join(name), then };
        self.api(|client| async move { client.save(&request).await })
    }

    /// The VM that was saved to `name`, waiting for [`Vm::start`]. This one must have ended.
    pub fn restored(&self, name: &str) -> Vm {
        launch(Rc::clone(&self.setup), &self.setup.restoring(name))
    }

    /// A monitor that waits to be forked from this VM.
    pub fn waiting(&self, name: &str) -> Waiting {
        self.waiting_with(name, &[])
    }

    /// The same, with devices of its own.
    pub fn waiting_with(&self, name: &str, devices: &[NewDevice]) -> Waiting {
        let (setup, (child, launch, log)) = self.child(name, devices);
        match launch {
            Launch::Ready { .. } => {}
            Launch::Failed { error } => panic!("nobody waits: {error:?}; the log:\n{}", read(&log)),
        }
        Waiting { setup, child, log }
    }

    /// A monitor that cannot wait to be forked from this VM, or cannot be: why.
    pub fn refused_child(&self, name: &str, devices: &[NewDevice]) -> ErrorBody {
        let (setup, (child, launch, log)) = self.child(name, devices);
        if let Launch::Failed { error } = launch {
            return error;
        }
        self.want_page_server();
        match self.attempt_fork(vec![Waiting { setup, child, log }], false) {
            Err((ClientError::Refused(error), _)) => error,
            Err((error, _)) => self.fail(&error.to_string()),
            Ok(_) => self.fail(&format!("'{name}' lives")),
        }
    }

    fn child(&self, name: &str, devices: &[NewDevice]) -> (Rc<Setup>, (Process, Launch, PathBuf)) {
        let setup = Rc::new(self.child_setup(name));
        let request = ForkConfig {
            name: name.into(),
            fork_of: self.dir(),
            overlay_dir: Some(setup.root().to_owned()),
            source_net: SourceNet::default(),
            devices: devices.to_vec(),
            // Nobody starts any, but what is done for them is done.
            for_programs: !devices.is_empty(),
            audit: setup.config.audit.clone(),
        };
        let request = serde_json::to_string(&request).expect("a request is JSON");
        let spawned = setup.spawn(&setup.write_config(&request));
        (setup, spawned)
    }

    /// `program` in the place of the monitor of a fork of this VM, which `attack`s: see civic-hostile.
    pub fn hostile(&self, name: &str, program: &Path, attack: &str) -> Hostile {
        let setup = self.child_setup(name);
        let mut command = if setup.jailed {
            setup.jail(program)
        } else {
            let mut command = Command::new(program);
            command.arg(self.dir().join(FORK_SOCKET_FILE));
            command
        };
        command.args([name, attack]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = Process { child: command.spawn().expect("the program can be started"), pid: None };
        let stdout = BufReader::new(child.child.stdout.take().expect("its stdout is a pipe"));
        let (say, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| say.send(line)));
        Hostile { _child: child, heard, _setup: setup }
    }

    fn child_setup(&self, name: &str) -> Setup {
        let root = tempfile::Builder::new().prefix("civic-bare.").tempdir().expect("a directory for the test");
        let mut config = VmConfig { name: name.into(), ..self.setup.config.clone() };
        if let Some(audit) = &mut config.audit {
            *audit = audit.with_extension(name);
            // As `civic fork` does.
            fs::write(audit, "").expect("a log can be made");
        }
        Setup {
            root,
            config,
            user: None,
            run_dir: self.setup.run_dir.clone(),
            jailed: self.setup.jailed && self.setup.user.is_none(),
            beside: Some(self.setup.root().to_owned()),
            source: Some(self.dir()),
        }
    }

    /// Starts a page server for this VM, if it has none. Its process id.
    pub fn page_server(&self) -> u32 {
        self.want_page_server();
        self.page_servers.borrow().last().expect("a test starts page servers by this, for a VM that is no fork").id()
    }

    fn want_page_server(&self) {
        if !self.info().family.page_server {
            let log = File::options().append(true).open(&self.log).expect("the log is there");
            let jailed = self.setup.jailed && self.setup.user.is_none();
            let mut command = if jailed {
                let mut command = jailer(&[("--introduce", &self.dir().join(FORK_SOCKET_FILE))]);
                command.args(["--role", "pager", "--"]).arg(binary("civic-pager")).arg("--introduced");
                command
            } else {
                let mut command = Command::new(binary("civic-pager"));
                command.arg(self.dir());
                command
            };
            let server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
            let child = server.expect("a page server can be started");
            let pid = jailed.then(|| {
                loop {
                    if let [pid] = jailed_by(child.id(), "civic-pager")[..] {
                        break pid;
                    }
                    assert!(Instant::now() < self.deadline, "the page server does not begin");
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            self.page_servers.borrow_mut().push(Process { child, pid });
        }
    }

    /// Forks this VM: those who wait live.
    pub fn fork(&self, waiting: Vec<Waiting>, paused: bool) -> (ForkReport, Vec<Vm>) {
        self.want_page_server();
        match self.attempt_fork(waiting, paused) {
            Ok((report, children)) => {
                assert_eq!(report.failed, [], "{}", read(&self.log));
                (report, children.into_iter().map(Waiting::born).collect())
            }
            Err((e, waiting)) => {
                let logs: Vec<_> = waiting.iter().map(|waiting| read(&waiting.log)).collect();
                self.fail(&format!("it cannot be forked: {e}\n{}", logs.join("\n")))
            }
        }
    }

    /// Forks this VM, if that can be. Those who wait are children then, though some may have failed, or ended already.
    pub fn attempt_fork(
        &self,
        waiting: Vec<Waiting>,
        paused: bool,
    ) -> Result<(ForkReport, Vec<Waiting>), (ClientError, Vec<Waiting>)> {
        let children = waiting.iter().map(|waiting| waiting.name().to_owned()).collect();
        match self.try_fork(ForkRequest { children, paused }) {
            Ok(report) => Ok((report, waiting)),
            Err(e) => Err((e, waiting)),
        }
    }

    /// Asks for a fork.
    pub fn try_fork(&self, request: ForkRequest) -> Result<ForkReport, ClientError> {
        self.api(|client| async move { client.fork(&request).await })
    }

    fn wait_end(&mut self) -> ExitStatus {
        self.child.ends_by(self.deadline).unwrap_or_else(|| self.fail("the monitor does not end"))
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made")
}

/// Attaches to the serial console; a thread moves its bytes until it ends.
fn attach(client: Client) -> Console {
    let received = Arc::new(Received::default());
    let (input, mut typed) = mpsc::unbounded_channel::<Vec<u8>>();
    let (say, attached) = std::sync::mpsc::channel();
    let into = Arc::clone(&received);
    std::thread::spawn(move || {
        runtime().block_on(async {
            let stream = client.console(CONSOLE_PORT_SERIAL).await;
            let (stream, told) = match stream {
                Ok(stream) => (Some(stream), Ok(())),
                Err(e) => (None, Err(e.to_string())),
            };
            let _ = say.send(told);
            let Some(stream) = stream else { return };
            let (mut output, mut keys) = tokio::io::split(stream);
            let reads = async {
                let mut chunk = vec![0; 64 << 10];
                while let Ok(len @ 1..) = output.read(&mut chunk).await {
                    into.bytes().extend(&chunk[..len]);
                    into.more.notify_all();
                }
            };
            let writes = async {
                while let Some(bytes) = typed.recv().await {
                    if keys.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
                // The test is over: leave the output as it is.
                std::future::pending::<()>().await;
            };
            tokio::select! { () = reads => {}, () = writes => {} }
        });
    });
    match attached.recv() {
        Ok(Ok(())) => {}
        Ok(Err(e)) => panic!("cannot attach to the console: {e}"),
        Err(_) => panic!("cannot attach to the console"),
    }
    Console { received, input, cursor: 0 }
}
