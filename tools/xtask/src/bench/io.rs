//! Disks, network and vsock, Civic beside QEMU's q35 with virtio-pci; and the channel of programs that are started from outside, beside
//! vsock of the same guest.
//!
//! Both guests are up all the time and take turns, a run of seconds each: A, B, A, B, …. A guest without work sleeps in a read of
//! its console and costs its host next to nothing, so one at a time is measured, and what drifts (the host's clock, other
//! tenants, the page cache) drifts under both alike. To boot each guest afresh for every run would put minutes between
//! the halves of a pair in the testbed, where the noise is greatest.
//!
//! QEMU's disks are there twice, with `aio=io_uring` and with `aio=threads`: the faster one in the warm-up is the peer, for every
//! job by itself. Its network card is there twice as well, served by QEMU and by the kernel's vhost.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_bench::report::{Peer, Promise, Report, Row};
use civic_bench::stats::Samples;

use super::clock::Clock;
use super::fio::{self, JOBS, Job};
use super::guest::Guest;
use super::images::Images;
use super::machine::{Aio, Disk, Image, Monitor, Spec, Tools, Userland, Vsock, line};
use super::net::{self, Tap, Way};
use super::vsock::End;
use super::{Choice, channel, progress, vsock};

const MEMORY_MIB: u32 = 512;
/// Civic's share of QEMU's throughput.
const SHARE: f64 = 0.9;
/// And that of the channel of programs in what vsock would give them.
const CHANNEL: f64 = 0.5;
/// The guest's address for QEMU's vsock.
const CID: u32 = 77;
/// How long a run in the guest may take beyond its time.
const PATIENCE: Duration = Duration::from_secs(300);
const WAYS_OF_QEMU: [Aio; 2] = [Aio::IoUring, Aio::Threads];
const CIVIC: usize = 0;
const PEER: usize = 1;

/// How much is measured. Many short rounds: the shorter one is, the less changes between its two halves.
struct Effort {
    rounds: usize,
    seconds: u32,
    /// Jobs on qcow2 images, of all of them: what the format is about comes first.
    qcow2_jobs: usize,
}

/// Both guests and what they have.
struct Bench<'a> {
    effort: Effort,
    choice: &'a Choice,
    clock: &'a Clock,
    images: &'a Images,
    /// Civic's, QEMU's.
    guests: [Guest<'a>; 2],
    report: &'a mut Report,
    /// MiB a second of copying within this host's memory: no byte comes to a guest without.
    memcpy: Samples,
}

/// MiB a second of copying some MiB over and over, more than the caches hold, in turns as short as the benches'.
fn memcpy(clock: &Clock) -> Result<Samples> {
    const MIB: usize = 64;
    let from = vec![1_u8; MIB << 20];
    let mut to = vec![0_u8; MIB << 20];
    let mut once = || -> Result<f64> {
        let (mark, begun) = (clock.mark(), Instant::now());
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        let seconds = begun.elapsed().as_secs_f64() / clock.stretch(&mark)?;
        Ok(MIB as f64 / seconds)
    };
    // The first touches its memory.
    once()?;
    (0..10).map(|_| once()).collect::<Result<Vec<_>>>().map(Samples::from)
}

/// Measures and reports.
pub fn run(tools: &Tools, clock: &Clock, quick: bool, choice: &Choice, report: &mut Report) -> Result<()> {
    let mut effort = if quick {
        Effort { rounds: 9, seconds: 2, qcow2_jobs: 2 }
    } else {
        Effort { rounds: 21, seconds: 4, qcow2_jobs: JOBS.len() }
    };
    effort.rounds = choice.rounds.map_or(effort.rounds, usize::from);
    effort.seconds = choice.seconds.unwrap_or(effort.seconds);
    let root = std::env::var_os("CIVIC_ROOT_IMAGE").map(PathBuf::from).context("no CIVIC_ROOT_IMAGE")?;
    let images = Images::new(tools)?;
    let taps = [Tap::new(1)?, Tap::new(2)?, Tap::new(3)?];
    let probe = images.make("probe.qcow2", true)?;
    let refused = tools.refused(&["--disk", &format!("path={},format=qcow2", probe.display())])?;
    let qcow2 = refused.is_none();
    if let Some(why) = refused {
        report.leave_out(&format!("qcow2.*: civic says: {why}"));
    }
    let sockets = vsocks(tools, report)?;

    let root = Disk { path: root, qcow2: false, read_only: true, aio: Aio::IoUring };
    let formats = if qcow2 { &[false, true][..] } else { &[false] };
    let mut disks = [vec![root.clone()], vec![root]];
    for &qcow2 in formats {
        let name = if qcow2 { "qcow2" } else { "raw" };
        let disk = |path, aio| Disk { path, qcow2, read_only: false, aio };
        disks[CIVIC].push(disk(images.make(&format!("civic.{name}"), qcow2)?, Aio::IoUring));
        for aio in WAYS_OF_QEMU {
            disks[PEER].push(disk(images.make(&format!("qemu-{}.{name}", aio.word()), qcow2)?, aio));
        }
    }
    let [ours, peers] = disks;
    let spec = |monitor, disks, taps: &[(&Tap, bool)], vsock: Option<&Vsock>, more: &[&str]| Spec {
        monitor,
        image: Image::BzImage,
        userland: Userland::Bench,
        cpus: choice.cpus,
        memory_mib: MEMORY_MIB,
        cmdline: taps.iter().enumerate().fold("civic.bench=io".to_owned(), |c, (n, t)| c + " " + &t.0.cmdline(n)),
        disks,
        taps: taps.iter().map(|(tap, vhost)| (tap.name.clone(), *vhost)).collect(),
        vsock: vsock.cloned(),
        more: more.iter().map(|option| (*option).to_owned()).collect(),
    };
    let specs = [
        spec(Monitor::Civic, ours, &[(&taps[0], false)], sockets.as_ref().map(|s| &s[CIVIC]), &["--allow-programs"]),
        spec(Monitor::Q35, peers, &[(&taps[1], false), (&taps[2], true)], sockets.as_ref().map(|s| &s[PEER]), &[]),
    ];
    for spec in &specs {
        report.command(&format!("{}, io", spec.monitor.name()), line(&tools.command(spec, "NAME")));
    }
    let start = |spec: &Spec| -> Result<Guest> {
        progress(&format!("booting {}", spec.monitor.name()));
        let mut guest = Guest::start(tools, spec)?;
        guest.wait_ready()?;
        Ok(guest)
    };
    let guests = [start(&specs[0])?, start(&specs[1])?];
    progress("a memcpy");
    let mut bench = Bench { effort, choice, clock, images: &images, guests, report, memcpy: memcpy(clock)? };
    for (n, &qcow2) in formats.iter().enumerate() {
        bench.disks(qcow2, n)?;
    }
    bench.network(&taps)?;
    if let Some(sockets) = &sockets {
        if ["vsock.", "program."].iter().any(|group| !bench.ways(group).is_empty()) {
            bench.guests.iter_mut().try_for_each(vsock::serve)?;
        }
        bench.vsock(sockets)?;
        bench.channel(&sockets[CIVIC])?;
    }
    bench.guests.iter_mut().try_for_each(complaints)?;
    ensure!(bench.report.has_rows(), "no row of io's is called {:?}, or none that can be measured here", choice.only);
    Ok(())
}

/// How the guests are reached by vsock, if both can be.
fn vsocks(tools: &Tools, report: &mut Report) -> Result<Option<[Vsock; 2]>> {
    let socket = tools.work.join("vsock");
    if let Some(why) = tools.refused(&["--vsock", &format!("uds={}", socket.display())])? {
        report.leave_out(&format!("vsock.*: civic says: {why}"));
        return Ok(None);
    }
    if !std::path::Path::new("/dev/vhost-vsock").exists() {
        report.leave_out("vsock.*: no /dev/vhost-vsock for QEMU (modprobe vhost_vsock)");
        return Ok(None);
    }
    Ok(Some([Vsock::Unix(socket), Vsock::Vhost(CID)]))
}

/// Fails if the guest's kernel complained.
pub fn complaints(guest: &mut Guest) -> Result<()> {
    let bad = "Call Trace|BUG:|Oops|I/O error|blk_update_request|hung_task";
    let found = guest.run(&format!("dmesg | grep -B 6 -A 24 -E '{bad}' || true"), PATIENCE)?;
    ensure!(found.is_empty(), "the kernel in {} complains:\n{found}", guest.monitor().name());
    Ok(())
}

/// `/dev/vdX`; disk 0 is the root file system's.
fn device(index: usize) -> String {
    format!("/dev/vd{}", char::from(b'a' + index as u8))
}

impl Bench<'_> {
    /// All jobs on the disks of a format, which is the `n`th: Civic's own, QEMU's one for each way.
    fn disks(&mut self, qcow2: bool, n: usize) -> Result<()> {
        let group = if qcow2 { "qcow2" } else { "blk" };
        let ours = device(1 + n);
        let theirs = [0, 1].map(|way| device(1 + 2 * n + way));
        let limit = PATIENCE + Duration::from_secs(self.effort.seconds.into());
        // What is asked for by its name is no part of an effort.
        let enough = if qcow2 && self.choice.only.is_empty() { self.effort.qcow2_jobs } else { JOBS.len() };
        for job in &JOBS[enough..] {
            self.report.leave_out(&format!("{group}.{}: --quick", job.name));
        }
        let wanted = |job: &&Job| self.choice.wants(&format!("{group}.{}", job.name));
        let jobs: Vec<_> = JOBS[..enough].iter().filter(wanted).collect();
        if jobs.is_empty() {
            return Ok(());
        }
        for (guest, device) in [(CIVIC, &ours), (PEER, &theirs[0]), (PEER, &theirs[1])] {
            progress(&format!("{group}: writing and verifying {device} of {}", self.guests[guest].monitor().name()));
            for command in fio::verify(device) {
                fio::check(&self.guests[guest].run(&command, limit)?)?;
            }
        }
        for job in jobs {
            let name = format!("{group}.{}", job.name);
            let (images, clock, seconds, guests) = (self.images, self.clock, self.effort.seconds, &mut self.guests);
            let mut run = |guest: usize, device: &str| -> Result<f64> {
                images.settle()?;
                let mark = clock.mark();
                let said = guests[guest].run(&fio::measure(job, device, seconds), limit)?;
                Ok(fio::figure(job, &said)? * clock.stretch(&mark)?)
            };
            progress(&format!("{name}: warming up"));
            run(CIVIC, &ours)?;
            let (first, second) = (run(PEER, &theirs[0])?, run(PEER, &theirs[1])?);
            let way = usize::from(second > first);
            let [ours, peer] = in_turn(&name, self.effort.rounds, |who| {
                if who == CIVIC { run(CIVIC, &ours) } else { run(PEER, &theirs[way]) }
            })?;
            self.row(name, job.unit, ours, peer, &format!("aio={}", WAYS_OF_QEMU[way].word()), true);
        }
        Ok(())
    }

    /// The ways whose rows, of which this is the name's beginning, are wanted.
    fn ways(&self, group: &str) -> Vec<Way> {
        Way::BOTH.into_iter().filter(|way| self.choice.wants(&format!("{group}{}", way.name()))).collect()
    }

    fn network(&mut self, taps: &[Tap; 3]) -> Result<()> {
        let ways = self.ways("net.tcp_");
        if ways.is_empty() {
            return Ok(());
        }
        self.guests.iter_mut().try_for_each(net::serve)?;
        let (clock, seconds) = (self.clock, self.effort.seconds);
        for way in ways {
            let name = format!("net.tcp_{}", way.name());
            progress(&format!("{name}: warming up"));
            for tap in taps {
                net::measure(tap, way, seconds)?;
            }
            let [ours, peer, vhost] = in_turn(&name, self.effort.rounds, |who| {
                let mark = clock.mark();
                Ok(net::measure(&taps[who], way, seconds)? * clock.stretch(&mark)?)
            })?;
            self.row(name.clone(), fio::MIB, ours.clone(), peer, "vhost=off", true);
            self.row(format!("{name}.vhost"), fio::MIB, ours, vhost, "vhost=on", false);
        }
        Ok(())
    }

    fn vsock(&mut self, sockets: &[Vsock; 2]) -> Result<()> {
        let ways = self.ways("vsock.");
        if ways.is_empty() {
            return Ok(());
        }
        let (clock, seconds) = (self.clock, self.effort.seconds);
        for way in ways {
            let name = format!("vsock.{}", way.name());
            progress(&format!("{name}: warming up"));
            for socket in sockets {
                vsock::measure(socket, way, End::Own, seconds)?;
            }
            let [ours, peer] = in_turn(&name, self.effort.rounds, |who| {
                let mark = clock.mark();
                Ok(vsock::measure(&sockets[who], way, End::Own, seconds)? * clock.stretch(&mark)?)
            })?;
            self.row(name, fio::MIB, ours, peer, "vhost-vsock", true);
        }
        Ok(())
    }

    /// What a program that was started from outside says and is told, beside vsock of the same guest.
    fn channel(&mut self, socket: &Vsock) -> Result<()> {
        let ways = self.ways("program.");
        if ways.is_empty() {
            return Ok(());
        }
        let (clock, seconds) = (self.clock, self.effort.seconds);
        for way in ways {
            let name = format!("program.{}", way.name());
            progress(&format!("{name}: warming up"));
            let guest = &self.guests[CIVIC];
            let run = |who| -> Result<f64> {
                let mark = clock.mark();
                let measured = match who {
                    CIVIC => channel::measure(guest, way, seconds)?,
                    _ => vsock::measure(socket, way, End::Piped, seconds)?,
                };
                Ok(measured * clock.stretch(&mark)?)
            };
            [CIVIC, PEER].into_iter().try_for_each(|who| run(who).map(drop))?;
            let [ours, peer] = in_turn(&name, self.effort.rounds, run)?;
            let peer = Peer::in_turns("civic, io", "a program behind a pipe, relayed by vsock of the same guest", peer);
            let row = Row::new(name, fio::MIB, ours).promised(Promise::RatioAtLeast(CHANNEL)).beside(peer);
            self.report.add(row.above(Peer::of("one memcpy", self.memcpy.clone())));
        }
        Ok(())
    }

    fn row(&mut self, name: String, unit: &'static str, ours: Samples, peer: Samples, how: &str, promised: bool) {
        let promise = if promised { Promise::RatioAtLeast(SHARE) } else { Promise::None };
        let peer = Peer::in_turns(format!("{}, io", Monitor::Q35.name()), how, peer);
        let row = Row::new(name, unit, ours).promised(promise).beside(peer);
        self.report.add(if unit == fio::MIB { row.above(Peer::of("one memcpy", self.memcpy.clone())) } else { row });
    }
}

/// Measures contestants in turn, each round begun by the next one.
fn in_turn<const N: usize>(
    what: &str,
    rounds: usize,
    mut measure: impl FnMut(usize) -> Result<f64>,
) -> Result<[Samples; N]> {
    let mut samples = [(); N].map(|()| Samples::default());
    for round in 0..rounds {
        progress(&format!("{what}: round {} of {rounds}", round + 1));
        for who in (0..N).map(|i| (i + round) % N) {
            samples[who].push(measure(who).with_context(|| format!("{what} of contestant {who}"))?);
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_copied() {
        let copied = memcpy(&Clock::new(None)).unwrap();
        assert!(copied.n() == 10 && copied.quantile(0.0) > 1.0, "{copied:?}");
    }

    #[test]
    fn turns_alternate_and_begin_with_another_each_round() {
        let mut order = Vec::new();
        let [a, b] = in_turn("x", 3, |who| {
            order.push(who);
            Ok(order.len() as f64)
        })
        .unwrap();
        assert_eq!(order, [0, 1, 1, 0, 0, 1]);
        assert_eq!((a.n(), b.n(), a.max(), b.max()), (3, 3, 5.0, 6.0));
        assert_eq!((device(0), device(4)), ("/dev/vda".into(), "/dev/vde".into()));
    }
}
