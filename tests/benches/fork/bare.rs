//! Forks of bare-metal guests again and again, beside what the machine itself needs for the like: `fork(2)`, a bare KVM VM, a copy on write, a bare
//! userfaultfd round trip, a copy.
//!
//! A guest of 2 vCPUs writes 100 MB/s of its RAM, a page at a time and each page once in a sweep, so that every write after a fork point
//! is a first one.

use std::time::{Duration, Instant};

use civic_api::ForkReport;
use civic_bench::report::{Kind, Peer, Promise, Report, Row};
use civic_bench::stats::Samples;
use civic_tests::bare::vm::{Setup, Vm};

use super::guest::{self, Load, Order};
use super::{GIB, baseline, footprint, mean, ms, say, threads};

/// The promise for a second GiB and each further one, in milliseconds of pause.
const PER_GIB: f64 = 0.5;
const CHILDREN: usize = 32;
/// How long a child lives while its source's writes are timed.
const LIFE: Duration = Duration::from_secs(1);

struct Effort {
    forks: usize,
    large_forks: usize,
    crowds: usize,
}

/// The same of the machine's own, taken once.
struct Floors {
    /// Milliseconds of `fork(2)` of 1 GiB.
    fork2: Samples,
    /// The same, 32 in a row.
    forks2: Samples,
    /// Milliseconds of a bare KVM VM of 1 GiB.
    vm: Samples,
    /// Microseconds of the kernel's copy on write.
    cow: Samples,
}

impl Floors {
    /// Measures them, and what else to compare a fork with.
    fn measure(report: &mut Report) -> Self {
        say("floors: fork(2), a bare KVM VM, a copy on write; and copies of 1 GiB");
        let floors = Self {
            fork2: baseline::fork2(GIB, 1, 10).into(),
            forks2: baseline::fork2(GIB, CHILDREN, 3).into(),
            vm: baseline::kvm_vm(GIB, 20).into(),
            cow: baseline::cow(20_000).into(),
        };
        let rows = [
            ("floor.fork2", "ms", &floors.fork2),
            ("floor.fork2_32", "ms", &floors.forks2),
            ("floor.kvm_vm", "ms", &floors.vm),
            ("floor.cow", "us", &floors.cow),
            ("floor.memcpy_1gib", "ms", &baseline::memcpy(GIB, 5).into()),
            ("floor.copy_1gib", "ms", &baseline::copy(GIB, 5).into()),
        ];
        for (name, unit, values) in rows {
            report.add(Row::new(name, unit, values.clone()));
        }
        floors
    }

    fn fork2(&self) -> Peer {
        Peer::of("fork(2) of 1 GiB", self.fork2.clone())
    }

    fn forks2(&self) -> Peer {
        Peer::of("32 times fork(2) of 1 GiB", self.forks2.clone())
    }

    fn vm(&self) -> Peer {
        Peer::of("a bare KVM VM of 1 GiB", self.vm.clone())
    }

    fn cow(&self) -> Peer {
        Peer::of("the kernel's copy on write", self.cow.clone())
    }
}

/// Measures all of it.
pub fn run(quick: bool, report: &mut Report) {
    let effort = if quick {
        Effort { forks: 15, large_forks: 5, crowds: 1 }
    } else {
        Effort { forks: 100, large_forks: 30, crowds: 5 }
    };
    let floors = Floors::measure(report);
    for order in [Order::Sequential, Order::Scattered] {
        thread_writes(&effort, order, report);
    }
    starts(&effort, &floors, report);
    let pause = one_gib(&effort, Order::Sequential, &floors, report);
    one_gib(&effort, Order::Scattered, &floors, report);
    eight_gib(&effort, pause, report);
    crowd(&effort, &floors, report);
    report.add(footprint::idle_child());
}

/// From starting a monitor's process until its guest's first word, and until one that is to be a fork waits for it.
fn starts(effort: &Effort, floors: &Floors, report: &mut Report) {
    let (mut boots, mut waits) = (Vec::new(), Vec::new());
    let source = guest::idle(GIB);
    for n in 0..effort.large_forks.max(10) {
        let setup = Setup::new(&guest::speaker()).memory(GIB);
        let begun = Instant::now();
        let mut vm = setup.boot();
        vm.expect("up\n");
        boots.push(begun.elapsed().as_secs_f64() * 1e3);
        vm.kill();
        assert!(vm.ended().success());
        let begun = Instant::now();
        let waiting = source.waiting(&format!("waits{n}"));
        waits.push(begun.elapsed().as_secs_f64() * 1e3);
        drop(waiting);
    }
    report.add(Row::new("boot.first_word", "ms", boots.into()).above(floors.vm()));
    report.add(Row::new("fork.waiting", "ms", waits.into()).above(floors.vm()));
}

/// Forks a guest once.
fn fork(source: &Vm, name: &str) -> ForkReport {
    let waiting = source.waiting(name);
    let (report, mut children) = source.fork(vec![waiting], false);
    children[0].kill();
    assert!(children[0].ended().success());
    report
}

/// What first writes cost a thread, beside bare round trips of a thread in turns with them.
fn thread_writes(effort: &Effort, order: Order, report: &mut Report) {
    let (mut all, mut trips, mut costs) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..effort.crowds.max(3) {
        say(&format!("a thread writes, {order:?}: fork {}", n + 1));
        let first = threads::first_writes(order);
        let trip = baseline::round_trip(4_000);
        costs.push(mean(&first) / mean(&trip));
        all.extend(first);
        trips.extend(trip);
    }
    let order = order.suffix();
    let stalls = Row::new(format!("fork.write_stall.thread{order}"), "us", all.into());
    let trips = Samples::from(trips);
    report.add(Row::new(format!("floor.uffd_round_trip{order}"), "us", trips.clone()));
    let trip = Peer::of("a bare userfaultfd round trip of a thread", trips);
    report.add(stalls.promised(Promise::AtMost(&[(0.99, 200.0)])).above(trip));
    let costs = Row::new(format!("fork.write_cost_vs_floor{order}"), "x", costs.into()).kind(Kind::Counted);
    report.add(costs.promised(Promise::AtMost(&[(0.5, 1.5)])));
}

/// The main figures, of a guest that writes in this order. Returns the median pause, in milliseconds.
fn one_gib(effort: &Effort, order: Order, floors: &Floors, report: &mut Report) -> f64 {
    let source = Load::boot(GIB, order);
    let (mut pauses, mut firsts, mut stalls, mut costs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut trips, mut dirtied, mut arms, mut births) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut waits, mut beside, mut opened, mut childs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for n in 0..effort.forks {
        if n % 10 == 0 {
            say(&format!("1 GiB, 2 vCPUs, {order:?}: fork {} of {}", n + 1, effort.forks));
        }
        let plain = source.log.sample(Duration::from_millis(200));
        dirtied.push(plain.bytes_per_second() / 1e6);
        source.vm.page_server();
        let waiting = source.vm.waiting(&format!("c{n}"));
        // Somebody waits: what is written from now on until the fork has to be protected again.
        let ahead = source.log.sample(Duration::from_millis(200));
        waits.extend(ahead.micros);
        let (told, mut children) = source.vm.fork(vec![waiting], false);
        // Long enough for a figure, in some of the rounds: while the child works too, and then with what it has touched, but not in its way.
        let mut first = Vec::new();
        if n % 5 == 0 {
            beside.extend(source.log.sample(LIFE).micros);
            children[0].pause();
            first = source.log.sample(LIFE).micros;
        } else if n % 5 == 1 {
            // And the child's, for itself.
            source.vm.pause();
            childs.extend(source.log.of_fork(&children[0]).sample(LIFE / 2).micros);
            source.vm.resume();
        }
        children[0].kill();
        assert!(children[0].ended().success());
        pauses.push(ms(told.stages.pause_us));
        arms.push(ms(told.stages.arm_us));
        births.push(ms(told.stages.birth_us));
        firsts.push(ms(told.children[0].running_us));
        opened.push(ms(told.stages.prepare_us));
        if n % 5 == 0 {
            // Side by side, so that what disturbs one disturbs the other.
            let trip = baseline::round_trip(2_000);
            costs.push((mean(&first) - mean(&plain.micros)) / mean(&trip));
            trips.extend(trip);
            stalls.extend(first);
        }
    }
    let (pauses, trips) = (Samples::from(pauses), Samples::from(trips));
    let median = pauses.median();
    let named = |name: &str, unit, values: Vec<f64>| Row::new(format!("{name}{}", order.suffix()), unit, values.into());
    report.add(named("guest.dirtied", "MB/s", dirtied));
    let pauses = Row::new(format!("fork.pause{}", order.suffix()), "ms", pauses);
    report.add(pauses.promised(Promise::AtMost(&[(0.5, 2.0), (0.99, 8.0)])).above(floors.fork2()));
    let firsts = named("fork.first_instruction", "ms", firsts).promised(Promise::AtMost(&[(0.5, 15.0)]));
    report.add(firsts.above(floors.fork2()));
    report.add(named("fork.prepare", "ms", opened));
    report.add(named("fork.arm", "ms", arms));
    report.add(named("fork.birth", "ms", births));
    let trip = || Peer::of("a bare userfaultfd round trip of a thread", trips.clone());
    report.add(named("fork.write_stall.waiting", "us", waits).above(trip()));
    let stalls = named("fork.write_stall", "us", stalls).promised(Promise::AtMost(&[(0.99, 200.0)]));
    report.add(stalls.above(trip()));
    report.add(named("fork.write_stall.beside_busy_child", "us", beside).above(trip()));
    report.add(named("fork.write_cost_vs_floor.vcpu", "x", costs).kind(Kind::Counted));
    report.add(named("fork.child_write", "us", childs).above(floors.cow()));
    median
}

/// The same guest with more memory.
fn eight_gib(effort: &Effort, one_gib: f64, report: &mut Report) {
    let source = Load::boot(8 * GIB, Order::Sequential);
    let mut more = Vec::new();
    for n in 0..effort.large_forks {
        if n % 10 == 0 {
            say(&format!("8 GiB, 2 vCPUs: fork {} of {}", n + 1, effort.large_forks));
        }
        let told = fork(&source.vm, &format!("c{n}"));
        more.push((ms(told.stages.pause_us) - one_gib) / 7.0);
    }
    report.add(Row::new("fork.pause_per_gib", "ms", more.into()).promised(Promise::AtMost(&[(0.5, PER_GIB)])));
}

/// Many children of one fork.
fn crowd(effort: &Effort, floors: &Floors, report: &mut Report) {
    let source = guest::idle(GIB);
    let mut all = Vec::new();
    for n in 0..effort.crowds {
        say(&format!("{CHILDREN} children: fork {} of {}", n + 1, effort.crowds));
        let waiting = (0..CHILDREN).map(|child| source.waiting(&format!("c{n}-{child}"))).collect();
        let (told, mut children) = source.fork(waiting, false);
        all.push(told.children.iter().map(|child| child.running_us).max().map_or(f64::NAN, ms));
        children.iter().for_each(Vm::kill);
        assert!(children.iter_mut().all(|child| child.ended().success()));
    }
    let lived = Row::new("fork.siblings_32", "ms", all.into()).promised(Promise::AtMost(&[(0.5, 1000.0)]));
    report.add(lived.above(floors.forks2()));
}
