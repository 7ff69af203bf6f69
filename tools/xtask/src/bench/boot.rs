//! How fast a guest is up, and what its monitor costs.
//!
//! Time from starting the process an operator starts (`civic run`, QEMU) until the guest's first program prints: the kernel
//! is up and user space runs. Each monitor boots the image of the kernel that it boots faster, the bzImage or the vmlinux,
//! and microvm is what it is faster as, with ACPI or without: found by boots that do not count. The machine has a disk and a network card, as a useful one has.
//!
//! The same boots tell the monitor's own memory when the guest is at rest, and the number of times the guest left for its
//! host: a count that even an emulated host gets right.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use civic_bench::report::{Kind, Peer, Promise, Report, Row};
use civic_bench::stats::Samples;

use super::clock::Clock;
use super::guest::{BOOT, Guest, USER_SPACE};
use super::machine::{Aio, Disk, Image, Monitor, Spec, Tools, Userland, line};
use super::net::Tap;
use super::{memory, progress};

/// Who competes, each in the best of its forms.
const CONTESTANTS: [&[Monitor]; 3] = [&[Monitor::Civic], &[Monitor::Q35], &[Monitor::Microvm, Monitor::MicrovmQboot]];
const IMAGES: [Image; 2] = [Image::BzImage, Image::Vmlinux];
const MEMORY_MIB: u32 = 512;
const DISK: u64 = 64 << 20;
/// Civic's share of the faster QEMU's time.
const TIME: f64 = 0.75;
/// MiB of the monitor's own.
const OWN_MEMORY: &[(f64, f64)] = &[(0.5, 8.0)];
/// Says that the tiny guest, which the guest then becomes, is up.
const AT_REST: &str = "CIVIC-TINY-READY";

/// Boots of one monitor.
#[derive(Default)]
struct Boots {
    seconds: Samples,
    own_mib: Samples,
    exits: Samples,
}

/// Measures and reports.
pub fn run(tools: &Tools, clock: &Clock, quick: bool, report: &mut Report) -> Result<()> {
    let (rounds, cpus): (usize, &[u8]) = if quick { (5, &[1]) } else { (20, &[1, 2, 4]) };
    let tap = Tap::new(0)?;
    let disk = tools.work.join("boot.img");
    File::create(&disk)?.set_len(DISK)?;
    for &cpus in cpus {
        let spec = |monitor, image| Spec {
            monitor,
            image,
            userland: Userland::Bench,
            cpus,
            memory_mib: MEMORY_MIB,
            cmdline: String::new(),
            disks: vec![Disk { path: disk.clone(), qcow2: false, read_only: false, aio: Aio::IoUring }],
            taps: vec![(tap.name.clone(), false)],
            vsock: None,
            more: Vec::new(),
        };
        let chosen = choose(tools, clock, quick, report, spec)?;
        let mut boots = CONTESTANTS.map(|_| Boots::default());
        for round in 0..rounds {
            progress(&format!("boot, {cpus} vCPU: round {} of {rounds}", round + 1));
            for at in (0..chosen.len()).map(|i| (i + round) % chosen.len()) {
                boot(tools, clock, &spec(chosen[at].0, chosen[at].1), Some(&mut boots[at]))?;
            }
        }
        for &(monitor, image) in &chosen {
            report.command(&called(monitor, image, cpus), line(&tools.command(&spec(monitor, image), "NAME")));
        }
        let names: Vec<_> = chosen.iter().map(|&(m, i)| called(m, i, cpus)).collect();
        rows(report, cpus, &boots, &names);
    }
    Ok(())
}

fn called(monitor: Monitor, image: Image, cpus: u8) -> String {
    format!("{}, {}, {cpus} vCPU", monitor.name(), image.file())
}

/// A form of a contestant and how long it took to boot.
struct Form {
    monitor: Monitor,
    image: Image,
    seconds: Samples,
    /// Once it did not boot, it is out.
    out: bool,
}

/// The form and image that each contestant boots fastest. The first boots warm the page cache and tell nothing. A QEMU that
/// does not boot (a microvm with ACPI was seen to stay silent in the testbed) loses to its other forms.
fn choose(
    tools: &Tools,
    clock: &Clock,
    quick: bool,
    report: &mut Report,
    spec: impl Fn(Monitor, Image) -> Spec,
) -> Result<Vec<(Monitor, Image)>> {
    let rounds = if quick { 1 } else { 3 };
    let forms = |monitors: &[Monitor]| -> Vec<_> {
        let form = |(monitor, image)| Form { monitor, image, seconds: Samples::default(), out: false };
        monitors.iter().flat_map(|&m| IMAGES.map(|i| (m, i))).map(form).collect()
    };
    let mut contestants = CONTESTANTS.map(forms);
    for round in 0..=rounds {
        progress(&format!("warming up and finding the fastest forms: round {} of {}", round + 1, rounds + 1));
        for form in contestants.iter_mut().flatten().filter(|f| !f.out) {
            match boot(tools, clock, &spec(form.monitor, form.image), None) {
                Ok(seconds) if round > 0 => form.seconds.push(seconds),
                Ok(_) => {}
                Err(e) if form.monitor == Monitor::Civic => return Err(e),
                Err(e) => {
                    form.out = true;
                    report.leave_out(&format!("{} with {}: {e:#}", form.monitor.name(), form.image.file()));
                }
            }
        }
    }
    // The least that was needed: what disturbs a boot only ever delays it.
    let fastest = |forms: &Vec<Form>| {
        let left = forms.iter().filter(|f| !f.out);
        left.min_by(|a, b| a.seconds.quantile(0.0).total_cmp(&b.seconds.quantile(0.0))).map(|f| (f.monitor, f.image))
    };
    contestants.iter().map(|forms| fastest(forms).context("no form of QEMU boots")).collect()
}

/// One boot, in seconds; with `into`, on until the guest is at rest.
fn boot(tools: &Tools, clock: &Clock, spec: &Spec, into: Option<&mut Boots>) -> Result<f64> {
    let mark = clock.mark();
    let mut guest = Guest::start(tools, spec)?;
    let (_, up) = guest.wait(USER_SPACE, BOOT)?;
    let seconds = (up - guest.started).as_secs_f64() / clock.stretch(&mark)?;
    if let Some(boots) = into {
        let pid = guest.pid()?;
        let exits = exits(Path::new("/sys/kernel/debug/kvm"), pid).map_or(f64::NAN, |n| n as f64);
        guest.wait(AT_REST, BOOT)?;
        let own = memory::of(pid, u64::from(spec.memory_mib) << 20)?.own;
        boots.seconds.push(seconds);
        boots.exits.push(exits);
        boots.own_mib.push(own as f64 / f64::from(1 << 20));
    }
    Ok(seconds)
}

/// How often a process's vCPUs left their guest, by KVM's statistics: `PID-FD/exits` of each of its VMs.
fn exits(statistics: &Path, pid: u32) -> Option<u64> {
    let of = format!("{pid}-");
    let ours = |e: &PathBuf| e.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&of));
    let vms = fs::read_dir(statistics).ok()?.flatten().map(|e| e.path()).filter(ours);
    vms.map(|vm| fs::read_to_string(vm.join("exits")).ok()?.trim().parse().ok())
        .reduce(|a: Option<u64>, b| Some(a? + b?))?
}

fn rows(report: &mut Report, cpus: u8, boots: &[Boots; 3], names: &[String]) {
    let suffix = if cpus == 1 { String::new() } else { format!(".{cpus}cpu") };
    let (ours, peers) = (&boots[0], [1, 2]);
    let less = |of: fn(&Boots) -> &Samples| {
        let by = |&a: &usize, &b: &usize| of(&boots[a]).median().total_cmp(&of(&boots[b]).median());
        peers.into_iter().min_by(by).unwrap_or(1)
    };
    let mut row = |name: &str, unit, kind, promise, of: fn(&Boots) -> &Samples, peer: usize| {
        let row = Row::new(format!("{name}{suffix}"), unit, of(ours).clone()).kind(kind).promised(promise);
        report.add(row.beside(Peer::in_turns(names[peer].as_str(), "", of(&boots[peer]).clone())));
    };
    let faster = less(|b| &b.seconds);
    row("boot.userspace", "s", Kind::Timed, Promise::RatioAtMost(TIME), |b| &b.seconds, faster);
    row("boot.userspace.slower_qemu", "s", Kind::Timed, Promise::None, |b| &b.seconds, 3 - faster);
    if !ours.exits.median().is_nan() {
        row("boot.exits", "exits", Kind::Counted, Promise::None, |b| &b.exits, faster);
        row("boot.exits.slower_qemu", "exits", Kind::Counted, Promise::None, |b| &b.exits, 3 - faster);
    }
    let promise = if cpus == 1 { Promise::AtMost(OWN_MEMORY) } else { Promise::None };
    let smaller = less(|b| &b.own_mib);
    row("boot.monitor_memory", "MiB", Kind::Counted, promise, |b| &b.own_mib, smaller);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_of_all_vms_of_a_process_and_no_other() {
        let dir = std::env::temp_dir().join(format!("xtask-exits-{}", std::process::id()));
        for (vm, n) in [("12-9", "5\n"), ("12-14", "7\n"), ("123-9", "100\n")] {
            fs::create_dir_all(dir.join(vm)).unwrap();
            fs::write(dir.join(vm).join("exits"), n).unwrap();
        }
        assert_eq!(exits(&dir, 12), Some(12));
        assert_eq!(exits(&dir, 1), None);
        assert_eq!(exits(&dir.join("nothing"), 12), None);
        fs::remove_dir_all(dir).unwrap();
    }
}
