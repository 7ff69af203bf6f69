//! What a guest sees of a host that is slow on purpose, full, or has lost what a disk lies in.

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_api::{VmInfo, VmState};
use civic_tests::linux::{STEP, Tap, Vm, run};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::tiny;

/// How long a rate is watched, and how far it may be off.
const WATCHED: Duration = Duration::from_secs(12);
const TOLERANCE: f64 = 0.05;

/// Far below what an emulated host can do. Bytes a second, requests a second.
const DISK_BYTES: u64 = 1_000_000;
const DISK_REQUESTS: u64 = 30;
const RECEIVED_BYTES: u64 = 300_000;
const SENT_BYTES: u64 = 200_000;
const RECEIVED_FRAMES: u64 = 300;
const SENT_FRAMES: u64 = 50;

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
    let cards = Cards::new(&format!("rx-bps={RECEIVED_BYTES}"), &format!("tx-bps={SENT_BYTES}"))?;
    let (bytes, requests) =
        (disk("bytes", &format!("bps={DISK_BYTES}"))?, disk("requests", &format!("iops={DISK_REQUESTS}"))?);
    let more = ["--disk", &bytes, "--disk", &requests];
    let mut vm = Vm::start(&tiny("256M", 1, &[&more[..], &cards.options()].concat()))?;
    // Twice the limit.
    let _flood = cards.load(&mut vm, 1000, RECEIVED_BYTES * 2 / 1000)?;
    // Without readahead each page is a request.
    vm.sh("echo 0 > /sys/block/vdb/queue/read_ahead_kb")?;
    for job in ["dd if=/dev/vda of=/dev/null bs=64k", "dd if=/dev/vdb of=/dev/null bs=4k"] {
        vm.sh(&format!("({job}) > /dev/null 2>&1 & true"))?;
    }
    check_rates(
        &vm,
        &[
            ("bytes", "read_bytes", "throttled", DISK_BYTES),
            ("requests", "reads", "throttled", DISK_REQUESTS),
            ("receives", "rx_bytes", "rx_delays", RECEIVED_BYTES),
            ("sends", "tx_bytes", "tx_delays", SENT_BYTES),
        ],
    )?;
    vm.check_kernel_log()?;
    vm.stop()
}

/// So do network cards that are limited in frames: small ones to the guest, such as TCP makes of a stream from it.
pub fn frame_rates() -> Result<()> {
    let cards = Cards::new(&format!("rx-pps={RECEIVED_FRAMES}"), &format!("tx-pps={SENT_FRAMES}"))?;
    let mut vm = Vm::start(&tiny("256M", 1, &cards.options()))?;
    let _flood = cards.load(&mut vm, 100, RECEIVED_FRAMES * 2)?;
    check_rates(
        &vm,
        &[("receives", "rx_frames", "rx_delays", RECEIVED_FRAMES), ("sends", "tx_frames", "tx_delays", SENT_FRAMES)],
    )?;
    vm.check_kernel_log()?;
    vm.stop()
}

/// What is watched: a device's id, the counter of what it moves and that of how often it had to wait, and its limit.
type Limit = (&'static str, &'static str, &'static str, u64);

/// Waits until all limits are felt, and then watches whether they hold.
fn check_rates(vm: &Vm, limits: &[Limit]) -> Result<()> {
    // What was saved up is used up once the limit was felt.
    let deadline = Instant::now() + STEP;
    loop {
        let (_, info) = vm.look()?;
        let felt = |(id, _, delays, _): &Limit| counter(&info, id, delays) > Some(3);
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
        let ratio = rate / *limit as f64;
        eprintln!("{id}: {name} {rate:.1} a second in {seconds:.2} s, {ratio:.4} of the limit");
        if (ratio - 1.0).abs() > TOLERANCE {
            off.push(format!("{id}: {name} moves {rate:.1} a second, the limit is {limit}"));
        }
    }
    ensure!(off.is_empty(), "{}", off.join("; "));
    Ok(())
}

/// A card for each way, or acknowledgements would wait behind the flood.
struct Cards {
    flooded: Tap,
    drained: Tap,
    receives: String,
    sends: String,
}

impl Cards {
    /// Cards with these limits.
    fn new(receives: &str, sends: &str) -> Result<Self> {
        let (flooded, drained) = (Tap::new()?, Tap::new()?);
        let receives = format!("tap={},id=receives,{receives}", flooded.name);
        let sends = format!("tap={},id=sends,{sends}", drained.name);
        Ok(Self { flooded, drained, receives, sends })
    }

    fn options(&self) -> [&str; 4] {
        ["--net", &self.receives, "--net", &self.sends]
    }

    /// Has both always busy: with so many datagrams a second of `len` bytes to the guest, and a stream from it.
    fn load(&self, vm: &mut Vm, len: usize, datagrams: u64) -> Result<Flood> {
        for (card, tap) in [("eth1", &self.flooded), ("eth2", &self.drained)] {
            vm.sh(&format!("ip addr add {}/24 dev {card} && ip link set {card} up", tap.guest))?;
        }
        let sink = TcpListener::bind((self.drained.host, 0))?;
        let (host, port) = (self.drained.host, sink.local_addr()?.port());
        std::thread::spawn(move || {
            for mut stream in sink.incoming().flatten() {
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            }
        });
        vm.sh(&format!("(nc {host} {port} < /dev/zero) > /dev/null 2>&1 & true"))?;
        Flood::start(&self.flooded, len, datagrams)
    }
}

/// Datagrams for the guest, more than its limit lets through.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    /// `rate` a second, of `len` bytes each.
    fn start(tap: &Tap, len: usize, rate: u64) -> Result<Self> {
        let socket = UdpSocket::bind((tap.host, 0))?;
        // Nobody has to listen. The guest answers ping, so its address is known before the flood.
        run("ping", &["-c", "1", "-W", "20", &tap.guest.to_string()])?;
        socket.connect((tap.guest, 9))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (datagram, start) = (vec![0; len], Instant::now());
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                // In small bursts.
                let due = start.elapsed().as_millis() as u64 * rate / 1000;
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

/// A small file system in memory, gone when dropped: where it is.
pub struct SmallFs(pub PathBuf);

impl SmallFs {
    /// Of at most this size.
    pub fn mount(at: PathBuf, size: &str) -> Result<Self> {
        fs::create_dir(&at)?;
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

/// Reads 64 KiB at `mib` of a disk, which the guest has not in memory.
fn read(disk: &str, mib: u32) -> String {
    format!("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{disk} of=/tmp/back bs=64k skip={} count=1", mib * 16)
}

/// Runs a command in the guest that must fail for an I/O error of a disk, of which the guest's kernel and the monitor tell.
fn refused(vm: &mut Vm, command: &str, disk: &str, id: &str) -> Result<()> {
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
}

/// The guest lives on, and its kernel complains of nothing but I/O errors.
fn check_alive(vm: &mut Vm) -> Result<VmInfo> {
    let info = vm.info()?;
    ensure!(info.state == VmState::Running && info.boots == 1, "{:?} after {} boots", info.state, info.boots);
    let bad = vm.sh("dmesg | grep -E 'Call Trace|BUG:|blocked for more than' || true")?;
    ensure!(bad.is_empty(), "the guest's kernel complains:\n{bad}");
    Ok(info)
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
    fs::remove_file(at("base.img"))?;
    vm.sh(&read("vdd", 0))?;

    vm.sh("dd if=/tmp/data of=/dev/vda bs=64k conv=fsync; echo 3 > /proc/sys/vm/drop_caches")?;
    vm.sh("dd if=/dev/vda bs=64k count=16 2>/dev/null | cmp - /tmp/data")?;
    let info = check_alive(&mut vm)?;
    ensure!(counter(&info, "good", "errors") == Some(0), "the good disk had errors: {:?}", info.devices);
    vm.stop()
}

/// Storage of the host's that fails: EIO from reading a backing file and from writing it.
///
/// The images are in tmpfs, and the host's kernel is told that the memory of one of their pages has failed (`hard_offline_page` in
/// sysfs, with CONFIG_MEMORY_FAILURE; not `MADV_HWPOISON`, which kills its caller): from then on reading and writing that
/// page of the file gives EIO (mm/shmem.c, since Linux 5.16, a76054266661). The host never uses that memory again, so this is done
/// to the emulated host alone.
pub fn failing_storage() -> Result<()> {
    const BLOCK: usize = 64 << 10;
    if std::env::var_os("TESTBED").is_none() {
        eprintln!(
            "LEFT OUT: limits::failing_storage takes a page of memory from its host for good; it is for the testbed"
        );
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let small = SmallFs::mount(at("small"), "64m")?;
    let (raw, over) = (small.0.join("raw.img"), small.0.join("over.qcow2"));
    File::create(&raw)?.set_len(16 << 20)?;
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&over)?, "16M"])?;
    let disks = [format!("path={},id=raw", raw.display()), format!("path={},id=over,format=qcow2", over.display())];
    let more: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let mut vm = Vm::start(&tiny("256M", 1, &more))?;
    vm.sh("dd if=/dev/urandom of=/tmp/data bs=64k count=16")?;
    vm.sh("echo failing | dd of=/tmp/data bs=64k seek=15 conv=notrunc")?;
    for (disk, id, path) in [("vda", "raw", &raw), ("vdb", "over", &over)] {
        vm.sh(&format!("dd if=/tmp/data of=/dev/{disk} bs=64k seek=16 conv=fsync"))?;
        vm.sh(&read(disk, 1))?;
        // An image of either format keeps the guest's data in runs of this length.
        let image = fs::read(path)?;
        let place = image.chunks(BLOCK).position(|block| block.starts_with(b"failing\n"));
        poison(path, (place.context("the image does not hold what was written")? * BLOCK) as u64)?;
        let block = 31;
        let (drop, device) = ("echo 3 > /proc/sys/vm/drop_caches", format!("/dev/{disk}"));
        refused(&mut vm, &format!("{drop}; dd if={device} of=/tmp/back bs=64k skip={block} count=1"), disk, id)?;
        refused(&mut vm, &format!("dd if=/tmp/data of={device} bs=64k seek={block} count=1 conv=fsync"), disk, id)?;
        // What is beside it is as good as before.
        vm.sh(&format!("{drop}; dd if={device} bs=64k skip=16 count=15 2>/dev/null > /tmp/back"))?;
        vm.sh("head -c 983040 /tmp/data | cmp - /tmp/back")?;
        vm.sh(&format!("dd if=/tmp/data of={device} bs=64k seek=16 count=15 conv=fsync"))?;
    }
    check_alive(&mut vm)?;
    vm.stop()
}

/// Tells the kernel that the memory has failed which holds the page at `offset` of a file in tmpfs.
#[allow(unsafe_code)]
fn poison(path: &Path, offset: u64) -> Result<()> {
    const PAGE: u64 = 4096;
    let file = File::open(path)?;
    let len = NonZeroUsize::new(PAGE as usize).context("a page has a size")?;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
    // SAFETY: the kernel chooses where; nothing of this process lies there.
    let map = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, &file, offset as i64) }?;
    // The page's number is in the low 55 bits of its entry (Documentation/admin-guide/mm/pagemap.rst).
    let mut entry = [0; 8];
    let read = File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, map.as_ptr() as u64 / PAGE * 8);
    let address = (u64::from_le_bytes(entry) & ((1 << 55) - 1)) * PAGE;
    let told = read.and_then(|()| fs::write("/sys/devices/system/memory/hard_offline_page", format!("{address:#x}")));
    // SAFETY: the mapping is the one made above, of this length, and nothing refers into it.
    unsafe { munmap(map, len.into()) }?;
    told.context("cannot have a page of memory fail")?;
    let failed = file.read_at(&mut [0], offset);
    let eio = failed.as_ref().is_err_and(|e| e.raw_os_error() == Some(Errno::EIO as i32));
    ensure!(eio, "reading a page that has failed: {failed:?}");
    Ok(())
}
