//! The source survives whatever happens to its page server and its children: real processes, killed and stopped under load.
//!
//! The source is this process, its vCPUs are threads that write words to random places and know what each word must be. A child is
//! another process of this program (see [`child_process`]) that reads all over its memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use civic_fork::hello::{Hello, Role, VERSION, Visitor, socket};
use civic_fork::mappings::Mappings;
use civic_fork::pager::habits::Habits;
use civic_fork::pager::protocol::Response;
use civic_fork::pager::{FEATURES, Notice, watch_child};
use civic_fork::ram::{PAGE, Ram};
use civic_fork::source::{Event, PATIENCE, PageServer, PageService, Process, SourceError};
use civic_fork::uffd::Userfault;
use civic_fork::wire::{Listener, Wire, WireError};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const PAGES: u64 = 4096;
const WORDS: u64 = PAGES * 512;
const SOON: Duration = Duration::from_secs(20);
const WRITTEN: u64 = 1 << 63;

fn map(memfd: &File, sharing: i32) -> Arc<GuestMemoryMmap> {
    let region = MmapRegionBuilder::new((PAGES * PAGE as u64) as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(memfd.try_clone().unwrap(), 0))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap())
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// The source, with its listener for page servers and children.
struct Source {
    dir: tempfile::TempDir,
    listener: Listener,
    memory: Arc<GuestMemoryMmap>,
    ram: Arc<Ram>,
    /// Held for writing, no vCPU runs.
    parked: RwLock<()>,
    writes: AtomicU64,
    /// Longest that a write took, in microseconds.
    longest: AtomicU64,
}

impl Source {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&socket(dir.path())).unwrap();
        let memfd = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        memfd.set_len(PAGES * PAGE as u64).unwrap();
        let memory = map(&memfd, libc::MAP_SHARED);
        let ram = Arc::new(Ram::new(Arc::clone(&memory)).unwrap());
        // Every eighth page stays a hole.
        for word in (0..WORDS).filter(|word| word / 512 % 8 != 0) {
            memory.store(word, GuestAddress(word * 8), Ordering::Relaxed).unwrap();
        }
        let (writes, longest) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { dir, listener, memory, ram, parked: RwLock::new(()), writes, longest }
    }

    fn accept(&self, role: &Role) -> (Wire, Process) {
        let wire = self.listener.accept().unwrap();
        let Visitor { hello, process } = Visitor::hear(&wire, SOON).unwrap();
        assert_eq!(hello, Hello { version: VERSION, role: role.clone() });
        (wire, process)
    }

    fn page_server(&self) -> (PageServer, Child, Receiver<Event>) {
        let pager = env!("CARGO_BIN_EXE_civic-pager");
        let child = Command::new(pager).arg(self.dir.path()).spawn().unwrap();
        let (wire, process) = self.accept(&Role::PageServer);
        let (tell, events) = channel();
        let event = move |event| drop(tell.send(event));
        (
            PageServer::begin(
                wire,
                process,
                Arc::clone(&self.ram),
                PAGES as u32 * 2,
                Habits::default(),
                PATIENCE,
                event,
            )
            .unwrap(),
            child,
            events,
        )
    }

    /// Runs a child that waits, and has the page server adopt it.
    fn child(&self, server: &PageServer, id: u64) -> ForkedChild {
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process", "--nocapture"])
            .env("CIVIC_TEST_SOURCE", self.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (link, watched) = self.accept(&Role::Child("child".into()));
        link.send(&true, &[self.ram.memfd().as_fd()]).unwrap();
        let (mappings, fds) = link.receive::<Mappings>(SOON).unwrap();
        let [uffd, lifeline]: [_; 2] = fds.try_into().unwrap();
        let uffd = Userfault::of_another(uffd).unwrap();
        server.adopt(id, &Arc::new(watched), &uffd, mappings, &Wire::from(lifeline)).unwrap();
        ForkedChild { process, link }
    }

    fn fork(&self, server: &PageServer, ids: Vec<u64>) -> Result<(), SourceError> {
        server.arm()?;
        let parked = self.parked.write().unwrap();
        let done = server.freeze(ids);
        drop(parked);
        done.map(drop)
    }

    /// What a vCPU does.
    fn write(&self, seed: u64, stop: &AtomicBool) {
        let mut random = seed;
        while !stop.load(Ordering::Relaxed) {
            let running = self.parked.read().unwrap();
            let word = next(&mut random) % WORDS;
            let start = Instant::now();
            self.memory.store(word | WRITTEN, GuestAddress(word * 8), Ordering::Relaxed).unwrap();
            self.longest.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
            self.writes.fetch_add(1, Ordering::Relaxed);
            drop(running);
        }
    }

    /// Every word is what it was or what was written to it.
    fn check(&self) {
        for word in 0..WORDS {
            let found: u64 = self.memory.load(GuestAddress(word * 8), Ordering::Relaxed).unwrap();
            let untouched = if word / 512 % 8 == 0 { 0 } else { word };
            assert!(found == untouched || found == word | WRITTEN, "word {word} of the source is {found:#x}");
        }
    }

    /// Runs vCPUs while `body` does, then checks memory.
    fn under_load<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stop = AtomicBool::new(false);
        let result = std::thread::scope(|scope| {
            for seed in [0x9e37_79b9_7f4a_7c15, 88_172_645_463_325_252] {
                let stop = &stop;
                scope.spawn(move || self.write(seed, stop));
            }
            let _guard = Stop(&stop);
            body()
        });
        self.check();
        result
    }

    fn wait_for_writes(&self, count: u64) {
        let target = self.writes.load(Ordering::Relaxed) + count;
        let start = Instant::now();
        while self.writes.load(Ordering::Relaxed) < target {
            assert!(start.elapsed() < SOON, "the source stands still");
            std::thread::yield_now();
        }
    }
}

struct ForkedChild {
    process: Child,
    link: Wire,
}

impl ForkedChild {
    fn go(&self) {
        self.link.send(&true, &[]).unwrap();
    }

    /// What it says of its end: none if it was killed.
    fn ended(mut self) -> Option<String> {
        let word = self.link.receive::<String>(SOON).ok().map(|(why, _)| why);
        let _ = self.process.wait();
        word
    }
}

impl Drop for ForkedChild {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Not a test: what a child does, in a process of its own.
#[test]
fn child_process() {
    let Some(source) = std::env::var_os("CIVIC_TEST_SOURCE") else { return };
    let link = Wire::connect(&socket(Path::new(&source))).unwrap();
    link.send(&Hello { version: VERSION, role: Role::Child("child".into()) }, &[]).unwrap();
    let (_, fds) = link.receive::<bool>(SOON).unwrap();
    let memfd = File::from(fds.into_iter().next().unwrap());
    let memory = map(&memfd, libc::MAP_PRIVATE);
    let mappings = Mappings::of_private(&memory).unwrap();
    let uffd = Userfault::open(FEATURES).unwrap();
    watch_child(&uffd, &mappings).unwrap();
    let (here, there) = Wire::pair().unwrap();
    let handed = uffd.try_clone().unwrap();
    link.send(&mappings, &[handed.as_fd(), there.as_fd()]).unwrap();
    drop((handed, there));
    link.receive::<bool>(SOON).unwrap();
    let end = std::thread::spawn(move || {
        let why = match here.receive::<Response>(Duration::from_secs(120)) {
            Ok((Response::Failed(why), _)) => why,
            Ok((other, _)) => format!("{other:?}"),
            Err(WireError::Closed) => "the page server has died".into(),
            Err(e) => e.to_string(),
        };
        let _ = link.send(&why, &[]);
        std::process::exit(0);
    });
    let mut random = 0x2545_f491_4f6c_dd1d;
    // The value of a word at the first touch must stay: a torn or later page would change it.
    let mut seen = vec![0u64; PAGES as usize];
    loop {
        if end.is_finished() {
            return;
        }
        let page = next(&mut random) % PAGES;
        let word = page * 512 + 1;
        let found: u64 = memory.load(GuestAddress(word * 8), Ordering::Relaxed).unwrap();
        let expected = seen[page as usize];
        if expected != 0 && expected != found {
            eprintln!("a child's page {page} changed from {expected:#x} to {found:#x}");
            std::process::abort();
        }
        seen[page as usize] = found;
    }
}

#[test]
fn the_source_outlives_its_page_server() {
    let source = Source::new();
    let rounds = 40;
    let mut seed = 12345;
    let mut longest = Duration::ZERO;
    source.under_load(|| {
        for round in 0..rounds {
            let (server, mut process, events) = source.page_server();
            let child = source.child(&server, 1);
            source.fork(&server, vec![1]).unwrap();
            child.go();
            source.wait_for_writes(next(&mut seed) % 3000);
            let pid = Pid::from_raw(process.id() as i32);
            let stopped = round % 8 == 7;
            source.longest.store(0, Ordering::Relaxed);
            kill(pid, if stopped { Signal::SIGSTOP } else { Signal::SIGKILL }).unwrap();
            let start = Instant::now();
            // It is over when the source says so; then it writes as if nothing had ever been.
            while !matches!(events.recv_timeout(SOON).unwrap(), Event::Ended(_)) {}
            longest = longest.max(start.elapsed());
            assert!(start.elapsed() < Duration::from_secs(1), "the source was held up for {:?}", start.elapsed());
            source.wait_for_writes(1000);
            assert!(matches!(server.arm(), Err(SourceError::Ended(_))));
            assert_eq!(child.ended().as_deref(), Some("the page server has died"));
            process.wait().unwrap();
        }
    });
    println!("{rounds} page servers killed or stopped; the source waited for {longest:?} at most");
}

#[test]
fn children_die_and_the_source_forgets_them() {
    let source = Source::new();
    source.under_load(|| {
        let (server, mut process, events) = source.page_server();
        for round in 0..20 {
            let ids: Vec<u64> = (round * 3..round * 3 + 3).collect();
            let mut children: Vec<_> = ids.iter().map(|id| source.child(&server, *id)).collect();
            source.fork(&server, ids).unwrap();
            children.iter().for_each(ForkedChild::go);
            source.wait_for_writes(500);
            for child in &mut children {
                child.process.kill().unwrap();
            }
            // The last one takes the generation with it.
            loop {
                if matches!(events.recv_timeout(SOON).unwrap(), Event::Notice(Notice::Idle { .. })) {
                    break;
                }
            }
            let report = server.report().unwrap();
            assert_eq!((report.counters.stored, report.counters.shared, report.generations.len()), (0, 0, 0));
        }
        // A child that dies while it waits is no loss.
        let waiting = source.child(&server, 1000);
        drop(waiting);
        while !matches!(events.recv_timeout(SOON).unwrap(), Event::Notice(Notice::Gone(1000))) {}
        drop(server);
        assert!(process.wait().unwrap().success());
    });
}

#[test]
fn children_outlive_their_source() {
    let source = Source::new();
    let (server, mut process, _events) = source.page_server();
    let mut child = source.child(&server, 1);
    source.fork(&server, vec![1]).unwrap();
    child.go();
    drop(server);
    // It goes on touching its memory, and would end if somebody did not answer.
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.process.try_wait().unwrap().is_none());
    assert!(process.try_wait().unwrap().is_none());
    drop(child);
    assert!(process.wait().unwrap().success());
}
