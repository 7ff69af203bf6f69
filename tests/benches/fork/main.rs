//! What a fork costs: bare-metal guests forked again and again, beside `fork(2)`, a full copy and a bare userfaultfd round trip.
//!
//! Run by `cargo xtask bench fork`; its status says whether the promises hold. `--quick` takes fewer samples. A guest of 2 vCPUs writes
//! 100 MB/s of its RAM, a page at a time and each page once in a sweep, so that every write after a fork point is a first one.
//!
//! With `--load`, which needs a host that runs stock kernels, something else instead: what clients of a Debian guest notice of forks.

mod baseline;
mod footprint;
mod guest;
mod load;
mod table;
mod threads;

use std::path::PathBuf;
use std::time::Duration;

use civic_api::ForkReport;
use civic_tests::bare::vm::Vm;

use self::guest::{Load, Order};
use self::table::{Promise, Row, Table};

const GIB: u64 = 1 << 30;
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

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let mut effort = Effort { forks: 100, large_forks: 30, crowds: 5 };
    let mut json: Option<PathBuf> = None;
    let (mut quick, mut loaded) = (false, false);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => {
                quick = true;
                effort = Effort { forks: 15, large_forks: 5, crowds: 1 };
            }
            "--load" => loaded = true,
            "--json" => json = args.next().map(PathBuf::from),
            other => panic!("unknown argument {other:?}: --quick, --load, --json PATH"),
        }
    }
    let mut table = Table::default();
    if loaded {
        load::run(quick, &mut table);
    } else {
        baselines(&mut table);
        for order in [Order::Sequential, Order::Scattered] {
            thread_writes(&effort, order, &mut table);
        }
        let pause = one_gib(&effort, Order::Sequential, &mut table);
        one_gib(&effort, Order::Scattered, &mut table);
        eight_gib(&effort, pause, &mut table);
        crowd(&effort, &mut table);
        table.add(footprint::idle_child());
    }
    print!("{table}");
    if let Some(path) = json {
        let text = serde_json::to_vec_pretty(&table.json()).expect("rows are JSON");
        std::fs::write(&path, text).expect("the rows can be written");
    }
    std::process::exit(i32::from(!table.holds()));
}

fn say(what: &str) {
    println!("bench: {what}");
}

fn baselines(table: &mut Table) {
    say("fork(2) and a copy of 1 GiB");
    table.add(Row::new("fork2.1gib", "ms", baseline::fork2(GIB, 10), Promise::None));
    table.add(Row::new("copy.1gib", "ms", baseline::copy(GIB, 5), Promise::None));
}

/// Forks a guest once.
fn fork(source: &Vm, name: &str) -> ForkReport {
    let waiting = source.waiting(name);
    let (report, mut children) = source.fork(vec![waiting], false);
    children[0].kill();
    assert!(children[0].ended().success());
    report
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

/// What first writes cost a thread, beside bare round trips of a thread in turns with them.
fn thread_writes(effort: &Effort, order: Order, table: &mut Table) {
    let (mut all, mut costs) = (Vec::new(), Vec::new());
    for n in 0..effort.crowds.max(3) {
        say(&format!("a thread writes, {order:?}: fork {}", n + 1));
        let first = threads::first_writes(order);
        costs.push(table::mean(&first) / table::mean(&baseline::round_trip(4_000)));
        all.extend(first);
    }
    let order = order.suffix();
    table.add(Row::new(format!("thread.write{order}"), "us", all, Promise::AtMost(&[(0.99, 200.0)])));
    table.add(Row::new(format!("thread.write_to_round_trip{order}"), "ratio", costs, Promise::AtMost(&[(0.5, 1.5)])));
}

/// The main figures, of a guest that writes in this order. Returns the median pause, in milliseconds.
fn one_gib(effort: &Effort, order: Order, table: &mut Table) -> f64 {
    let source = Load::boot(GIB, order);
    let (mut pauses, mut firsts, mut stalls, mut costs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut trips, mut dirtied, mut arms, mut births) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut waits, mut beside, mut opened) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..effort.forks {
        if n % 10 == 0 {
            say(&format!("1 GiB, 2 vCPUs, {order:?}: fork {} of {}", n + 1, effort.forks));
        }
        let plain = source.sample(Duration::from_millis(200));
        dirtied.push(plain.bytes_per_second() / 1e6);
        source.vm.page_server();
        let waiting = source.vm.waiting(&format!("c{n}"));
        // Somebody waits: what is written from now on until the fork has to be protected again.
        let ahead = source.sample(Duration::from_millis(200));
        waits.extend(ahead.micros);
        let (report, mut children) = source.vm.fork(vec![waiting], false);
        // Long enough for a figure, in some of the rounds: while the child works too, and then with what it has touched, but not in its way.
        let mut first = Vec::new();
        if n % 5 == 0 {
            beside.extend(source.sample(LIFE).micros);
            children[0].pause();
            first = source.sample(LIFE).micros;
        }
        children[0].kill();
        assert!(children[0].ended().success());
        pauses.push(ms(report.stages.pause_us));
        arms.push(ms(report.stages.arm_us));
        births.push(ms(report.stages.birth_us));
        firsts.push(ms(report.children[0].running_us));
        opened.push(ms(report.stages.prepare_us));
        if n % 5 == 0 {
            // Side by side, so that what disturbs one disturbs the other.
            let trip = baseline::round_trip(2_000);
            costs.push((table::mean(&first) - table::mean(&plain.micros)) / table::mean(&trip));
            trips.extend(trip);
            stalls.extend(first);
        }
    }
    let median = table::quantile(&pauses, 0.5);
    let mut add = |name: &str, unit, values, promise| {
        table.add(Row::new(format!("{name}{}", order.suffix()), unit, values, promise));
    };
    add("guest.dirtied", "MB/s", dirtied, Promise::None);
    add("fork.pause", "ms", pauses, Promise::AtMost(&[(0.5, 2.0), (0.99, 8.0)]));
    add("fork.first_instruction", "ms", firsts, Promise::AtMost(&[(0.5, 15.0)]));
    add("fork.prepare", "ms", opened, Promise::None);
    add("fork.arm", "ms", arms, Promise::None);
    add("fork.birth", "ms", births, Promise::None);
    add("write.waiting", "us", waits, Promise::None);
    add("write.stall", "us", stalls, Promise::AtMost(&[(0.99, 200.0)]));
    add("write.beside_busy_child", "us", beside, Promise::None);
    add("uffd.round_trip", "us", trips, Promise::None);
    add("write.cost_to_round_trip", "ratio", costs, Promise::None);
    median
}

/// The same guest with more memory.
fn eight_gib(effort: &Effort, one_gib: f64, table: &mut Table) {
    let source = Load::boot(8 * GIB, Order::Sequential);
    let mut more = Vec::new();
    for n in 0..effort.large_forks {
        if n % 10 == 0 {
            say(&format!("8 GiB, 2 vCPUs: fork {} of {}", n + 1, effort.large_forks));
        }
        let report = fork(&source.vm, &format!("c{n}"));
        more.push((ms(report.stages.pause_us) - one_gib) / 7.0);
    }
    table.add(Row::new("fork.pause_per_gib", "ms", more, Promise::AtMost(&[(0.5, PER_GIB)])));
}

/// Many children of one fork.
fn crowd(effort: &Effort, table: &mut Table) {
    let source = guest::idle(GIB);
    let mut all = Vec::new();
    for n in 0..effort.crowds {
        say(&format!("{CHILDREN} children: fork {} of {}", n + 1, effort.crowds));
        let waiting = (0..CHILDREN).map(|child| source.waiting(&format!("c{n}-{child}"))).collect();
        let (report, mut children) = source.fork(waiting, false);
        all.push(report.children.iter().map(|child| child.running_us).max().map_or(f64::NAN, ms));
        children.iter().for_each(Vm::kill);
        assert!(children.iter_mut().all(|child| child.ended().success()));
    }
    table.add(Row::new("fork.32_children", "ms", all, Promise::AtMost(&[(0.5, 1000.0)])));
}
