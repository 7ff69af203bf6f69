//! What a guest sees of a host that is slow on purpose, full, or has lost what a disk lies in.

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_api::{VmInfo, VmState};
use civic_tests::linux::{STEP, Tap, Vm, run};

use super::tiny;

/// How long a rate is watched, and how far it may be off.
const WATCHED: Duration = Duration::from_secs(12);
const TOLERANCE: f64 = 0.05;

/// Far below what an emulated host can do. Bytes a second, requests a second.
const DISK_BYTES: u64 = 1_000_000;
const DISK_REQUESTS: u64 = 30;
const RECEIVED_BYTES: u64 = 300_000;
const SENT_BYTES: u64 = 200_000;

fn counter(info: &VmInfo, id: &str, name: &str) -> Option<u64> {
    info.devices.iter().find(|device| device.id == id)?.counters.get(name).copied()
}

/// Disks and a network card that always have something to do move as much as they may.
pub fn rates() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = |id: &str, limit: &str| -> Result<String> {
        let path = dir.path().join(format!("{id}.img"));
        File::create(&path)?.set_len(1 << 30)?;
        Ok(format!("path={},id={id},{limit}", path.display()))
    };
    // A card for each way, or acknowledgements would wait behind the flood.
    let (flooded, drained) = (Tap::new()?, Tap::new()?);
    let receives = format!("tap={},id=receives,rx-bps={RECEIVED_BYTES}", flooded.name);
    let sends = format!("tap={},id=sends,tx-bps={SENT_BYTES}", drained.name);
    let (bytes, requests) =
        (disk("bytes", &format!("bps={DISK_BYTES}"))?, disk("requests", &format!("iops={DISK_REQUESTS}"))?);
    let more = ["--disk", &bytes, "--disk", &requests, "--net", &receives, "--net", &sends];
    let mut vm = Vm::start(&tiny("256M", 1, &more))?;
    for (card, tap) in [("eth1", &flooded), ("eth2", &drained)] {
        vm.sh(&format!("ip addr add {}/24 dev {card} && ip link set {card} up", tap.guest))?;
    }
    let _flood = Flood::start(&flooded)?;
    let sink = TcpListener::bind((drained.host, 0))?;
    let port = sink.local_addr()?.port();
    std::thread::spawn(move || {
        for mut stream in sink.incoming().flatten() {
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    });
    // Without readahead each page is a request.
    vm.sh("echo 0 > /sys/block/vdb/queue/read_ahead_kb")?;
    for job in [
        "dd if=/dev/vda of=/dev/null bs=64k",
        "dd if=/dev/vdb of=/dev/null bs=4k",
        &format!("nc {} {port} < /dev/zero", drained.host),
    ] {
        vm.sh(&format!("({job}) > /dev/null 2>&1 & true"))?;
    }
    // What was saved up is used up once the limit was felt.
    let limits = [
        ("bytes", "read_bytes", "throttled", DISK_BYTES),
        ("requests", "reads", "throttled", DISK_REQUESTS),
        ("receives", "rx_bytes", "rx_delays", RECEIVED_BYTES),
        ("sends", "tx_bytes", "tx_delays", SENT_BYTES),
    ];
    let deadline = Instant::now() + STEP;
    loop {
        let (_, info) = vm.look()?;
        let felt = |(id, _, delays, _): &(&str, _, &str, _)| counter(&info, id, delays) > Some(3);
        if limits.iter().all(felt) {
            break;
        }
        ensure!(Instant::now() < deadline, "a limit is not reached: {:?}", info.devices);
        std::thread::sleep(Duration::from_millis(200));
    }
    let (start, before) = vm.look()?;
    std::thread::sleep(WATCHED);
    let (end, after) = vm.look()?;
    let seconds = (end - start).as_secs_f64();
    let mut off = Vec::new();
    for (id, name, _, limit) in limits {
        let count = |info: &VmInfo| counter(info, id, name).with_context(|| format!("no {name} of {id}"));
        let rate = (count(&after)? - count(&before)?) as f64 / seconds;
        let ratio = rate / limit as f64;
        eprintln!("{id}: {name} {rate:.1} a second in {seconds:.2} s, {ratio:.4} of the limit");
        if (ratio - 1.0).abs() > TOLERANCE {
            off.push(format!("{id}: {name} moves {rate:.1} a second, the limit is {limit}"));
        }
    }
    ensure!(off.is_empty(), "{}", off.join("; "));
    vm.check_kernel_log()?;
    vm.stop()
}

/// Datagrams for the guest, more than its limit lets through.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn start(tap: &Tap) -> Result<Self> {
        let socket = UdpSocket::bind((tap.host, 0))?;
        // Nobody has to listen. The guest answers ping, so its address is known before the flood.
        run("ping", &["-c", "1", "-W", "20", &tap.guest.to_string()])?;
        socket.connect((tap.guest, 9))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (datagram, start) = ([0; 1000], Instant::now());
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                // Twice the limit, in small bursts.
                let due = start.elapsed().as_millis() as u64 * RECEIVED_BYTES * 2 / 1_000_000;
                for _ in sent..due {
                    // What the tap's queue does not take is lost; the guest says that nobody listens.
                    let _ = socket.send(&datagram);
                }
                sent = due;
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A small file system in memory, gone when dropped.
struct SmallFs(PathBuf);

impl SmallFs {
    fn mount(at: PathBuf, size: &str) -> Result<Self> {
        std::fs::create_dir(&at)?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "small", text(&at)?])?;
        Ok(Self(at))
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.0.to_string_lossy()]);
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of ours is UTF-8")
}

/// A full file system, an image that was cut short and one whose backing file was: I/O errors in the guest, which lives on.
pub fn lost_storage() -> Result<()> {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let small = SmallFs::mount(at("small"), "4m")?;
    let full = small.0.join("full.img");
    for (path, len) in [(&at("good.img"), 64), (&full, 64), (&at("cut.img"), 16), (&at("base.img"), 16)] {
        File::create(path)?.set_len(len * MIB)?;
    }
    let over = at("over.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", text(&over)?])?;
    let disks = [
        format!("path={},id=good", at("good.img").display()),
        format!("path={},id=full", full.display()),
        format!("path={},id=cut", at("cut.img").display()),
        format!("path={},id=over,format=qcow2,backing", over.display()),
    ];
    let more: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let mut vm = Vm::start(&tiny("256M", 1, &more))?;
    vm.sh("dd if=/dev/urandom of=/tmp/data bs=64k count=16")?;
    let read = |disk: &str, mib: u32| {
        format!("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{disk} of=/tmp/back bs=64k skip={} count=1", mib * 16)
    };
    let refused = |vm: &mut Vm, command: &str, disk: &str, id: &str| -> Result<()> {
        let errors = |vm: &Vm| -> Result<Option<u64>> { Ok(counter(&vm.info()?, id, "errors")) };
        // The kernel says no more than ten such things in five seconds.
        vm.sh("sleep 6")?;
        let (before, kernel) = (errors(vm)?, format!("dmesg | grep -c 'I/O error, dev {disk}' || true"));
        let logged = vm.sh(&kernel)?;
        let said = vm.sh(&format!("! ({command})"))?;
        ensure!(said.contains("nput/output error") || said.contains("I/O error"), "'{command}' said:\n{said}");
        ensure!(errors(vm)? > before, "the monitor counted no error of {id}");
        ensure!(vm.sh(&kernel)? != logged, "the kernel has no word of {disk}'s error");
        Ok(())
    };

    // The disk is larger than the file system that it lies on.
    vm.sh("dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync")?;
    refused(&mut vm, "dd if=/dev/zero of=/dev/vdb bs=64k seek=16 count=160 conv=fsync", "vdb", "full")?;
    vm.sh("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vdb bs=64k count=16 2>/dev/null | cmp - /tmp/data")?;
    run("mount", &["-o", "remount,size=64m", text(&small.0)?])?;
    vm.sh("dd if=/tmp/data of=/dev/vdb bs=64k seek=160 conv=fsync")?;

    // Images that somebody else cuts, the second below the one that the guest has.
    for (file, disk, id) in [("cut.img", "vdc", "cut"), ("base.img", "vdd", "over")] {
        vm.sh(&read(disk, 8))?;
        File::options().write(true).open(at(file))?.set_len(MIB)?;
        refused(&mut vm, &read(disk, 8), disk, id)?;
        vm.sh(&read(disk, 0))?;
    }
    // One that is only gone by name is there as long as the VM is.
    std::fs::remove_file(at("base.img"))?;
    vm.sh(&read("vdd", 0))?;

    vm.sh("dd if=/tmp/data of=/dev/vda bs=64k conv=fsync; echo 3 > /proc/sys/vm/drop_caches")?;
    vm.sh("dd if=/dev/vda bs=64k count=16 2>/dev/null | cmp - /tmp/data")?;
    let info = vm.info()?;
    ensure!(info.state == VmState::Running && info.boots == 1, "{:?} after {} boots", info.state, info.boots);
    ensure!(counter(&info, "good", "errors") == Some(0), "the good disk had errors: {:?}", info.devices);
    let bad = vm.sh("dmesg | grep -E 'Call Trace|BUG:|blocked for more than' || true")?;
    ensure!(bad.is_empty(), "the guest's kernel complains:\n{bad}");
    vm.stop()
}
