//! Linux guests as tests see them: `Vm::start(spec)?`, then `vm.sh("nproc")?`.
//!
//! A VM is started by the real `civic` command and spoken to over its serial console, as an operator would; nothing of ours runs
//! in the guest. Every wait has a deadline and fails with the end of the console's text.

pub mod emulator;

use std::fs;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use civic_api::{ForkReport, GuestKernel, VmInfo, routes};

/// How long a guest may take to boot: an emulated host is slow, and slower when something else keeps its cores busy.
pub const BOOT: Duration = Duration::from_secs(420);
/// How long a command in the guest may take.
pub const STEP: Duration = Duration::from_secs(300);
/// Prints what a guest's kernel complains of.
pub const COMPLAINTS: &str = "dmesg | grep -E 'Call Trace|BUG:|soft lockup|rcu.*stall|hung_task|blocked for more than|Oops|I/O error|\
    EXT4-fs error' || true";

/// Stock kernels, by the names of their folders among the assets.
pub const KERNELS: [&str; 3] = ["6.1-cloud", "6.12-cloud", "6.12-generic"];

/// A file of the kernel package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// `vmlinuz`, entered by Linux's 64-bit boot protocol.
    BzImage,
    /// `vmlinux`, entered by PVH.
    Vmlinux,
}

/// What runs on the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Userland {
    /// A busybox initramfs.
    Tiny,
    /// Debian with systemd, from the root image and with Debian's own initrd.
    Debian,
}

/// A guest to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// One of [`KERNELS`].
    pub kernel: &'static str,
    /// Which file of it.
    pub image: Image,
    /// What runs on it.
    pub userland: Userland,
    /// vCPUs.
    pub cpus: u8,
    /// As the command line takes it.
    pub memory: &'static str,
    /// Further arguments of `civic run`.
    pub more: Vec<String>,
}

/// A folder of the environment, set by `cargo xtask test`.
pub fn from_env(name: &str) -> Result<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set: run 'cargo xtask test'"))
}

/// Runs a program to its end, and fails unless it succeeded.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program).args(args).output().with_context(|| format!("cannot run {program}"))?;
    ensure!(out.status.success(), "{program} {args:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A tap with an address, gone when dropped.
pub struct Tap {
    /// The interface.
    pub name: String,
    /// The host's address on it.
    pub host: Ipv4Addr,
    /// The guest's.
    pub guest: Ipv4Addr,
}

impl Tap {
    /// Makes the next free tap of this process and brings it up.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let (name, third) = (format!("civict{n}"), n);
        let tap = Self { name, host: Ipv4Addr::new(10, 77, third, 1), guest: Ipv4Addr::new(10, 77, third, 2) };
        // A run that was killed leaves its taps; without a carrier nobody has them.
        let carrier = fs::read_to_string(format!("/sys/class/net/{}/carrier", tap.name));
        if carrier.is_ok_and(|carrier| carrier.trim() == "0") {
            run("ip", &["link", "del", &tap.name])?;
        }
        run("ip", &["tuntap", "add", "dev", &tap.name, "mode", "tap"])?;
        run("ip", &["addr", "add", &format!("{}/24", tap.host), "dev", &tap.name])?;
        run("ip", &["link", "set", &tap.name, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = run("ip", &["link", "del", &self.name]);
    }
}

/// A console port's stream and all that came over it.
pub struct Console {
    stream: UnixStream,
    /// Everything received.
    pub text: String,
    /// What has been looked through by [`Console::wait`].
    seen: usize,
}

impl Console {
    /// Attaches to `port` of the VM whose API socket this is.
    pub fn attach(socket: &Path, port: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket).context("cannot connect to the API socket")?;
        stream.set_read_timeout(Some(STEP))?;
        let (path, protocol) = (routes::CONSOLE, routes::CONSOLE_PROTOCOL);
        write!(
            stream,
            "GET {path}?port={port} HTTP/1.1\r\nHost: civic\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head);
        ensure!(head.starts_with("HTTP/1.1 101"), "the console was refused: {head}");
        Ok(Self { stream, text: String::new(), seen: 0 })
    }

    /// Types.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("cannot write to the console")
    }

    /// Waits until `needle` comes after what was waited for before; returns what came before it. `limit` is how long it may take on a
    /// host that has nothing else to do: while the guest goes on printing it is given four times as long.
    pub fn wait(&mut self, needle: &str, limit: Duration) -> Result<String> {
        let start = Instant::now();
        let mut deadline = start + limit;
        loop {
            if let Some(at) = self.text[self.seen..].find(needle) {
                let before = self.text[self.seen..self.seen + at].to_owned();
                self.seen += at + needle.len();
                return Ok(before);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "no '{needle}' within {:?}; the console ends with:\n{}",
                start.elapsed(),
                self.tail()
            );
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the console ended without '{needle}':\n{}", self.tail()),
                // Guests print UTF-8 at most in names; a character cut in two is of no interest here.
                Ok(count) => {
                    self.text.push_str(&String::from_utf8_lossy(&buffer[..count]));
                    deadline = (Instant::now() + limit).min(start + 4 * limit);
                }
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e).context("cannot read the console"),
            }
        }
    }

    /// The last of what came.
    pub fn tail(&self) -> String {
        let lines: Vec<_> = self.text.lines().collect();
        lines[lines.len().saturating_sub(120)..].join("\n")
    }
}

/// A running VM; killed and removed when dropped.
pub struct Vm {
    /// Its name.
    pub name: String,
    run_dir: Arc<tempfile::TempDir>,
    /// Its serial console.
    pub console: Console,
    /// Its network. A fork has its source's, and is not on it.
    pub tap: Arc<Tap>,
    userland: Userland,
    /// Counts commands, to tell their output from its echo.
    step: u32,
}

/// The `civic` command with this run directory.
pub fn civic(run_dir: &Path) -> Result<Command> {
    let mut command = Command::new(from_env("CIVIC_BIN_DIR")?.join("civic"));
    command.arg("--run-dir").arg(run_dir).env("CIVIC_LOG", "info,civic_vmm::vcpu=debug");
    // Emulated hosts leave a process standing for that long.
    command.env("CIVIC_PAGER_PATIENCE_MS", "20000");
    Ok(command)
}

fn checked(out: Output, what: &str) -> Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(out.status.success(), "{what}: {}\n{}{}", out.status, text(&out.stdout), text(&out.stderr));
    Ok(text(&out.stdout))
}

impl Vm {
    /// Starts a guest and waits for its shell.
    pub fn start(spec: &Spec) -> Result<Self> {
        let mut vm = Self::launch(spec)?;
        vm.wait_for_shell()?;
        Ok(vm)
    }

    /// Starts a guest; returns while it boots.
    pub fn launch(spec: &Spec) -> Result<Self> {
        emulator::arm()?;
        let tap = Tap::new()?;
        let run_dir = tempfile::tempdir()?;
        let name = "guest".to_owned();
        let assets = from_env("CIVIC_ASSETS")?.join(spec.kernel);
        let mut command = civic(run_dir.path())?;
        command.args(["run", "--name", &name, "--detach", "--memory", spec.memory]);
        command.args(["--cpus", &spec.cpus.to_string(), "--net", &format!("tap={}", tap.name)]);
        let file = match spec.image {
            Image::BzImage => "vmlinuz",
            Image::Vmlinux => "vmlinux",
        };
        command.arg("--kernel").arg(assets.join(file));
        // panic=-1: a guest that panics reboots at once, and the test sees it.
        match spec.userland {
            Userland::Tiny => {
                command.arg("--initrd").arg(assets.join("tiny.initrd"));
                command.args(["--cmdline", &format!("console=ttyS0 panic=-1 civic.ip={}/24", tap.guest)]);
            }
            Userland::Debian => {
                let root = from_env("CIVIC_ROOT_IMAGE")?;
                command.arg("--initrd").arg(assets.join("initrd.img"));
                command.arg("--disk").arg(format!("path={},id=root", root.display()));
                let ip = format!("ip={}::{}:255.255.255.0::eth0:off", tap.guest, tap.host);
                command.args(["--cmdline", &format!("console=ttyS0 panic=-1 root=/dev/vda rw net.ifnames=0 {ip}")]);
            }
        }
        checked(command.args(&spec.more).output()?, "civic run")?;
        let socket = run_dir.path().join(&name).join("api.sock");
        let console = Console::attach(&socket, "serial")?;
        Ok(Self { name, run_dir: Arc::new(run_dir), console, tap: Arc::new(tap), userland: spec.userland, step: 0 })
    }

    /// Waits until the guest has booted and its shell on the console answers.
    pub fn wait_for_shell(&mut self) -> Result<()> {
        match self.userland {
            Userland::Tiny => self.console.wait("CIVIC-TINY-READY", BOOT)?,
            Userland::Debian => self.console.wait("root@civic-guest:", BOOT)?,
        };
        // The kernel must not write into what commands print; bracketed paste would wrap it in escapes.
        self.sh("dmesg -n 1; bind 'set enable-bracketed-paste off' 2>/dev/null; stty -echo cols 4000")?;
        Ok(())
    }

    /// Where the VM's files are.
    pub fn dir(&self) -> PathBuf {
        self.run_dir.path().join(&self.name)
    }

    /// A subcommand of `civic` on this VM, to its end.
    pub fn civic(&self, args: &[&str]) -> Result<String> {
        let what = format!("civic {}", args.join(" "));
        let (verb, rest) = args.split_first().context("no subcommand")?;
        checked(civic(self.run_dir.path())?.arg(verb).arg(&self.name).args(rest).output()?, &what)
    }

    /// A subcommand of `civic device` on this VM.
    pub fn device(&self, verb: &str, rest: &[&str]) -> Result<String> {
        let what = format!("civic device {verb} {}", rest.join(" "));
        checked(civic(self.run_dir.path())?.args(["device", verb, &self.name]).args(rest).output()?, &what)
    }

    /// What the VM tells of itself.
    pub fn info(&self) -> Result<VmInfo> {
        Ok(serde_json::from_str(&self.civic(&["info", "--json"])?)?)
    }

    /// What the VM tells of itself, straight from its socket, and when it did so.
    pub fn look(&self) -> Result<(Instant, VmInfo)> {
        let mut stream = UnixStream::connect(self.dir().join("api.sock"))?;
        stream.set_read_timeout(Some(STEP))?;
        let asked = Instant::now();
        write!(stream, "GET {} HTTP/1.1\r\nHost: civic\r\nConnection: close\r\n\r\n", routes::INFO)?;
        let mut answer = vec![0];
        stream.read_exact(&mut answer)?;
        // It was looked up on the way.
        let when = asked + asked.elapsed() / 2;
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8(answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{answer}");
        Ok((when, serde_json::from_str(body)?))
    }

    /// Runs a shell command in the guest; its output, without the last newline. Fails unless its status is 0.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_within(command, STEP)
    }

    /// [`Vm::sh`] with another limit.
    pub fn sh_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.begin(command)?;
        self.finish(command, limit)
    }

    /// Types a command without waiting for its end; [`Vm::finish`] does.
    pub fn begin(&mut self, command: &str) -> Result<()> {
        self.step += 1;
        let n = self.step;
        // The quotes keep the echo of the command from looking like its output.
        self.console.send(format!("echo B''EGIN{n}.; {{ {command}\n}} 2>&1; echo E''ND{n}:$?:\n").as_bytes())
    }

    /// Waits for the command begun last.
    pub fn finish(&mut self, command: &str, limit: Duration) -> Result<String> {
        let n = self.step;
        // Not the line's end: the kernel may have got its word in before that.
        self.console.wait(&format!("BEGIN{n}."), limit)?;
        let out = self.console.wait(&format!("END{n}:"), limit).with_context(|| format!("in: {command}"))?;
        let status = self.console.wait(":", STEP)?;
        let out = out.replace("\r\n", "\n");
        let out = out.strip_prefix('\n').unwrap_or(&out).trim_end_matches('\n').to_owned();
        ensure!(status == "0", "'{command}' ended with status {status}:\n{out}");
        // A shell that edits lines asks the terminal where its cursor is.
        Ok(out.replace("\u{1b}[6n", ""))
    }

    /// Fails if the guest's kernel complained.
    pub fn check_kernel_log(&mut self) -> Result<()> {
        let found = self.sh(COMPLAINTS)?;
        ensure!(found.is_empty(), "the guest's kernel complains:\n{found}");
        Ok(())
    }

    /// Reboots the guest from inside and waits for its shell.
    pub fn reboot(&mut self) -> Result<()> {
        let before = self.info()?.boots;
        let command = match self.userland {
            Userland::Tiny => "sync; reboot -f\n",
            Userland::Debian => "systemctl reboot\n",
        };
        self.console.send(command.as_bytes())?;
        // The old shell's prompt is still to be read: only what the next kernel prints is of the next boot.
        self.console.wait("Linux version", BOOT)?;
        self.wait_for_shell()?;
        let after = self.info()?.boots;
        ensure!(after == before + 1, "{before} boots, then {after}");
        Ok(())
    }

    /// Saves the guest to a directory, restores it from there in another process, and removes the directory.
    pub fn save_and_restore(&mut self) -> Result<()> {
        let before = self.info()?;
        let saved = tempfile::tempdir_in(self.run_dir.path())?;
        let dir = saved.path().join("vm");
        let path = dir.to_str().context("a path of ours is UTF-8")?;
        self.civic(&["save", path])?;
        ensure!(!self.dir().exists(), "{} is still there", self.dir().display());
        let mut command = civic(self.run_dir.path())?;
        command.args(["run", "--name", &self.name, "--restore", path, "--detach"]);
        checked(command.output()?, "civic run --restore")?;
        self.console = Console::attach(&self.dir().join("api.sock"), "serial")?;
        let after = self.info()?;
        ensure!(after.pid != before.pid, "it is the same process");
        ensure!(after.boots == before.boots, "{} boots before, {} after", before.boots, after.boots);
        ensure!(self.sh("echo here")? == "here", "the shell does not answer");
        Ok(())
    }

    /// Runs a program in the guest from outside, with these options of `civic exec` and this input.
    pub fn exec(&self, options: &[&str], program: &[&str], input: &[u8]) -> Result<Output> {
        let mut command = civic(self.run_dir.path())?;
        command.arg("exec").args(options).arg(&self.name).arg("--").args(program);
        let mut running = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stdin = running.stdin.take().context("its input is a pipe")?;
        let input = input.to_vec();
        // A program need not read it.
        let written = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let out = running.wait_with_output()?;
        let _ = written.join();
        Ok(out)
    }

    /// `civic inspect` of this VM, to be given options and a program.
    pub fn inspecting(&self) -> Result<Command> {
        let mut command = civic(self.run_dir.path())?;
        command.args(["inspect", &self.name]);
        Ok(command)
    }

    /// `civic` with these arguments and this run directory.
    pub fn civic_with(&self, args: &[&str]) -> Result<Output> {
        Ok(civic(self.run_dir.path())?.args(args).output()?)
    }

    /// The `civic` command with this run directory, for a shell.
    pub fn command_line(&self) -> Result<String> {
        let program = from_env("CIVIC_BIN_DIR")?.join("civic");
        Ok(format!("{} --run-dir {}", program.display(), self.run_dir.path().display()))
    }

    /// Copies files from outside, with these options of `civic cp`; the guest's path has a colon before it.
    pub fn cp(&self, options: &[&str], from: &str, to: &str) -> Result<String> {
        let place = |path: &str| if path.starts_with(':') { format!("{}{path}", self.name) } else { path.to_owned() };
        let out = civic(self.run_dir.path())?.arg("cp").args(options).args([place(from), place(to)]).output()?;
        checked(out, &format!("civic cp {from} {to}"))
    }

    /// What is found out about the guest's kernel from outside.
    pub fn guest(&self) -> Result<GuestKernel> {
        Ok(serde_json::from_str(&self.civic(&["info", "--guest", "--json"])?)?)
    }

    /// Forks the guest: the child, whose shell is where this one's is, and what `civic fork` told.
    pub fn fork(&self, name: &str) -> Result<(Self, ForkReport)> {
        self.fork_with(name, &[])
    }

    /// The same with further options.
    pub fn fork_with(&self, name: &str, more: &[&str]) -> Result<(Self, ForkReport)> {
        let (mut child, report) = self.fork_unasked(name, more)?;
        ensure!(child.sh("echo here")? == "here", "the child's shell does not answer");
        Ok((child, report))
    }

    /// The same, whether its shell answers or not.
    pub fn fork_unasked(&self, name: &str, more: &[&str]) -> Result<(Self, ForkReport)> {
        let report = self.civic(&[&["fork", "--name", name, "--json"], more].concat())?;
        let console = Console::attach(&self.run_dir.path().join(name).join("api.sock"), "serial")?;
        let child = Self {
            name: name.into(),
            run_dir: Arc::clone(&self.run_dir),
            console,
            tap: Arc::clone(&self.tap),
            userland: self.userland,
            step: self.step,
        };
        Ok((child, serde_json::from_str(&report)?))
    }

    /// Ends the guest at once and checks that nothing of it is left.
    pub fn kill(self) -> Result<()> {
        let pid = self.info()?.pid;
        self.civic(&["kill"]).with_context(|| threads(pid))?;
        ensure!(!self.dir().exists(), "{} is still there", self.dir().display());
        Ok(())
    }

    /// Stops the guest by its power button and checks that nothing of it is left.
    pub fn stop(self) -> Result<()> {
        let pid = self.info()?.pid;
        self.civic(&["stop", "--timeout", "120"])?;
        ensure!(!self.dir().exists(), "{} is still there", self.dir().display());
        // Gone, or dead and not yet reaped by whoever inherited it.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
        ensure!(matches!(state, None | Some("Z" | "X")), "the monitor {pid} still runs: {stat}");
        Ok(())
    }
}

/// What a process's threads are doing: name, state, and where in the kernel.
fn threads(pid: u32) -> String {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default().trim().replace('\n', " < ");
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().map(|entry| entry.path());
    let doing = tasks.map(|task| {
        let state = read(task.join("stat")).rsplit(')').next().unwrap_or_default().trim().chars().next();
        format!("\n{}: {state:?} {}", read(task.join("comm")), read(task.join("stack")))
    });
    format!("the threads of {pid}:{}", doing.collect::<String>())
}

/// Where a kernel's trouble began, and what it said then: a guest that has reset since has said much more.
fn trouble(console: &str) -> String {
    const SIGNS: [&str; 6] = ["Kernel panic", "BUG:", "Oops", "general protection", "soft lockup", "WARNING:"];
    let lines: Vec<_> = console.lines().collect();
    let first = lines.iter().position(|line| SIGNS.iter().any(|sign| line.contains(sign)));
    first.map_or_else(String::new, |first| {
        let shown = lines.iter().skip(first.saturating_sub(5)).take(80).copied();
        format!("its kernel's first trouble:\n{}", shown.collect::<Vec<_>>().join("\n"))
    })
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.dir().exists() {
            let console = self.console.tail();
            // Its vCPUs say where they are.
            let _ = self.civic(&["pause"]);
            let log = fs::read_to_string(self.dir().join("vmm.log")).unwrap_or_default();
            emulator::look(&log);
            let said = fs::read(self.dir().join("serial.log")).unwrap_or_default();
            let trouble = trouble(&String::from_utf8_lossy(&said));
            eprintln!(
                "the VM that is being killed; its monitor's log:\n{log}\nthe end of its console:\n{console}\n{trouble}"
            );
            let _ = self.civic(&["kill"]);
        }
    }
}

/// Serves `body` to one HTTP client after the other on `address`, until dropped.
pub struct Page {
    address: std::net::SocketAddr,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Page {
    /// Listens on a free port, for clients that reach it by `host`.
    pub fn serve(host: Ipv4Addr, body: Vec<u8>) -> Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let address = (host, listener.local_addr()?.port()).into();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                    head.push(byte[0]);
                }
                let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                let _ = stream.write_all(&body);
            }
        });
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it is served.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener, wherever `host` has gone by now.
        let _ = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.address.port()));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The SHA-256 of bytes, by the system's own tool, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("cannot run sha256sum")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(bytes)?;
    drop(stdin);
    let out = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_whitespace().next().map(str::to_owned).ok_or_else(|| anyhow!("sha256sum says nothing"))
}
