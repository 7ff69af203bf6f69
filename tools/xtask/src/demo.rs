//! `cargo xtask demo`: Debian with systemd and nginx in `civic`, seen from outside: a page over the network, the console,
//! an orderly stop. The half that runs on the KVM host is `xtask demo-host`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::place::{Job, Place};
use crate::setup;
use crate::test::cargo;

const FLAVOUR: &str = "6.12-cloud";
const TAP: &str = "civic-demo";
const HOST: &str = "10.77.0.1/24";
const GUEST: &str = "10.77.0.2";
/// How long the guest may take until nginx answers: the testbed takes most of it.
const BOOT: Duration = Duration::from_secs(300);

/// Runs the demo where guests can run.
pub fn run(testbed: bool) -> Result<bool> {
    setup::all()?;
    let (place, why) = if testbed { (Place::Testbed, "--testbed") } else { Place::for_guests() };
    let at = if place == Place::Here { "on this machine" } else { "in the testbed" };
    println!("== the demo runs {at}: {why}");
    ensure!(cargo(&["build", "--quiet", "--release", "-p", "civic", "-p", "civic-vmm"], &[])?, "cannot build civic");
    let program = std::env::current_exe()?;
    Job { program: &program, args: &["demo-host".to_owned()], root_image: true, timeout: 900 }.run(place)
}

/// The tap device, removed when dropped.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap"])?;
        let tap = Self;
        ip(&["addr", "add", HOST, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", TAP]);
    }
}

fn ip(args: &[&str]) -> Result<()> {
    ensure!(
        Command::new("ip").args(args).status().context("cannot run ip")?.success(),
        "ip {} failed (it needs root)",
        args.join(" ")
    );
    Ok(())
}

fn variable(name: &str) -> Result<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set: run cargo xtask demo"))
}

/// `civic` with its run directory.
struct Civic {
    program: PathBuf,
    run_dir: PathBuf,
}

impl Civic {
    fn command(&self, args: &[&str]) -> Command {
        println!("\n$ civic {}", args.join(" "));
        let mut c = Command::new(&self.program);
        c.args(args).arg("--run-dir").arg(&self.run_dir);
        c
    }

    fn must(&self, args: &[&str]) -> Result<()> {
        ensure!(self.command(args).status()?.success(), "civic {} failed", args[0]);
        Ok(())
    }
}

/// The part on the KVM host.
pub fn host() -> Result<()> {
    let assets = variable("CIVIC_ASSETS")?.join(FLAVOUR);
    let root = variable("CIVIC_ROOT_IMAGE")?;
    let run_dir = std::env::temp_dir().join(format!("civic-demo-{}", std::process::id()));
    std::fs::create_dir_all(&run_dir)?;
    let civic = Civic { program: variable("CIVIC_BIN_DIR")?.join("civic"), run_dir };
    let tap = Tap::new()?;
    let address = format!("ip={GUEST}::10.77.0.1:255.255.255.0::eth0:off");
    let cmdline = format!("root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 {address}");
    let (kernel, initrd) = (assets.join("vmlinuz"), assets.join("initrd.img"));
    let start = Instant::now();
    let disk = format!("path={}", root.display());
    let net = format!("tap={TAP}");
    let args = [
        "run",
        "--name",
        "web",
        "--kernel",
        &kernel.to_string_lossy(),
        "--initrd",
        &initrd.to_string_lossy(),
        "--cmdline",
        &cmdline,
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--disk",
        &disk,
        "--net",
        &net,
        "--detach",
    ];
    civic.must(&args)?;
    let end = see(&civic, start);
    if end.is_err() {
        let _ = civic.command(&["kill", "web"]).status();
    }
    drop(tap);
    let _ = std::fs::remove_dir_all(&civic.run_dir);
    end
}

fn see(civic: &Civic, start: Instant) -> Result<()> {
    civic.must(&["list"])?;
    println!("\nwaiting for nginx …");
    let page = loop {
        match fetch() {
            Ok(page) => break page,
            Err(e) => ensure!(start.elapsed() < BOOT, "no page within {} s: {e:#}", BOOT.as_secs()),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    println!("\n$ curl http://{GUEST}/        ({:.1} s after the start)\n{page}", start.elapsed().as_secs_f32());
    ensure!(page.contains("nginx"), "that is not nginx's page");
    civic.must(&["info", "web"])?;
    println!("{}", console(civic)?);
    civic.must(&["stop", "web"])?;
    civic.must(&["list"])
}

fn fetch() -> Result<String> {
    let address = format!("{GUEST}:80").parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {GUEST}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim().to_owned())
}

/// Types a command on the console and returns what is seen there.
fn console(civic: &Civic) -> Result<String> {
    let mut c = civic.command(&["console", "web"]);
    let mut child = c.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        unreachable!("both are pipes")
    };
    let (seen, text) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stdout.read(&mut buffer) {
            if seen.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    let shown = read_until(
        &mut child,
        &text,
        || stdin.write_all(b"\nuname -sr; systemctl is-system-running; echo d''one\n"),
        "done",
    );
    let _ = child.kill();
    let _ = child.wait();
    shown
}

fn read_until(
    child: &mut Child,
    text: &std::sync::mpsc::Receiver<Vec<u8>>,
    mut ask: impl FnMut() -> std::io::Result<()>,
    end: &str,
) -> Result<String> {
    let mut shown = String::new();
    let patience = Instant::now() + Duration::from_secs(120);
    // The login shell may not be there yet: ask until it answers.
    while Instant::now() < patience && child.try_wait()?.is_none() {
        ask()?;
        let pause = Instant::now() + Duration::from_secs(10);
        while let Ok(bytes) = text.recv_timeout(pause.saturating_duration_since(Instant::now())) {
            shown += &String::from_utf8_lossy(&bytes);
            if shown.contains(end) {
                return Ok(shown);
            }
        }
    }
    anyhow::bail!("the console does not answer; it showed:\n{shown}")
}
