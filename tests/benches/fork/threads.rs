//! What a first write after a fork costs a thread: the page server's whole share of it, without what a hypervisor adds to each page fault.
//! Beside a bare userfaultfd round trip, which is a thread's too.

use std::fs::File;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use civic_fork::hello::{Role, Visitor, socket};
use civic_fork::mappings::Mappings;
use civic_fork::pager::habits::Habits;
use civic_fork::pager::{open_child, watch_child};
use civic_fork::ram::Ram;
use civic_fork::source::{PATIENCE, PageServer, PageService, Process};
use civic_fork::uffd::Userfault;
use civic_fork::wire::{Listener, Wire};
use civic_tests::bare::vm::binary;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::baseline::PAGE;
use super::guest::Order;

const PAGES: usize = 16 << 10;
/// Time for the page server's own work, as a source that writes 100 MB/s leaves it.
const PERIOD: Duration = Duration::from_micros(40);
const SOON: Duration = Duration::from_secs(10);

fn map(memfd: &File, sharing: i32) -> Arc<GuestMemoryMmap> {
    let region = MmapRegionBuilder::new(PAGES * PAGE)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(memfd.try_clone().expect("a descriptor"), 0))
        .build()
        .expect("memory can be mapped");
    let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("it fits");
    Arc::new(GuestMemoryMmap::from_regions(vec![region]).expect("one region"))
}

/// Microseconds of each first write after a fork whose child lives and has touched nothing.
pub fn first_writes(order: Order) -> Vec<f64> {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(&socket(dir.path())).expect("a socket");
    let mut pager = Command::new(binary("civic-pager")).arg(dir.path()).spawn().expect("a page server can be started");
    let wire = listener.accept().expect("it connects");
    let visitor = Visitor::hear(&wire, SOON).expect("it says who it is");
    assert_eq!(visitor.hello.role, Role::PageServer);
    let memfd = File::from(memfd_create(c"bench-ram", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    memfd.set_len((PAGES * PAGE) as u64).expect("it can be so long");
    let memory = map(&memfd, libc::MAP_SHARED);
    let write = |page: usize| memory.write_obj(1_u64, GuestAddress((page * PAGE) as u64)).expect("it is memory");
    (0..PAGES).for_each(write);
    let ram = Arc::new(Ram::new(Arc::clone(&memory)).expect("it is one memfd"));
    let server = PageServer::begin(wire, visitor.process, ram, PAGES as u32, Habits::default(), PATIENCE, |_| ())
        .expect("it serves");

    let private = map(&memfd, libc::MAP_PRIVATE);
    let mappings = Mappings::of_private(&private).expect("it is private");
    let uffd = open_child().expect("userfaultfd can be had");
    watch_child(&uffd, &mappings).expect("memfds can be watched");
    let handed = Userfault::of_another(uffd.try_clone().expect("a descriptor")).expect("it is one");
    let ((link, _other), (_lifeline, there)) = (Wire::pair().expect("a pair"), Wire::pair().expect("a pair"));
    let itself = Arc::new(Process::of(&link).expect("this process"));
    server.adopt(1, &itself, &handed, mappings, &there).expect("it is adopted");
    drop(there);
    server.arm().expect("memory can be protected");
    server.freeze(vec![1]).expect("a fork");

    let mut micros = Vec::with_capacity(PAGES);
    let mut due = Instant::now();
    for n in 0..PAGES {
        while Instant::now() < due {
            std::hint::spin_loop();
        }
        due = Instant::now() + PERIOD;
        let page = n * order.stride() as usize % PAGES;
        let begun = Instant::now();
        write(page);
        micros.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    let report = server.report().expect("it tells");
    assert_eq!(report.counters.kept, PAGES as u64, "every page was written, and kept once");
    server.forget(1).expect("it forgets");
    drop(server);
    pager.wait().expect("it ends");
    micros
}
