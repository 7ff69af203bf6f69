//! Devices that come and go in stock guests, which find them by themselves: nobody in them rescans a bus.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use civic_api::{DeviceInfo, PluggedDevice};
use civic_tests::linux::{Console, STEP, Spec, Tap, Vm, run, sha256};

use super::{COUNTS, ROOT_IMAGE, SCRATCH_BYTES, progress, work, work_tiny};

const DISK_BYTES: u64 = 4 << 20;
/// What so many rounds leave for the next is no leak, nor is what half of all leave: caches, and a heap of 300 KiB and more for each of
/// so many threads as the C library has heaps for, which a thread gets one of in turn.
const WARM: u32 = 10;
/// How many at once.
const MANY: usize = 16;

/// Every kind of device, again and again, while a disk and the network beside it are at work; all at once; one that is in use; before and
/// in a fork.
pub fn tiny(mut spec: Spec, rounds: u32) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let scratch = dir.path().join("scratch.img");
    File::create(&scratch)?.set_len(SCRATCH_BYTES)?;
    spec.more = vec!["--disk".into(), format!("path={},id=scratch", scratch.display())];
    let mut vm = Vm::start(&spec)?;
    work_tiny(&mut vm)?;
    all(&mut vm, dir.path(), rounds)?;
    vm.stop()
}

/// The same with systemd.
pub fn debian(spec: &Spec, rounds: u32) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir()?;
    let mut vm = Vm::start(spec)?;
    work(&mut vm)?;
    all(&mut vm, dir.path(), rounds)?;
    vm.stop()
}

fn all(vm: &mut Vm, dir: &Path, rounds: u32) -> Result<()> {
    let host = Host::new(dir)?;
    let mut first: Option<Weight> = None;
    for round in 0..rounds {
        disk(vm, &host).with_context(|| format!("a disk, in round {round}"))?;
        net(vm, &host).with_context(|| format!("a network card, in round {round}"))?;
        console(vm).with_context(|| format!("a console, in round {round}"))?;
        let now = Weight::of(vm)?;
        eprintln!("round {round}: {now:?}");
        let first = first.get_or_insert(now);
        if round < WARM.max(rounds / 2) {
            first.kib = first.kib.max(now.kib);
        }
        now.check(first, round)?;
        if round % 10 == 0 {
            let before = vm.sh(COUNTS)?;
            progress(vm, &before)?;
        }
    }
    at_once(vm, dir).context("many at once")?;
    in_use(vm, &host).context("one that is in use")?;
    forked(vm, &host).context("with forks")?;
    let bad = vm.sh("cat /tmp/clock.bad /tmp/disk.bad 2>/dev/null || true")?;
    ensure!(bad.is_empty(), "beside them went wrong:\n{bad}");
    Ok(())
}

/// What the host gives.
struct Host {
    image: PathBuf,
    tap: Tap,
}

impl Host {
    fn new(dir: &Path) -> Result<Self> {
        let image = dir.join("plugged.img");
        File::create(&image)?.set_len(DISK_BYTES)?;
        Ok(Self { image, tap: Tap::new()? })
    }

    fn disk(&self, id: &str) -> String {
        format!("path={},id={id}", self.image.display())
    }
}

/// What may not grow.
#[derive(Clone, Copy, Debug)]
struct Weight {
    functions: usize,
    descriptors: usize,
    threads: usize,
    kib: u64,
}

impl Weight {
    fn of(vm: &mut Vm) -> Result<Self> {
        let functions = vm.sh("ls /sys/bus/pci/devices | wc -l")?.trim().parse()?;
        let pid = vm.info()?.pid;
        let entries = |of: &str| Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{pid}/{of}"))?.count());
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        let kib = anonymous.trim().trim_end_matches(" kB").parse()?;
        Ok(Self { functions, descriptors: entries("fd")?, threads: entries("task")?, kib })
    }

    fn check(&self, first: &Self, round: u32) -> Result<()> {
        ensure!(self.functions == first.functions, "the guest has {} PCI functions", self.functions);
        // A connection that is just being closed.
        ensure!(self.descriptors <= first.descriptors + 2, "{self:?} after {first:?}");
        ensure!(self.threads <= first.threads + 2, "{self:?} after {first:?}");
        // Of what is lost each time a hundred rounds would show a few KiB.
        let most = first.kib + 512 + 8 * u64::from(round);
        ensure!(self.kib <= most, "{} KiB in round {round}, {} in the first", self.kib, first.kib);
        Ok(())
    }
}

fn add(vm: &Vm, options: &[&str]) -> Result<Vec<PluggedDevice>> {
    let text = vm.device("add", &[&["--wait", "120", "--json"], options].concat())?;
    Ok(serde_json::from_str(&text)?)
}

fn remove(vm: &Vm, id: &str) -> Result<()> {
    vm.device("remove", &[id, "--wait", "120"]).map(drop)
}

/// The name of the disk with this serial number, as soon as there is one.
fn find_disk(vm: &mut Vm, id: &str) -> Result<String> {
    vm.sh(&format!("until grep -lx {id} /sys/block/vd*/serial 2>/dev/null | cut -d/ -f4 | grep .; do sleep 0.1; done"))
}

fn disk(vm: &mut Vm, host: &Host) -> Result<()> {
    let [plugged] = &add(vm, &["--disk", &host.disk("plugged")])?[..] else { anyhow::bail!("not one") };
    ensure!(plugged.driver, "{plugged:?}");
    let name = find_disk(vm, "plugged")?;
    let sum = vm.sh(&format!(
        "dd if=/dev/urandom of=/tmp/plugged bs=64k count=8 2>/dev/null; dd if=/tmp/plugged of=/dev/{name} bs=64k seek=3 2>/dev/null; \
         sync; sha256sum < /tmp/plugged"
    ))?;
    remove(vm, "plugged")?;
    ensure!(vm.sh(&format!("ls /sys/block/{name} 2>/dev/null || true"))?.is_empty(), "the guest has it still");
    let mut written = vec![0; 8 << 16];
    File::open(&host.image)?.read_exact_at(&mut written, 3 << 16)?;
    ensure!(sum.starts_with(&sha256(&written)?), "the image does not hold what the guest wrote");
    Ok(())
}

fn net(vm: &mut Vm, host: &Host) -> Result<()> {
    const MAC: &str = "02:00:00:00:77:01";
    let (tap, guest) = (&host.tap.name, host.tap.guest);
    let [plugged] = &add(vm, &["--net", &format!("tap={tap},id=plugged,mac={MAC}")])?[..] else {
        anyhow::bail!("not one")
    };
    ensure!(plugged.driver, "{plugged:?}");
    let name = vm.sh(&format!(
        "until grep -lx {MAC} /sys/class/net/*/address 2>/dev/null | cut -d/ -f5 | grep .; do sleep 0.1; done"
    ))?;
    vm.sh(&format!("ip addr add {guest}/24 dev {name}; ip link set {name} up"))?;
    run("ping", &["-c", "3", "-i", "0.2", "-W", "20", &guest.to_string()])?;
    remove(vm, "plugged")?;
    ensure!(vm.sh(&format!("ls /sys/class/net/{name} 2>/dev/null || true"))?.is_empty(), "the guest has it still");
    Ok(())
}

fn console(vm: &mut Vm) -> Result<()> {
    add(vm, &["--console", "plugged"])?;
    let mut port = Console::attach(&vm.dir().join("api.sock"), "plugged")?;
    // Nothing in the guest tells which of its ttys a console is; it is one a moment after its driver is ready.
    vm.sh("n=1; until (echo civic-console-here > /dev/hvc$n) 2>/dev/null; do n=$((n % 7 + 1)); done")?;
    port.wait("civic-console-here", STEP)?;
    remove(vm, "plugged")?;
    ensure!(Console::attach(&vm.dir().join("api.sock"), "plugged").is_err(), "its port is still there");
    Ok(())
}

/// As many as that come together and go together.
fn at_once(vm: &mut Vm, dir: &Path) -> Result<()> {
    let mut options = Vec::new();
    for n in 0..MANY {
        let path = dir.join(format!("many{n}.img"));
        fs::write(&path, vec![n as u8; 4096])?;
        options.extend(["--disk".to_owned(), format!("path={},id=many{n}", path.display())]);
    }
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let plugged = add(vm, &options)?;
    ensure!(plugged.len() == MANY && plugged.iter().all(|device| device.driver), "{plugged:?}");
    for n in 0..MANY {
        let name = find_disk(vm, &format!("many{n}"))?;
        let byte = vm.sh(&format!("dd if=/dev/{name} bs=1 skip=4095 count=1 2>/dev/null | od -An -tu1"))?;
        ensure!(byte.trim() == n.to_string(), "disk {n} holds {byte}");
    }
    let ids: Vec<_> = (0..MANY).map(|n| format!("many{n}")).collect();
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    vm.device("remove", &[&ids[..], &["--wait", "300"]].concat())?;
    ensure!(vm.sh("grep -l many /sys/block/vd*/serial || true")?.is_empty(), "some are left");
    Ok(())
}

/// Who uses it gets errors; the guest lives on, and the next one comes.
fn in_use(vm: &mut Vm, host: &Host) -> Result<()> {
    add(vm, &["--disk", &host.disk("busy")])?;
    let name = find_disk(vm, "busy")?;
    // A dd that comes when the node has gone makes a file of that name, which is no device and must not stay.
    vm.sh(&format!(
        "(while [ -b /dev/{name} ] && dd if=/tmp/data of=/dev/{name} bs=64k conv=fsync 2>/dev/null; do :; done; \
         [ -b /dev/{name} ] || rm -f /dev/{name}; echo ended > /tmp/busy) & true"
    ))?;
    remove(vm, "busy")?;
    vm.sh("until [ -e /tmp/busy ]; do sleep 0.1; done; rm /tmp/busy; dmesg -c > /dev/null")?;
    disk(vm, host)
}

/// A child has what its source had been given, and what it is given itself; neither is the other's.
fn forked(vm: &mut Vm, host: &Host) -> Result<()> {
    add(vm, &["--disk", &host.disk("shared")])?;
    let name = find_disk(vm, "shared")?;
    vm.sh(&format!("dd if=/dev/zero of=/dev/{name} bs=64k count=1 conv=fsync 2>/dev/null"))?;
    let own = host.image.with_extension("own");
    File::create(&own)?.set_len(DISK_BYTES)?;
    let tap = &host.tap.name;
    let (disk, net) = (format!("path={},id=own", own.display()), format!("tap={tap},id=own-net"));
    let (mut child, report) = vm.fork_with("child", &["--disk", &disk, "--net", &net])?;
    eprintln!("{:?}", report.stages);
    let found = find_disk(&mut child, "own")?;
    child.sh(&format!("echo of the child | dd of=/dev/{found} bs=4k conv=sync,fsync 2>/dev/null"))?;
    child.sh(&format!("echo of the child | dd of=/dev/{name} bs=4k conv=sync,fsync 2>/dev/null"))?;
    let guest = host.tap.guest;
    let mac = child.info()?.devices.into_iter().find(|device| device.id == "own-net");
    let mac = mac.and_then(|mut device: DeviceInfo| device.settings.remove("mac")).context("it has no address")?;
    child.sh(&format!(
        "until card=$(grep -lx {mac} /sys/class/net/*/address | cut -d/ -f5) && [ -n \"$card\" ]; do sleep 0.1; done; \
         ip addr add {guest}/24 dev $card; ip link set $card up"
    ))?;
    run("ping", &["-c", "3", "-i", "0.2", "-W", "20", &guest.to_string()])?;
    remove(&child, "own")?;
    let mut text = [0; 12];
    File::open(&own)?.read_exact(&mut text)?;
    ensure!(&text == b"of the child", "the child's image holds {text:?}");
    remove(&child, "shared").context("in the child, what was its source's")?;
    let zero = vm.sh(&format!(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{name} bs=4k count=1 2>/dev/null | tr -d '\\0' | wc -c"
    ))?;
    ensure!(zero.trim() == "0", "the child's write is on the source's disk");
    child.check_kernel_log()?;
    child.kill()?;
    remove(vm, "shared")
}
