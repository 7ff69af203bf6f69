//! Stock kernels, booted and put to use: every kernel as bzImage and as vmlinux, with the tiny guest and with Debian, on 1, 2 and
//! 4 vCPUs.
//!
//! Run by `cargo xtask test`, on hardware KVM or in the testbed. The whole matrix of Debian guests takes long on an emulated host:
//! by default each kernel runs Debian once, with the images and vCPU counts spread over them; `--ignored` adds the rest.

#[path = "guests/examples.rs"]
mod examples;
#[path = "guests/forked.rs"]
mod forked;
#[path = "guests/injected.rs"]
mod injected;
#[path = "guests/inspected.rs"]
mod inspected;
#[path = "guests/limits.rs"]
mod limits;
#[path = "guests/loaded.rs"]
mod loaded;
#[path = "guests/mirrored.rs"]
mod mirrored;
#[path = "guests/plugged.rs"]
mod plugged;
#[path = "guests/stored.rs"]
mod stored;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_api::{VmInfo, VmState};
use civic_tests::linux::{
    BOOT, Console, Image, KERNELS, Page, STEP, Spec, Userland, Vm, civic, emulator, from_env, run, sha256,
};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (k, kernel) in KERNELS.into_iter().enumerate() {
        for (i, image) in [Image::BzImage, Image::Vmlinux].into_iter().enumerate() {
            for (c, cpus) in [1, 2, 4].into_iter().enumerate() {
                let name = |userland: &str| {
                    let image = if image == Image::BzImage { "bzimage" } else { "vmlinux" };
                    format!("{userland}::{kernel}::{image}::{cpus}cpu")
                };
                let spec = |userland, memory| Spec { kernel, image, userland, cpus, memory, more: Vec::new() };
                let tiny = spec(Userland::Tiny, "384M");
                trials.push(trial(name("tiny"), move || tiny_life(tiny.clone())));
                let debian = spec(Userland::Debian, "1G");
                let spread = i == k % 2 && c == (k + 1) % 3;
                trials.push(trial(name("debian"), move || debian_life(&debian)).with_ignored_flag(!spread));
            }
        }
    }
    for (name, image) in [("bzimage", Image::BzImage), ("vmlinux", Image::Vmlinux)] {
        trials.push(trial(format!("reboots::{name}"), move || reboots(image)).with_ignored_flag(true));
    }
    for (i, (kernel, image, cpus)) in [
        ("6.1-cloud", Image::BzImage, 1),
        ("6.12-cloud", Image::Vmlinux, 4),
        ("6.12-generic", Image::BzImage, 4),
        ("6.1-cloud", Image::Vmlinux, 4),
        ("6.12-cloud", Image::BzImage, 1),
        ("6.12-generic", Image::Vmlinux, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let spec = |userland, memory| Spec { kernel, image, userland, cpus, memory, more: Vec::new() };
        let name = |userland: &str| format!("saved::{userland}::{kernel}::{cpus}cpu");
        let (tiny, debian) = (spec(Userland::Tiny, "256M"), spec(Userland::Debian, "1G"));
        // By default with both kinds of image and both vCPU counts; Debian once.
        trials.push(trial(name("tiny"), move || saved_tiny(tiny.clone(), 4)).with_ignored_flag(i >= 2));
        trials.push(trial(name("debian"), move || saved_debian(&debian, 3)).with_ignored_flag(i != 1));
    }
    for (kernel, image, cpus) in
        [("6.12-cloud", Image::BzImage, 4), ("6.1-cloud", Image::Vmlinux, 1), ("6.12-generic", Image::Vmlinux, 2)]
    {
        let spec = |userland, memory| Spec { kernel, image, userland, cpus, memory, more: Vec::new() };
        let name = |userland: &str| format!("forked::{userland}::{kernel}::{cpus}cpu");
        let (tiny, debian) = (spec(Userland::Tiny, "256M"), spec(Userland::Debian, "1G"));
        let tried = kernel == "6.12-cloud";
        trials.push(trial(name("tiny"), move || forked::tiny(tiny.clone(), 4)).with_ignored_flag(!tried));
        trials.push(trial(name("debian"), move || forked::debian(&debian, 3)).with_ignored_flag(true));
    }
    let often = || forked::often(Spec { image: Image::BzImage, ..tiny("256M", 4, &[]) }, 60);
    trials.push(trial("forked::often".into(), often).with_ignored_flag(true));
    let net = || mirrored::tiny(&Spec { image: Image::BzImage, ..tiny("256M", 2, &[]) });
    trials.push(trial("forked::source_net".into(), net));
    trials.push(trial("forked::limits".into(), || forked::limits(tiny("256M", 2, &[]))));
    // The longer one is the promise's own.
    for (name, phases) in [("short", [(10, 21), (1, 20)]), ("minutes", [(10, 300), (1, 300)])] {
        let spec = Spec { userland: Userland::Debian, image: Image::BzImage, ..tiny("1G", 2, &[]) };
        let name = format!("forked::under_load::{name}");
        trials.push(trial(name, move || loaded::debian(&spec, &phases)).with_ignored_flag(true));
    }
    for kernel in KERNELS {
        for cpus in [1, 4] {
            let spec =
                |userland, memory| Spec { kernel, image: Image::BzImage, userland, cpus, memory, more: Vec::new() };
            let name = |kind: &str| format!("plugged::{kind}::{kernel}::{cpus}cpu");
            let (tiny, debian, often) =
                (spec(Userland::Tiny, "256M"), spec(Userland::Debian, "1G"), spec(Userland::Tiny, "256M"));
            let tried = (kernel == "6.1-cloud" && cpus == 1) || (kernel == "6.12-cloud" && cpus == 4);
            trials.push(trial(name("tiny"), move || plugged::tiny(tiny.clone(), 3)).with_ignored_flag(!tried));
            trials.push(trial(name("debian"), move || plugged::debian(&debian, 3)).with_ignored_flag(true));
            trials.push(trial(name("often"), move || plugged::tiny(often.clone(), 200)).with_ignored_flag(true));
        }
    }
    let forks = std::env::var("CIVIC_FORKS").ok().and_then(|n| n.parse().ok()).unwrap_or(50);
    for kernel in KERNELS.into_iter().chain(other_kernels()) {
        for cpus in [1, 4] {
            let spec = Spec { image: Image::BzImage, kernel, ..tiny("256M", cpus, &[]) };
            let name = |kind: &str| format!("injected::{kind}::{kernel}::{cpus}cpu");
            let often = spec.clone();
            let tried = (kernel == "6.1-cloud" && cpus == 4) || (kernel == "6.12-cloud" && cpus == 1);
            trials.push(trial(name("tiny"), move || injected::tiny(&spec, 2)).with_ignored_flag(!tried));
            trials.push(trial(name("often"), move || injected::often(&often, forks)).with_ignored_flag(true));
        }
    }
    trials.push(trial("injected::wedged".into(), || injected::wedged(&tiny("256M", 2, &[]))));
    trials.push(trial("injected::traced".into(), || injected::traced(&tiny("256M", 2, &[]))));
    trials.push(trial("injected::allowed".into(), || injected::allowed(&tiny("256M", 2, &["--allow-programs"]))));
    trials.push(trial("injected::locked_down".into(), || injected::locked_down(&tiny("256M", 2, &[]))));
    trials.push(trial("injected::equipped".into(), || injected::equipped(&tiny("256M", 2, &[]))));
    trials.push(trial("injected::broken".into(), || injected::broken(&tiny("256M", 2, &[]))));
    let starved = || injected::starved(&Spec { kernel: "6.1-cloud", ..tiny("256M", 2, &[]) });
    trials.push(trial("injected::starved".into(), starved));
    trials.push(trial("inspected::tiny".into(), || inspected::tiny(&tiny("256M", 2, &[]))));
    let debian = Spec { userland: Userland::Debian, image: Image::BzImage, ..tiny("1G", 2, &[]) };
    trials.push(trial("inspected::stored".into(), move || stored::debian(&debian)));
    let often = || inspected::often(&tiny("256M", 2, &[]), 500);
    trials.push(trial("inspected::often".into(), often).with_ignored_flag(true));
    // They measure, and take too long beside everything else where the testbed's host is busy.
    trials.push(trial("examples::all".into(), examples::all).with_ignored_flag(true));
    for (name, example) in examples::ALL {
        trials.push(trial(format!("examples::{name}"), move || examples::one(example)).with_ignored_flag(true));
    }
    let hundred = || saved_tiny(Spec { image: Image::BzImage, ..tiny("256M", 4, &[]) }, 100);
    trials.push(trial("saved::a_hundred_times::tiny".into(), hundred).with_ignored_flag(true));
    for kernel in KERNELS {
        for (image, cpus) in [(Image::BzImage, 1), (Image::Vmlinux, 4)] {
            let spec = Spec { kernel, image, userland: Userland::Debian, cpus, memory: "512M", more: Vec::new() };
            let name = format!("saved::a_hundred_times::debian::{kernel}::{cpus}cpu");
            trials.push(trial(name, move || saved_debian(&spec, 100)).with_ignored_flag(true));
        }
    }
    for kernel in ["6.1-cloud", "6.12-cloud"] {
        trials.push(trial(format!("balloon::{kernel}"), move || balloon(kernel)));
    }
    trials.push(trial("limits::rates".into(), limits::rates));
    trials.push(trial("limits::frame_rates".into(), limits::frame_rates));
    trials.push(trial("limits::lost_storage".into(), limits::lost_storage));
    trials.push(trial("limits::failing_storage".into(), limits::failing_storage));
    trials.push(trial("identity".into(), identity));
    trials.push(trial("paused_for_long".into(), paused_for_long));
    trials.push(trial("memory_above_the_hole".into(), || big_memory("5G", 5)));
    trials.push(trial("memory_of_64_gib".into(), || big_memory("64G", 64)).with_ignored_flag(true));
    trials.push(trial("without_initrd".into(), without_initrd));
    trials.push(trial("sixteen_vcpus".into(), sixteen_vcpus).with_ignored_flag(true));
    libtest_mimic::run(&arguments, trials).exit();
}

/// Kernels that programs are started in besides: of the other folders of `CIVIC_ASSETS`, which `cargo xtask kernels` makes.
fn other_kernels() -> Vec<&'static str> {
    let Ok(assets) = from_env("CIVIC_ASSETS") else { return Vec::new() };
    let folders = std::fs::read_dir(assets).into_iter().flatten().flatten();
    let names = folders.filter(|folder| folder.path().join("tiny.initrd").exists());
    let names = names.filter_map(|folder| folder.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| !KERNELS.contains(&name.as_str())).collect();
    names.sort();
    // As long as the tests run.
    names.into_iter().map(|name| &*name.leak()).collect()
}

/// How often a test is tried where the emulated host has provably failed.
const TRIES: u32 = 3;

fn trial(name: String, test: impl Fn() -> Result<()> + Send + 'static) -> Trial {
    let called = name.clone();
    Trial::test(name, move || {
        for attempt in 1.. {
            let start = Instant::now();
            let result = test();
            eprintln!("{called} took {:.1} s", start.elapsed().as_secs_f64());
            let emulator = emulator::seen();
            match result {
                Err(e) if emulator && attempt < TRIES => {
                    eprintln!(
                        "{called}: QEMU put the host's registers into the guest, which then failed ({e:#}): AGAIN"
                    );
                }
                // Told at once as well: the list of failures comes only when all have ended.
                Err(e) => {
                    eprintln!("{called} failed: {e:#}");
                    return Err(Failed::from(format!("{e:#}")));
                }
                Ok(()) => break,
            }
        }
        Ok(())
    })
}

const SCRATCH_BYTES: u64 = 64 << 20;

fn tiny_life(mut spec: Spec) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let scratch = dir.path().join("scratch.img");
    File::create(&scratch)?.set_len(SCRATCH_BYTES)?;
    spec.more = vec!["--disk".into(), format!("path={},id=scratch", scratch.display())];
    let mut vm = Vm::start(&spec)?;

    check_processors(&mut vm, &spec)?;
    check_entropy(&mut vm)?;
    check_serial_input(&mut vm)?;
    check_virtio_console(&mut vm)?;

    // Disk: what the guest wrote is in the image and there after a reboot.
    ensure!(vm.sh("cat /sys/block/vda/serial")? == "scratch", "the disk's serial id");
    vm.sh("dd if=/dev/urandom of=/tmp/data bs=64k count=64; dd if=/tmp/data of=/dev/vda bs=64k seek=16 conv=fsync")?;
    let written = vm.sh("sha256sum < /tmp/data")?;
    let mut on_host = vec![0; 4 << 20];
    File::open(&scratch)?.read_exact_at(&mut on_host, 1 << 20)?;
    ensure!(written.starts_with(&sha256(&on_host)?), "the image does not hold what the guest wrote");
    let text = kernel_text(&mut vm)?;

    let told = vm.info()?.devices.into_iter().find_map(|mut device| device.settings.remove("mac"));
    ensure!(
        told == Some(vm.sh("cat /sys/class/net/eth0/address")?),
        "the card's address is not the one told: {told:?}"
    );
    let tap = (vm.tap.host, vm.tap.guest);
    vm.sh("httpd -h /www")?;
    let page = run("curl", &["-sS", "--max-time", "60", &format!("http://{}/", tap.1)])?;
    ensure!(page == "hello from the tiny guest\n", "curl got {page:?}");
    let body = vec![b'x'; 1 << 20];
    let served = Page::serve(tap.0, body.clone())?;
    let fetched = vm.sh(&format!("wget -q -O - {} | sha256sum", served.url()))?;
    ensure!(fetched.starts_with(&sha256(&body)?), "wget in the guest got something else");
    check_iperf(&mut vm)?;
    check_pause(&mut vm, "dd if=/tmp/data of=/dev/vda bs=64k seek=200 conv=fsync")?;
    vm.check_kernel_log()?;

    vm.reboot()?;
    let kept = vm.sh("dd if=/dev/vda bs=64k skip=16 count=64 2>/dev/null | sha256sum")?;
    ensure!(kept == written, "after the reboot the disk holds something else");
    ensure!(vm.sh("ls /tmp")?.is_empty(), "memory survived the reboot");
    if spec.image == Image::BzImage {
        let again = kernel_text(&mut vm)?;
        ensure!(text != again || text != "ffffffff81000000", "KASLR is off: the kernel is at {text} twice");
    }
    vm.check_kernel_log()?;
    vm.stop()
}

/// There is one root image, and a writable image has one user.
static ROOT_IMAGE: Mutex<()> = Mutex::new(());

fn debian_life(spec: &Spec) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let mut vm = Vm::start(spec)?;
    check_processors(&mut vm, spec)?;
    check_entropy(&mut vm)?;
    check_login_on_virtio_console(&mut vm)?;
    let state = vm.sh("systemctl is-system-running --wait || systemctl --failed --no-legend --plain")?;
    ensure!(state == "running", "systemd says:\n{state}");

    let guest = vm.tap.guest;
    let page = run("curl", &["-sS", "--max-time", "60", &format!("http://{guest}/")])?;
    ensure!(page.contains("nginx in a Civic guest"), "nginx served {page:?}");
    let body = vec![b'y'; 1 << 20];
    let served = Page::serve(vm.tap.host, body.clone())?;
    let fetched = vm.sh(&format!("curl -sS --max-time 100 {} | sha256sum", served.url()))?;
    ensure!(fetched.starts_with(&sha256(&body)?), "curl in the guest got something else");
    check_iperf(&mut vm)?;

    vm.sh("dd if=/dev/urandom of=/root/data bs=64k count=64 conv=fsync status=none; sha256sum /root/data > /root/sum; sync")?;
    check_pause(&mut vm, "dd if=/dev/urandom of=/root/load bs=64k count=64 conv=fsync status=none")?;
    vm.check_kernel_log()?;
    vm.reboot()?;
    vm.sh("sha256sum -c /root/sum")?;
    vm.check_kernel_log()?;
    vm.stop()
}

/// What runs in a guest while it is saved and restored: a clock that is watched, and a disk that is written and read back.
const CLOCK: &str = "last=0; while :; do read now rest < /proc/uptime; now=${now%.*}${now#*.}; \
    [ $now -lt $last ] && echo back from $last to $now >> /tmp/clock.bad; last=$now; echo $last > /tmp/clock.now; done";

/// Speaks to an echo server of the guest's on one connection until it is told to stop; then says how many lines came back, each once
/// and in order.
struct Echo {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<Result<u32>>,
}

impl Echo {
    fn start(address: (std::net::Ipv4Addr, u16)) -> Result<Self> {
        use std::io::{BufRead, BufReader, Write};
        use std::sync::atomic::Ordering;
        let deadline = Instant::now() + STEP;
        let stream = loop {
            // The server needs a moment until it listens.
            match std::net::TcpStream::connect_timeout(&address.into(), STEP) {
                Ok(stream) => break stream,
                Err(e) => ensure!(Instant::now() < deadline, "cannot connect to the guest's echo server: {e}"),
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(4 * STEP))?;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let speak = move || {
            let mut back = BufReader::new(stream.try_clone()?).lines();
            let mut out = stream;
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return Ok(number);
                }
                writeln!(out, "line {number}").context("the connection broke while sending")?;
                let line = back.next().context("the guest ended the connection")?.context("the connection broke")?;
                ensure!(line == format!("line {number}"), "'{line}' came back for line {number}");
            }
            Ok(0)
        };
        Ok(Self { stop, thread: std::thread::spawn(speak) })
    }

    fn finish(self) -> Result<u32> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the echo's thread panicked"))?
    }
}

/// Gives the tiny guest the jobs that [`COUNTS`] counts, its clock and its disk, and an echo at port 7000.
fn work_tiny(vm: &mut Vm) -> Result<()> {
    vm.sh("dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null; nc -ll -p 7000 -e /bin/cat & true")?;
    vm.sh(&format!("({CLOCK}) & true"))?;
    // Every megabyte of the disk in turn: written, flushed, read back past the cache, compared.
    vm.sh(
        "(n=0; while :; do dd if=/tmp/data of=/dev/vda bs=64k seek=$((n % 60 * 16)) conv=fsync 2>/dev/null || echo write $n >> /tmp/disk.bad; \
         echo 3 > /proc/sys/vm/drop_caches; \
         dd if=/dev/vda bs=64k skip=$((n % 60 * 16)) count=16 2>/dev/null | cmp -s - /tmp/data || echo read $n >> /tmp/disk.bad; \
         n=$((n + 1)); echo $n > /tmp/disk.now; done) & true",
    )?;
    Ok(())
}

/// Saves and restores a guest again and again while it writes its disk, watches its clock and holds a TCP connection.
fn saved_tiny(mut spec: Spec, rounds: u32) -> Result<()> {
    let dir = tempfile::tempdir()?;
    spec.more = vec!["--disk".into(), forked::scratch(dir.path())?];
    let mut vm = Vm::start(&spec)?;
    work_tiny(&mut vm)?;
    let echo = Echo::start((vm.tap.guest, 7000))?;
    for round in 0..rounds {
        save_round(&mut vm).with_context(|| format!("round {round}"))?;
        count_rounds(round, rounds);
    }
    let lines = echo.finish()?;
    ensure!(lines > rounds, "only {lines} lines went through the connection in {rounds} rounds");
    check_saved(&mut vm, &spec)?;
    vm.stop()
}

/// How far the guest's jobs are.
const COUNTS: &str = "cat /tmp/disk.now /tmp/clock.now 2>/dev/null || true";

/// One round; the guest's jobs make progress before and after.
fn save_round(vm: &mut Vm) -> Result<()> {
    let before = vm.sh(COUNTS)?;
    vm.save_and_restore()?;
    progress(vm, &before)
}

/// Waits until the guest's jobs are further than `before`.
fn progress(vm: &mut Vm, before: &str) -> Result<()> {
    let deadline = Instant::now() + STEP;
    loop {
        let after = vm.sh(COUNTS)?;
        let moved = before.lines().zip(after.lines()).all(|(before, after)| before != after);
        if moved && after.lines().count() == 2 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "a job in the guest stands still: {before:?}, then {after:?}");
    }
}

fn check_saved(vm: &mut Vm, spec: &Spec) -> Result<()> {
    let bad = vm.sh("cat /tmp/clock.bad /tmp/disk.bad 2>/dev/null || true")?;
    ensure!(bad.is_empty(), "in the guest went wrong:\n{bad}");
    vm.check_kernel_log()?;
    if spec.kernel.starts_with("6.12") {
        let told = vm.sh("dmesg | grep -c 'crng reseeded due to virtual machine fork' || true")?;
        ensure!(told != "0", "the guest was not told of its new generation");
    }
    Ok(())
}

/// Gives Debian, once it has booted, the jobs that [`COUNTS`] counts: its clock, and a file that is copied and compared.
fn work(vm: &mut Vm) -> Result<()> {
    vm.sh("systemctl is-system-running --wait || systemctl --failed --no-legend --plain")?;
    vm.sh(&format!("({CLOCK}) & true"))?;
    vm.sh("dd if=/dev/urandom of=/root/data bs=64k count=32 status=none")?;
    vm.sh(
        "(n=0; while :; do cp /root/data /root/copy; sync /root/copy; echo 3 > /proc/sys/vm/drop_caches; \
         cmp -s /root/data /root/copy || echo copy $n >> /tmp/disk.bad; n=$((n + 1)); echo $n > /tmp/disk.now; done) & true",
    )?;
    Ok(())
}

/// [`saved_tiny`] with systemd, a file system on the disk, nginx keeping a connection, and vsock connections, which are reset.
fn saved_debian(spec: &Spec, rounds: u32) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir()?;
    let uds = dir.path().join("vsock");
    let vsock = ["--vsock".to_owned(), format!("uds={}", uds.display())];
    let mut vm = Vm::start(&Spec { more: [&spec.more[..], &vsock].concat(), ..spec.clone() })?;
    work(&mut vm)?;
    let mut nginx = KeptConnection::open(vm.tap.guest)?;
    nginx.get()?;
    let server = UnixListener::bind(format!("{}_{VSOCK_PORT}", uds.display()))?;
    for round in 0..rounds {
        let connection = Vsock::open(&mut vm, &server)?;
        save_round(&mut vm).with_context(|| format!("round {round}"))?;
        connection.check_reset(&mut vm).with_context(|| format!("vsock after round {round}"))?;
        nginx.get().with_context(|| format!("nginx after round {round}"))?;
        count_rounds(round, rounds);
    }
    check_saved(&mut vm, spec)?;
    vm.stop()
}

/// Says now and then how far a long test is: how much of it held, should it be cut off.
fn count_rounds(round: u32, of: u32) {
    if (round + 1).is_multiple_of(10) {
        eprintln!("{} of {of} rounds", round + 1);
    }
}

const VSOCK_PORT: u32 = 5000;

/// In the guest: connects to the host's port 5000, is greeted, waits for more, and says what it got instead.
const VSOCK_CLIENT: &str = r#"socket(my $s, 40, 1, 0) or die "socket: $!"; connect($s, pack("S S L L x4", 40, 0, 5000, 2)) or die "connect: $!"; \
    sysread($s, my $hello, 5); print "$hello\n"; my $got = sysread($s, my $more, 5); print defined $got ? "$got bytes\n" : "$!\n";"#;

/// A connection of the guest's to a program on the host.
struct Vsock(UnixStream);

impl Vsock {
    fn open(vm: &mut Vm, server: &UnixListener) -> Result<Self> {
        use std::io::Write;
        vm.sh(&format!("modprobe vmw_vsock_virtio_transport; rm -f /tmp/vsock; (perl -e '$| = 1; {VSOCK_CLIENT}' > /tmp/vsock 2>&1) & true"))?;
        let (mut stream, _) = server.accept()?;
        stream.write_all(b"hello")?;
        Self::wait(vm, 1, "hello")?;
        stream.set_read_timeout(Some(STEP))?;
        Ok(Self(stream))
    }

    /// Waits for a line of the guest's.
    fn wait(vm: &mut Vm, line: usize, wanted: &str) -> Result<()> {
        let said = vm.sh(&format!(
            "timeout 120 sh -c 'until [ $(wc -l < /tmp/vsock) -ge {line} ]; do sleep 0.1; done'; cat /tmp/vsock"
        ))?;
        ensure!(said.lines().nth(line - 1) == Some(wanted), "the guest's program said:\n{said}");
        Ok(())
    }

    /// Both ends were told that the connection is no more.
    fn check_reset(mut self, vm: &mut Vm) -> Result<()> {
        use std::io::Read;
        Self::wait(vm, 2, "Connection reset by peer")?;
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => Err(e).context("the host's end"),
            _ => Ok(()),
        }
    }
}

/// One HTTP/1.1 connection to the guest's nginx.
struct KeptConnection(std::io::BufReader<std::net::TcpStream>);

impl KeptConnection {
    fn open(guest: std::net::Ipv4Addr) -> Result<Self> {
        let stream = std::net::TcpStream::connect_timeout(&(guest, 80).into(), STEP)?;
        stream.set_read_timeout(Some(STEP))?;
        Ok(Self(std::io::BufReader::new(stream)))
    }

    /// Fetches the front page on this connection.
    fn get(&mut self) -> Result<()> {
        use std::io::{BufRead, Read, Write};
        self.0.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n")?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "the connection has ended");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        ensure!(String::from_utf8_lossy(&body).contains("nginx in a Civic guest"), "nginx served something else");
        Ok(())
    }
}

fn check_processors(vm: &mut Vm, spec: &Spec) -> Result<()> {
    let online = vm.sh("nproc")?;
    ensure!(online == spec.cpus.to_string(), "{online} processors online");
    let clock = vm.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    ensure!(clock == "kvm-clock" || clock == "tsc", "the clock source is {clock}");
    let early = Clocks::read(vm)?;
    // Until the guest has a clock source it counts timer interrupts, and loses some on an emulated host: 13 s were seen.
    ensure!(
        early.before.abs_diff(early.guest) <= 120,
        "the guest's clock says {}, the host's {}",
        early.guest,
        early.before
    );
    vm.sh("sleep 5")?;
    let late = Clocks::read(vm)?;
    let gone = late.guest.saturating_sub(early.guest);
    // Read in whole seconds, somewhere between before and after.
    let (least, most) = (late.before - early.after, late.after - early.before);
    ensure!(
        (least.saturating_sub(1)..=most + 1).contains(&gone),
        "{gone} s went by in the guest, {least} to {most} outside"
    );
    Ok(())
}

/// The guest's clock, and the host's before and after it was read, in seconds since 1970.
struct Clocks {
    before: u64,
    guest: u64,
    after: u64,
}

impl Clocks {
    fn read(vm: &mut Vm) -> Result<Self> {
        let now = || anyhow::Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs());
        let before = now()?;
        let guest = vm.sh("date +%s")?.trim().parse().context("date")?;
        Ok(Self { before, guest, after: now()? })
    }
}

fn check_entropy(vm: &mut Vm) -> Result<()> {
    let source = vm.sh("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(source.starts_with("virtio_rng"), "hw_random is {source}");
    let mut read = || vm.sh("head -c 64 /dev/hwrng | sha256sum");
    let (first, second) = (read()?, read()?);
    ensure!(first != second, "the same 64 bytes twice");
    ensure!(first != format!("{}  -", sha256(&[0; 64])?), "64 zero bytes");
    Ok(())
}

/// 8 KiB typed at once arrive whole, though the UART's FIFO holds 16 bytes.
fn check_serial_input(vm: &mut Vm) -> Result<()> {
    let typed: Vec<u8> = (0..8192u32).map(|i| b' ' + (i.wrapping_mul(2_654_435_761) >> 24) as u8 % 94).collect();
    let command = "stty raw; echo READY''NOW; head -c 8192 | sha256sum; stty sane -echo";
    vm.begin(command)?;
    vm.console.wait("READYNOW", STEP)?;
    vm.console.send(&typed)?;
    // BEGIN went by before READYNOW.
    let out = vm.console.wait("END", STEP)?;
    ensure!(out.contains(&sha256(&typed)?), "the guest received something else: {out}");
    vm.console.wait(":0:", STEP)?;
    Ok(())
}

/// Both ways on hvc0, held open so that the driver throws nothing away.
fn check_virtio_console(vm: &mut Vm) -> Result<()> {
    let mut hvc = Console::attach(&vm.dir().join("api.sock"), "hvc0")?;
    let command = "exec 3<>/dev/hvc0; stty raw -echo <&3; echo hello-host >&3; head -n 1 <&3; exec 3>&-";
    vm.begin(command)?;
    hvc.wait("hello-host", STEP)?;
    hvc.send(b"hello-guest\n")?;
    let got = vm.finish(command, STEP)?;
    ensure!(got == "hello-guest", "hvc0 gave {got:?}");
    Ok(())
}

/// A login on hvc0. Debian starts one by itself only where the kernel has the driver built in.
fn check_login_on_virtio_console(vm: &mut Vm) -> Result<()> {
    vm.sh("systemctl start serial-getty@hvc0.service")?;
    let mut hvc = Console::attach(&vm.dir().join("api.sock"), "hvc0")?;
    hvc.wait("civic-guest login:", STEP)?;
    hvc.send(b"root\n")?;
    hvc.wait("Password:", STEP).map(drop)
}

fn kernel_text(vm: &mut Vm) -> Result<String> {
    vm.sh("grep -m 1 ' _text$' /proc/kallsyms | cut -d ' ' -f 1")
}

fn check_iperf(vm: &mut Vm) -> Result<()> {
    let guest = vm.tap.guest.to_string();
    vm.sh("iperf3 -s -D -I /tmp/iperf.pid")?;
    for reverse in [false, true] {
        let mut args = vec!["-c", &guest, "-t", "2", "-J", "--connect-timeout", "20000"];
        if reverse {
            args.push("-R");
        }
        // The server daemonizes before it listens, and a busy one turns clients away.
        let deadline = Instant::now() + STEP;
        while let Err(e) = iperf(&args) {
            ensure!(Instant::now() < deadline, "iperf3 (reverse: {reverse}): {e:#}");
        }
    }
    vm.sh("kill $(cat /tmp/iperf.pid)").map(drop)
}

/// One run; fails if it moved far less than even a busy emulated host does in two seconds. What is moved is compared elsewhere.
fn iperf(args: &[&str]) -> Result<()> {
    let report: serde_json::Value = serde_json::from_str(&run("iperf3", args)?)?;
    let received = report["end"]["sum_received"]["bytes"].as_u64().context("it reports no bytes")?;
    ensure!(received >= 256 << 10, "it moved only {received} bytes");
    Ok(())
}

/// Pauses and resumes under disk and network load; nothing moves while paused, and the load ends well.
fn check_pause(vm: &mut Vm, load: &str) -> Result<()> {
    let guest = vm.tap.guest.to_string();
    let mut ping =
        Command::new("ping").args(["-i", "0.05", "-q", &guest]).stdout(std::process::Stdio::null()).spawn()?;
    let command = format!("(for i in 1 2 3 4 5 6; do {load} || exit 1; done) 2>&1 && echo load-ended-well");
    vm.begin(&command)?;
    for _ in 0..5 {
        vm.civic(&["pause"])?;
        let before = vm.info()?;
        ensure!(before.state == VmState::Paused, "{:?} after pause", before.state);
        // Long enough for a device thread or a vCPU that was forgotten to show itself.
        let silent = run("ping", &["-c", "1", "-W", "1", &guest]);
        ensure!(silent.is_err(), "a paused guest answers");
        let after = vm.info()?;
        ensure!(after.devices == before.devices && after.vcpus == before.vcpus, "counters move while paused");
        ensure!(after.run_ms == before.run_ms, "run time grows while paused");
        vm.civic(&["resume"])?;
        ensure!(vm.info()?.state == VmState::Running, "not running after resume");
    }
    let out = vm.finish(&command, STEP)?;
    ping.kill()?;
    ping.wait()?;
    ensure!(out.ends_with("load-ended-well"), "the load failed:\n{out}");
    run("ping", &["-c", "1", "-W", "20", &guest]).map(drop)
}

/// A guest that stood still for longer than its watchdogs wait does not take that for a fault of its own.
fn paused_for_long() -> Result<()> {
    let mut vm = Vm::start(&tiny("256M", 2, &[]))?;
    let patience: u64 = vm.sh("cat /proc/sys/kernel/watchdog_thresh")?.parse()?;
    vm.civic(&["pause"])?;
    // Linux complains after twice as long (kernel/watchdog.c).
    std::thread::sleep(Duration::from_secs(2 * patience + 5));
    vm.civic(&["resume"])?;
    // Its watchdogs look this often.
    vm.sh(&format!("sleep {patience}"))?;
    vm.check_kernel_log()?;
    vm.stop()
}

fn tiny(memory: &'static str, cpus: u8, more: &[&str]) -> Spec {
    Spec {
        kernel: "6.12-cloud",
        image: Image::BzImage,
        userland: Userland::Tiny,
        cpus,
        memory,
        more: more.iter().map(|s| (*s).to_owned()).collect(),
    }
}

/// RAM on both sides of the hole below 4 GiB is there and usable.
fn big_memory(memory: &'static str, gib: u64) -> Result<()> {
    let mut vm = Vm::start(&tiny(memory, 1, &["--overcommit"]))?;
    let total: u64 = vm.sh("awk '/^MemTotal/ {print $2}' /proc/meminfo")?.parse()?;
    ensure!(total >= gib * 1024 * 1024 / 100 * 93, "the guest sees {total} KiB");
    // Fills a file in RAM that does not fit below the hole.
    if gib < 8 {
        vm.sh_within(
            "mount -t tmpfs -o size=90% big /mnt && dd if=/dev/zero of=/mnt/f bs=1M count=3500",
            Duration::from_secs(400),
        )?;
    }
    vm.check_kernel_log()?;
    vm.stop()
}

/// What the balloon is to hold goes back to the host, what the guest frees too, and nothing that it uses.
fn balloon(kernel: &'static str) -> Result<()> {
    const TARGET: u64 = (64 << 20) / 4096;
    const FREED: u64 = (96 << 20) / 4096;
    let mut vm = Vm::start(&Spec { kernel, ..tiny("384M", 1, &["--balloon=64M"]) })?;
    for boots in 1..=2 {
        wait_for(&vm, "the inflated pages", |count| count("inflated_pages") >= boots * TARGET)?;
        vm.sh("dd if=/dev/urandom of=/tmp/kept bs=1M count=16; sha256sum /tmp/kept > /tmp/sum")?;
        vm.sh("dd if=/dev/zero of=/tmp/freed bs=1M count=96")?;
        // Only now: what the boot left free is being reported all along.
        let (before, resident) = (vm.info()?, resident(&vm)?);
        let before = count(&before, "released_pages")?;
        vm.sh("rm /tmp/freed")?;
        wait_for(&vm, "the freed memory", |count| count("released_pages") >= before + FREED / 2)?;
        let less = resident.saturating_sub(self::resident(&vm)?) / 4;
        ensure!(less >= FREED / 4, "the monitor's memory shrank by {less} pages");
        vm.sh("cd /tmp && sha256sum -c sum")?;
        let info = vm.info()?;
        for none in ["errors", "ignored_pages"] {
            ensure!(count(&info, none)? == 0, "{none}: {:?}", info.devices);
        }
        vm.check_kernel_log()?;
        if boots == 1 {
            vm.reboot()?;
        }
    }
    vm.stop()
}

/// The guest finds the devices that tell it of a disruption, and nothing to complain of in our tables. They do tell it: when it was
/// restored, and in a fork's child; not in the source.
fn identity() -> Result<()> {
    let mut vm = Vm::start(&tiny("384M", 1, &[]))?;
    vm.sh("ls -d /sys/bus/platform/drivers/vmgenid/CIVC0001:00 /sys/bus/platform/devices/AMZNC10C:00")?;
    let complaints = vm.sh("dmesg | grep -E 'ACPI.*(Error|Warning|Exception)' || true")?;
    ensure!(complaints.is_empty(), "ACPI:\n{complaints}");
    let page = vm.sh("grep AMZNC10C /proc/iomem")?;
    ensure!(page.trim() == "000ff000-000fffff : AMZNC10C:00", "the clock page: {page}");
    for (event, of) in [(2, "generation id"), (3, "clock page")] {
        let state = vm.sh(&format!("cat /sys/firmware/acpi/interrupts/gpe{event:02X}"))?;
        ensure!(state.contains(" enabled "), "nobody listens to the event of the {of}: {state}");
    }
    check_disruptions(&mut vm, 0).context("after its boot")?;
    vm.save_and_restore()?;
    check_disruptions(&mut vm, 1).context("restored")?;
    let (mut child, _) = vm.fork("child")?;
    check_disruptions(&mut child, 2).context("a fork's child")?;
    child.kill()?;
    check_disruptions(&mut vm, 1).context("a fork's source")?;
    vm.stop()
}

/// Fails unless the clock page, read by a program in the guest, is as Linux' vmclock-abi.h has it and tells of so many disruptions, and
/// the guest's kernel was notified of each, and of each new generation. No kernel of Debian 12's has the driver (Linux 6.13).
fn check_disruptions(vm: &mut Vm, times: u64) -> Result<()> {
    // Below 1 MiB even a strict /dev/mem lets root read what is no RAM of the kernel's.
    let dump = vm.sh("dd if=/dev/mem bs=4096 skip=255 count=1 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'")?;
    let bytes: Vec<_> =
        (0..dump.len() / 2).map_while(|i| u8::from_str_radix(&dump[2 * i..2 * i + 2], 16).ok()).collect();
    ensure!(bytes.len() == 4096, "of the clock page came {} bytes: {dump:.200}", bytes.len());
    let number = |at: usize, len: usize| bytes[at..at + len].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    let constant = [number(0, 4), number(4, 4), number(8, 2), number(10, 1), number(24, 8), number(34, 1)];
    ensure!(constant == [0x4b4c_4356, 4096, 1, 0xff, 0x300, 0], "the clock page's constant fields: {constant:x?}");
    let told = [number(12, 4), number(16, 8), number(104, 8)];
    ensure!(told == [2 * times, times, times], "its sequence, disruption marker and generation counter: {told:?}");
    ensure!(bytes[112..].iter().all(|byte| *byte == 0), "there is more in the clock page than its version has");
    for event in [2, 3] {
        // The first column counts; the kernel may need a moment to take the event.
        let (count, deadline) = (format!("cat /sys/firmware/acpi/interrupts/gpe{event:02X}"), Instant::now() + STEP);
        loop {
            let said = vm.sh(&count)?;
            let counted: u64 = said.split_whitespace().next().context("no count")?.parse()?;
            ensure!(counted <= times && Instant::now() < deadline, "event {event}, {times} disruptions: {said}");
            if counted == times {
                break;
            }
        }
    }
    Ok(())
}

/// A counter of the balloon.
fn count(info: &VmInfo, name: &str) -> Result<u64> {
    let balloon = info.devices.iter().find(|device| device.kind == "balloon").context("there is no balloon")?;
    balloon.counters.get(name).copied().with_context(|| format!("the balloon does not count {name}"))
}

/// Waits until the balloon's counters are as `enough` wants them.
fn wait_for(vm: &Vm, what: &str, enough: impl Fn(&dyn Fn(&str) -> u64) -> bool) -> Result<()> {
    let deadline = Instant::now() + STEP;
    loop {
        let info = vm.info()?;
        if enough(&|name| count(&info, name).unwrap_or(0)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{what} did not come: {:?}", info.devices);
        // An emulated host has one processor, which the guest needs too.
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// KiB of guest memory that the monitor holds.
fn resident(vm: &Vm) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.info()?.pid))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).context("no RssShmem")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// A kernel without an initrd gets as far as looking for its root, panics and reboots: seen by the monitor.
fn without_initrd() -> Result<()> {
    let assets = from_env("CIVIC_ASSETS")?.join("6.12-cloud");
    let dir = tempfile::tempdir()?;
    let mut command = civic(dir.path())?;
    command.args([
        "run",
        "--name",
        "bare",
        "--detach",
        "--memory",
        "256M",
        "--cpus",
        "1",
        "--cmdline",
        "console=ttyS0 panic=-1",
    ]);
    let out = command.arg("--kernel").arg(assets.join("vmlinuz")).output()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut console = Console::attach(&dir.path().join("bare/api.sock"), "serial")?;
    console.wait("Unable to mount root fs", BOOT)?;
    console.wait("Linux version", BOOT)?;
    let info = civic(dir.path())?.args(["info", "bare", "--json"]).output()?;
    let info: civic_api::VmInfo = serde_json::from_slice(&info.stdout)?;
    ensure!(info.boots >= 2, "{} boots", info.boots);
    let killed = civic(dir.path())?.args(["kill", "bare"]).output()?;
    ensure!(killed.status.success() && !dir.path().join("bare").exists(), "kill left something behind");
    Ok(())
}

fn reboots(image: Image) -> Result<()> {
    let mut vm = Vm::start(&Spec { image, ..tiny("384M", 2, &[]) })?;
    for _ in 0..20 {
        vm.reboot()?;
        vm.check_kernel_log()?;
    }
    vm.stop()
}

fn sixteen_vcpus() -> Result<()> {
    let mut vm = Vm::start(&tiny("1G", 16, &[]))?;
    ensure!(vm.sh("nproc")? == "16", "not all processors came up");
    vm.check_kernel_log()?;
    vm.stop()
}
