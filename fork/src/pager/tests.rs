//! The protocol under fire: threads write, others read the forks, and what anybody sees is compared with what was there at the fork.
//!
//! Every page says which version it is, in every word, so that a page that is torn, of the wrong time or of the wrong place shows.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::ram::Ram;
use crate::testing::{self, Random};

const P: u64 = PAGE as u64;

/// What word `n` of a page holds in a version of it. Version 0 is a hole.
fn word(page: u32, version: u32, n: usize) -> u64 {
    match version {
        0 => 0,
        _ => Random((u64::from(page) << 32 | u64::from(version)) * 512 + n as u64 + 1).below(u64::MAX),
    }
}

/// A command for the thread that serves.
type Job = Box<dyn FnOnce(&mut Pager) + Send>;

/// A page server in a thread, as a process would run it.
struct Served {
    jobs: Sender<Job>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<Result<(), PagerError>>>,
    notices: Receiver<Notice>,
}

impl Served {
    fn new(ram: &Ram, limit: u32) -> Self {
        let uffd = Userfault::open(FEATURES).unwrap();
        let store = Store::new(testing::memfd(0), limit).unwrap();
        let journal = Journal::new(&testing::memfd(0)).unwrap();
        let memfd = ram.memfd().try_clone().unwrap();
        let pager = Pager::new(memfd, uffd, ram.mappings().clone(), store, journal).unwrap();
        let (jobs, inbox) = channel::<Job>();
        let (tell, notices) = channel();
        let wake = Arc::new(EventFd::new().unwrap());
        let woken = Arc::clone(&wake);
        let thread = Some(std::thread::spawn(move || serve(pager, &woken, &inbox, &tell)));
        Self { jobs, wake, thread, notices }
    }

    fn ask<T: Send + 'static>(&self, job: impl FnOnce(&mut Pager) -> T + Send + 'static) -> T {
        let (tell, told) = channel();
        self.jobs.send(Box::new(move |pager| drop(tell.send(job(pager))))).unwrap();
        self.wake.write(1).unwrap();
        told.recv().unwrap()
    }

    fn arm(&self) {
        self.ask(Pager::arm).unwrap();
        while self.ask(|pager| pager.armed()).is_none() {
            std::thread::yield_now();
        }
    }

    /// The next that is no mere release.
    fn notice(&self) -> Notice {
        let notice = || self.notices.recv_timeout(Duration::from_secs(20)).unwrap();
        std::iter::repeat_with(notice).find(|notice| !matches!(notice, Notice::Released(_))).unwrap()
    }

    fn wait_idle(&self) {
        while !matches!(self.notices.recv_timeout(Duration::from_secs(20)).unwrap(), Notice::Idle { .. }) {}
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It ends when nobody can ask any more.
        let (jobs, _) = channel();
        self.jobs = jobs;
        self.wake.write(1).unwrap();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

fn serve(mut pager: Pager, wake: &EventFd, inbox: &Receiver<Job>, tell: &Sender<Notice>) -> Result<(), PagerError> {
    loop {
        let ids: Vec<_> = pager.children.iter().filter(|(_, child)| child.of != Of::Lost).map(|(id, _)| *id).collect();
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(pager.source().map(|uffd| PollFd::new(uffd.as_fd(), PollFlags::POLLIN)));
        fds.extend(ids.iter().map(|id| PollFd::new(pager.child(*id).unwrap().as_fd(), PollFlags::POLLIN)));
        let timeout = if pager.busy() { PollTimeout::ZERO } else { PollTimeout::NONE };
        poll(&mut fds, timeout).unwrap();
        let asked = fds[0].any().unwrap();
        drop(fds);
        pager.step()?;
        for id in ids {
            pager.serve_child(id)?;
        }
        if asked {
            wake.read().unwrap();
            loop {
                match inbox.try_recv() {
                    Ok(job) => job(&mut pager),
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
                }
            }
        }
        for (_, notice) in pager.notices() {
            let _ = tell.send(notice);
        }
    }
}

/// The source: RAM, and for each page the version that it is.
struct Machine {
    memory: Arc<GuestMemoryMmap>,
    ram: Ram,
    versions: Vec<AtomicU32>,
    /// Taken shared to write a page; taken alone, nothing runs.
    parked: RwLock<()>,
    regions: Vec<u64>,
    writes: AtomicU64,
}

impl Machine {
    fn new(regions: &[u64]) -> Self {
        let memory = testing::ram(regions);
        let ram = Ram::new(Arc::clone(&memory)).unwrap();
        let versions = (0..ram.bytes() / P).map(|_| AtomicU32::new(0)).collect();
        Self { memory, ram, versions, parked: RwLock::new(()), regions: regions.to_vec(), writes: AtomicU64::new(0) }
    }

    fn pages(&self) -> u32 {
        self.versions.len() as u32
    }

    fn address(&self, page: u32) -> GuestAddress {
        address(&self.regions, page)
    }

    /// Writes the next version of a page, word by word. One thread writes a page.
    fn write(&self, page: u32) {
        let running = self.parked.read().unwrap();
        let version = self.versions[page as usize].load(Ordering::Relaxed) + 1;
        for n in 0..512 {
            let at = GuestAddress(self.address(page).0 + n as u64 * 8);
            self.memory.store(word(page, version, n), at, Ordering::Relaxed).unwrap();
        }
        self.versions[page as usize].store(version, Ordering::Relaxed);
        self.writes.fetch_add(1, Ordering::Relaxed);
        drop(running);
    }

    fn check(&self, page: u32) {
        let version = self.versions[page as usize].load(Ordering::Relaxed);
        assert_holds(&self.memory, self.address(page), page, version, "the source");
    }
}

fn address(regions: &[u64], page: u32) -> GuestAddress {
    let mut offset = u64::from(page) * P;
    for (n, len) in regions.iter().enumerate() {
        if offset < *len {
            return GuestAddress(((n as u64) << 40) + offset);
        }
        offset -= len;
    }
    panic!("page {page} is beyond the memory");
}

fn assert_holds(memory: &GuestMemoryMmap, at: GuestAddress, page: u32, version: u32, whose: &str) {
    for n in 0..512 {
        let found: u64 = memory.load(GuestAddress(at.0 + n as u64 * 8), Ordering::Relaxed).unwrap();
        assert_eq!(found, word(page, version, n), "{whose}: page {page}, word {n}, version {version}");
    }
}

/// A fork: a private mapping, and what each page must be.
struct Fork {
    id: ChildId,
    memory: Arc<GuestMemoryMmap>,
    regions: Vec<u64>,
    versions: Vec<u32>,
    /// Kept, as a child process keeps it: its memory stays watched even if the page server goes.
    _uffd: Userfault,
}

/// What a child wrote itself.
const OWN: u32 = u32::MAX;

impl Fork {
    /// A child that waits, adopted.
    fn wait(machine: &Machine, served: &Served, id: ChildId) -> Self {
        Self::wait_for(machine, served, id, None)
    }

    /// One that waits for another child, or for the machine.
    fn wait_for(machine: &Machine, served: &Served, id: ChildId, parent: Option<ChildId>) -> Self {
        let memory = testing::private(machine.ram.memfd(), &machine.regions);
        let mappings = Mappings::of_private(&memory).unwrap();
        let uffd = open_child().unwrap();
        watch_child(&uffd, &mappings).unwrap();
        let handed = Userfault::of_another(uffd.try_clone().unwrap()).unwrap();
        served.ask(move |pager| pager.adopt(id, parent, handed, mappings)).unwrap();
        Self { id, memory, regions: machine.regions.clone(), versions: vec![], _uffd: uffd }
    }

    /// Forks `machine` for all of `children`. Returns how long it was paused.
    fn all(machine: &Machine, served: &Served, children: &mut [Self]) -> Duration {
        served.arm();
        let ids: Vec<_> = children.iter().map(|child| child.id).collect();
        let parked = machine.parked.write().unwrap();
        let start = Instant::now();
        served.ask(move |pager| pager.freeze(&ids)).unwrap();
        let paused = start.elapsed();
        let versions: Vec<_> = machine.versions.iter().map(|version| version.load(Ordering::Relaxed)).collect();
        drop(parked);
        for child in children {
            child.versions.clone_from(&versions);
        }
        paused
    }

    fn of(machine: &Machine, served: &Served, id: ChildId) -> Self {
        let mut child = [Self::wait(machine, served, id)];
        Self::all(machine, served, &mut child);
        let [child] = child;
        child
    }

    fn check(&self, page: u32) {
        let at = address(&self.regions, page);
        assert_holds(&self.memory, at, page, self.versions[page as usize], "a child");
    }

    fn write(&mut self, page: u32) {
        self.versions[page as usize] = OWN;
        for n in 0..512 {
            let at = GuestAddress(address(&self.regions, page).0 + n as u64 * 8);
            self.memory.store(word(page, OWN, n), at, Ordering::Relaxed).unwrap();
        }
    }

    /// Touches pages at random until told to stop, then looks at all of them.
    fn live(mut self, seed: u64, stop: &AtomicBool) -> Self {
        let mut random = Random(seed);
        while !stop.load(Ordering::Relaxed) {
            let page = random.below(self.versions.len() as u64) as u32;
            self.check(page);
            if random.below(4) == 0 {
                self.write(page);
            }
        }
        (0..self.versions.len() as u32).for_each(|page| self.check(page));
        self
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Has `writers` threads write, each its share of the pages, while `body` runs. Then checks the source.
fn under_writes(machine: &Machine, writers: u32, body: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let stop = &stop;
            scope.spawn(move || {
                let mut random = Random(u64::from(writer) + 77);
                while !stop.load(Ordering::Relaxed) {
                    let page = random.below(u64::from(machine.pages() / writers)) as u32 * writers + writer;
                    machine.write(page);
                }
            });
        }
        // Also when it fails.
        let _guard = StopOnDrop(&stop);
        body();
    });
    (0..machine.pages()).for_each(|page| machine.check(page));
}

#[test]
fn children_see_the_fork_point_and_nothing_later() {
    let machine = Machine::new(&[5 * 256 * P, 3 * 256 * P]);
    // A third of the pages are holes at the first fork.
    (0..machine.pages()).filter(|page| page % 3 != 0).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1 << 20);
    let rounds = 20;
    under_writes(&machine, 2, || {
        for round in 0..rounds {
            let first = round * 2;
            let mut children: Vec<_> = (first..first + 2).map(|id| Fork::wait(&machine, &served, id)).collect();
            Fork::all(&machine, &served, &mut children);
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let stop = &stop;
                let threads: Vec<_> =
                    children.into_iter().map(|child| scope.spawn(move || child.live(child_seed(), stop))).collect();
                // Until the source has gone on for a while.
                let target = machine.writes.load(Ordering::Relaxed) + 3000;
                while machine.writes.load(Ordering::Relaxed) < target {
                    std::thread::yield_now();
                }
                stop.store(true, Ordering::Relaxed);
                for thread in threads {
                    let child = thread.join().unwrap();
                    served.ask(move |pager| pager.forget(child.id));
                }
            });
            served.wait_idle();
        }
    });
    let counters = served.ask(|pager| pager.counters());
    println!("{counters:?}");
    assert!(counters.punched > 0 && counters.holes > 0 && counters.copied > 0 && counters.mapped > 0);
    assert_eq!((counters.stored, counters.shared), (0, 0));
}

fn child_seed() -> u64 {
    static SEED: AtomicU64 = AtomicU64::new(1);
    SEED.fetch_add(0x9e37, Ordering::Relaxed)
}

#[test]
fn generations_overlap_and_share_what_they_keep() {
    let machine = Machine::new(&[512 * P]);
    (0..machine.pages()).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1 << 20);
    let mut children = Vec::new();
    for id in 0..3 {
        children.push(Fork::of(&machine, &served, id));
    }
    // Three forks later, written once, stored once.
    machine.write(7);
    assert_eq!(served.ask(|pager| (pager.counters().stored, pager.generations.len())), (1, 3));
    under_writes(&machine, 2, || {
        for id in 3..40 {
            children.push(Fork::of(&machine, &served, id));
            let mut random = Random(id + 5);
            for _ in 0..200 {
                let child = random.below(children.len() as u64) as usize;
                let page = random.below(512) as u32;
                children[child].check(page);
                if random.below(8) == 0 {
                    children[child].write(page);
                }
            }
            if children.len() > 6 {
                let child = children.swap_remove(random.below(7) as usize);
                (0..512).for_each(|page| child.check(page));
                served.ask(move |pager| pager.forget(child.id));
                assert_eq!(served.ask(|pager| pager.generations.len()), children.len());
            }
        }
    });
    for child in children {
        (0..512).for_each(|page| child.check(page));
        served.ask(move |pager| pager.forget(child.id));
    }
    served.wait_idle();
    let counters = served.ask(|pager| pager.counters());
    assert_eq!((counters.stored, counters.shared), (0, 0));
}

#[test]
fn without_a_child_the_source_is_as_before() {
    let machine = Machine::new(&[256 * P]);
    (0..200).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1000);
    let child = Fork::of(&machine, &served, 1);
    child.check(3);
    machine.write(3);
    machine.write(220);
    child.check(3);
    child.check(220);
    let faults = served.ask(|pager| pager.counters().write_faults);
    assert!(faults > 0);
    drop(child);
    served.ask(|pager| pager.forget(1));
    served.wait_idle();
    let before = served.ask(|pager| pager.counters());
    (0..256).for_each(|page| machine.write(page));
    assert_eq!(served.ask(|pager| pager.counters()), before, "nothing waits any more");
    // And an arming that comes to nothing leaves nothing.
    served.arm();
    served.ask(Pager::abandon);
    served.wait_idle();
    (0..256).for_each(|page| machine.write(page));
    (0..256).for_each(|page| machine.check(page));
}

#[test]
fn what_is_armed_ahead_is_a_forks_and_is_let_go_with_the_last_who_waits() {
    let machine = Machine::new(&[1024 * P]);
    (0..1000).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 10_000);
    // Nobody waits: nothing to arm for, which is told, as it is when somebody has waited and gone before.
    served.ask(Pager::arm_ahead).unwrap();
    assert!(!served.ask(|pager| pager.busy()));
    served.wait_idle();
    drop(Fork::wait(&machine, &served, 1));
    served.ask(|pager| pager.forget(1));
    served.wait_idle();
    let mut waiting = [Fork::wait(&machine, &served, 1), Fork::wait(&machine, &served, 2)];
    served.ask(Pager::arm_ahead).unwrap();
    while served.ask(|pager| pager.busy()) {
        std::thread::yield_now();
    }
    // Written before the fork, once each time: nothing is kept.
    (0..1024).step_by(3).for_each(|page| machine.write(page));
    let ahead = served.ask(|pager| pager.counters());
    assert!(ahead.write_faults > 300 && ahead.holes > 0 && ahead.kept == 0, "{ahead:?}");
    let (first, second) = waiting.split_at_mut(1);
    Fork::all(&machine, &served, first);
    (0..1024).for_each(|page| machine.write(page));
    (0..1024).for_each(|page| first[0].check(page));
    // The first child ends, the second still waits: what it is forked from is later.
    served.ask(|pager| pager.forget(1));
    assert_eq!(served.notice(), Notice::Unshared);
    Fork::all(&machine, &served, second);
    (0..1024).step_by(2).for_each(|page| machine.write(page));
    (0..1024).for_each(|page| second[0].check(page));
    served.ask(|pager| pager.forget(2));
    served.wait_idle();
    let waiting = Fork::wait(&machine, &served, 3);
    served.ask(Pager::arm_ahead).unwrap();
    served.ask(|pager| pager.forget(3));
    served.wait_idle();
    drop(waiting);
    let before = served.ask(|pager| pager.counters());
    (0..1024).for_each(|page| machine.write(page));
    assert_eq!(served.ask(|pager| pager.counters()), before, "nothing waits any more");
}

/// A child's own pages, as it brings them: those that `versions` says are not as they were.
fn own_pages(child: &Fork) -> (File, u32) {
    let own: Vec<u32> = (0..child.versions.len() as u32).filter(|page| child.versions[*page as usize] == OWN).collect();
    let flags = nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
    let memfd = File::from(nix::sys::memfd::memfd_create(c"own", flags).unwrap());
    for (place, page) in own.iter().enumerate() {
        let mut bytes = [0; PAGE];
        child.memory.read_slice(&mut bytes, address(&child.regions, *page)).unwrap();
        memfd.write_all_at(&bytes, place as u64 * P).unwrap();
    }
    let numbers: Vec<u8> = own.iter().flat_map(|page| page.to_le_bytes()).collect();
    memfd.write_all_at(&numbers, own.len() as u64 * P).unwrap();
    nix::fcntl::fcntl(&memfd, nix::fcntl::FcntlArg::F_ADD_SEALS(snapshot::SEALS)).unwrap();
    (memfd, own.len() as u32)
}

/// Forks a child, which has stopped.
fn fork_child(machine: &Machine, served: &Served, child: &Fork, id: ChildId) -> Fork {
    let mut fork = Fork::wait_for(machine, served, id, Some(child.id));
    let (memfd, count) = own_pages(child);
    let parent = child.id;
    served.ask(move |pager| pager.freeze_child(parent, &memfd, count, &[id])).unwrap();
    fork.versions.clone_from(&child.versions);
    fork
}

#[test]
fn forks_of_forks_see_their_parents_fork_point_and_outlive_them() {
    let machine = Machine::new(&[700 * P, 324 * P]);
    (0..machine.pages()).filter(|page| page % 5 != 0).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1 << 20);
    under_writes(&machine, 2, || {
        for round in 0..8 {
            let id = round * 10;
            let mut child = Fork::of(&machine, &served, id);
            let mut random = Random(round + 3);
            let mut some = |child: &mut Fork, n| {
                for _ in 0..n {
                    let page = random.below(1024) as u32;
                    child.check(page);
                    child.write(page);
                }
            };
            some(&mut child, 100);
            let mut first = fork_child(&machine, &served, &child, id + 1);
            some(&mut child, 100);
            some(&mut first, 100);
            let second = fork_child(&machine, &served, &first, id + 2);
            let third = fork_child(&machine, &served, &child, id + 3);
            // Its parent's parent goes on, its parents end.
            some(&mut first, 50);
            assert_eq!(served.ask(|pager| (pager.generations.len(), pager.snapshots.len())), (1, 3));
            (0..1024).for_each(|page| first.check(page));
            served.ask(move |pager| pager.forget(id));
            drop(child);
            served.ask(move |pager| pager.forget(id + 1));
            drop(first);
            assert_eq!(served.ask(|pager| (pager.generations.len(), pager.snapshots.len())), (1, 3));
            (0..1024).rev().for_each(|page| second.check(page));
            served.ask(move |pager| pager.forget(id + 2));
            drop(second);
            // What only the second needed is gone.
            assert_eq!(served.ask(|pager| (pager.generations.len(), pager.snapshots.len())), (1, 1));
            (0..1024).for_each(|page| third.check(page));
            served.ask(move |pager| pager.forget(id + 3));
            served.wait_idle();
        }
    });
    assert_eq!(served.ask(|pager| (pager.points.len(), pager.counters().stored)), (0, 0));
}

#[test]
fn who_began_at_a_lost_fork_point_is_lost_and_who_has_other_memory_is_not() {
    let machine = Machine::new(&[256 * P]);
    (0..256).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 100);
    let child = Fork::of(&machine, &served, 1);
    let rebooted = Fork::of(&machine, &served, 2);
    let _fork = fork_child(&machine, &served, &child, 3);
    let _fork_of_rebooted = fork_child(&machine, &served, &rebooted, 4);
    served.ask(|pager| pager.set_independent(2));
    served.ask(|pager| {
        assert!(pager.freeze_child(2, &testing::memfd(0), 0, &[]).is_err());
        // Somebody else's fork point is not its to give up.
        pager.lose_disks(Some(3), 1, "x");
    });
    (0..256).for_each(|page| machine.write(page));
    let heard: Vec<_> =
        std::iter::from_fn(|| served.notices.recv_timeout(Duration::from_secs(20)).ok()).take(3).collect();
    let lost = Lost::StoreFull { limit: 100 };
    for id in [1, 3, 4] {
        assert!(heard.contains(&Notice::Lost(id, lost.clone())), "{heard:?}");
    }
    // Its disks are another matter.
    let why = "gone".to_owned();
    served.ask(|pager| pager.lose_disks(None, 2, "gone"));
    assert_eq!(served.notices.recv_timeout(Duration::from_secs(20)).unwrap(), Notice::Lost(2, Lost::Elsewhere { why }));
    for id in [3, 1, 4, 2] {
        served.ask(move |pager| pager.forget(id));
    }
    let heard: Vec<_> =
        std::iter::from_fn(|| served.notices.recv_timeout(Duration::from_secs(20)).ok()).take(6).collect();
    for point in 1..=4 {
        assert!(heard.contains(&Notice::Released(point)), "{heard:?}");
    }
}

#[test]
fn who_writes_page_after_page_waits_for_few_of_them() {
    let machine = Machine::new(&[2048 * P]);
    (0..2048).filter(|page| page % 100 != 99).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 10_000);
    let child = Fork::of(&machine, &served, 1);
    // Pages that the child has must be taken away one by one.
    (1000..1010).for_each(|page| child.check(page));
    let before = served.ask(|pager| pager.counters());
    (0..1024).for_each(|page| machine.write(page));
    let after = served.ask(|pager| pager.counters());
    let (waits, ahead) = (after.write_faults - before.write_faults, after.ahead - before.ahead);
    assert!(waits < 200 && ahead > 800, "{waits} waits, let through to {ahead} before");
    (0..2048).for_each(|page| child.check(page));
    // The same pages in no order: each waits.
    let before = after;
    (0..1024).map(|n| 1024 + n * 37 % 1024).for_each(|page| machine.write(page));
    let after = served.ask(|pager| pager.counters());
    assert_eq!(after.ahead, before.ahead);
    (0..2048).for_each(|page| child.check(page));
    served.ask(|pager| pager.forget(1));
}

#[test]
fn the_oldest_fork_goes_when_the_store_is_full_and_sees_nothing_new() {
    let machine = Machine::new(&[512 * P]);
    (0..512).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 100);
    let old = Fork::of(&machine, &served, 1);
    (0..512).for_each(|page| old.check(page));
    (0..60).for_each(|page| machine.write(page));
    let new = Fork::of(&machine, &served, 2);
    (0..512).for_each(|page| new.check(page));
    // 40 more fit; the next costs the older one its life.
    (60..101).for_each(|page| machine.write(page));
    let lost = Lost::StoreFull { limit: 100 };
    assert_eq!(served.notice(), Notice::Lost(1, lost.clone()));
    (60..101).for_each(|page| new.check(page));
    // Until it has ended, the lost one sees nothing that was written since: what changes is taken away from it first.
    (200..240).for_each(|page| machine.write(page));
    let resident = resident(&old);
    assert!(resident.iter().take(101).all(|there| !there), "what the source wrote is gone from the lost child");
    assert!(resident[200..240].iter().all(|there| !there));
    assert!(resident[300..500].iter().all(|there| *there), "what it did not is as it was");
    (300..500).for_each(|page| old.check(page));
    served.ask(|pager| pager.forget(1));
    // The last one too: then nothing is kept, and the source has not waited.
    (0..512).for_each(|page| machine.write(page));
    assert_eq!(served.notice(), Notice::Lost(2, lost));
    served.ask(|pager| pager.forget(2));
    served.wait_idle();
    (0..512).for_each(|page| machine.check(page));
}

/// Which pages a child has mapped, read off /proc/self/pagemap (bit 63).
fn resident(fork: &Fork) -> Vec<bool> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let start = fork.memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    let mut entries = vec![0; fork.versions.len() * 8];
    pagemap.read_exact_at(&mut entries, start / P * 8).unwrap();
    entries.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry) >> 63 != 0).collect()
}

#[test]
fn the_next_child_is_given_what_the_last_one_needed() {
    let machine = Machine::new(&[1024 * P]);
    (0..1024).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1000);
    let first = Fork::of(&machine, &served, 1);
    for page in [5, 300, 301, 900] {
        first.check(page);
    }
    let needed = served.ask(|pager| pager.children[&1].given.count());
    assert!((4..=48).contains(&needed), "{needed}");
    served.ask(|pager| pager.forget(1));
    served.wait_idle();
    let second = Fork::of(&machine, &served, 2);
    while served.ask(|pager| pager.busy()) {
        std::thread::yield_now();
    }
    let before = served.ask(|pager| pager.counters().child_faults);
    for page in [5, 300, 301, 900] {
        second.check(page);
    }
    assert_eq!(served.ask(|pager| pager.counters().child_faults), before, "nothing was waited for");
    drop(second);
    served.ask(|pager| pager.forget(2));
}

#[test]
fn what_earlier_children_have_written_is_told_when_all_is_given() {
    let machine = Machine::new(&[1024 * P]);
    (0..1024).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1000);
    let first = Fork::of(&machine, &served, 1);
    (0..512).step_by(20).for_each(|page| first.check(page));
    served.ask(|pager| (0..2).for_each(|_| pager.add_written(&[(7, 2)])));
    assert_eq!(served.ask(|pager| pager.to_write(1)), Some(vec![(7, 2)]));
    served.ask(|pager| pager.forget(1));
    served.wait_idle();
    let second = Fork::of(&machine, &served, 2);
    let told = loop {
        if let (Some(told), given) = served.ask(|pager| (pager.to_write(2), pager.children[&2].given.count())) {
            assert!(given >= 26, "{given}");
            break told;
        }
        std::thread::yield_now();
    };
    assert_eq!(told, [(7, 2)]);
    drop(second);
    served.ask(|pager| pager.forget(2));
}

#[test]
fn what_is_given_beforehand_may_have_been_overwritten() {
    let machine = Machine::new(&[64 * P]);
    (0..60).for_each(|page| machine.write(page));
    let served = Served::new(&machine.ram, 1000);
    let child = Fork::of(&machine, &served, 1);
    [17, 30, 40].into_iter().for_each(|page| machine.write(page));
    served.ask(|pager| pager.warm(1, 16, 48));
    let before = served.ask(|pager| pager.counters());
    // The page behind one that is written may be kept with it.
    assert!(before.copied >= 3 && before.copied + before.mapped == 44, "{before:?}");
    (16..60).for_each(|page| child.check(page));
    assert_eq!(served.ask(|pager| pager.counters().child_faults), before.child_faults, "nothing was waited for");
    // A hole is given when it is touched.
    child.check(60);
    assert_eq!(served.ask(|pager| pager.counters().zeroed), 1);
    drop(child);
    served.ask(|pager| pager.forget(1));
}

#[test]
fn who_touches_memory_too_early_or_brings_something_else_is_refused() {
    let machine = Machine::new(&[16 * P]);
    let served = Served::new(&machine.ram, 1000);
    let pipe = nix::unistd::pipe().unwrap().0;
    assert!(matches!(Userfault::of_another(pipe), Err(UffdError::Unexpected { .. })));
    let early = Fork::wait(&machine, &served, 1);
    std::thread::scope(|scope| {
        let memory = &early.memory;
        // It waits as long as its memory is watched.
        scope.spawn(move || memory.read_obj::<u64>(GuestAddress(0)));
        let notice = served.notices.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(notice, Notice::Lost(1, Lost::Unserved { .. })), "{notice:?}");
        early._uffd.unregister(&Mappings::of_private(memory).unwrap()).unwrap();
    });
    served.ask(|pager| pager.forget(1));
    assert!(matches!(served.ask(|pager| pager.freeze(&[])), Err(PagerError::Phase { .. })));
}
