//! Sources whose memory the host has put into huge pages, as it does where it may.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use civic_tests::bare::vm::{Setup, Vm};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::torn::{CPUS, PART, PARTS, counting, live_for_a_while, rounds};

const HUGE: usize = 2 << 20;

/// Has the kernel put that much of a VM's memory into huge pages, while it runs.
fn collapse(vm: &Vm, offset: usize, len: usize) {
    let fds = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().map(|fd| fd.unwrap().path());
    let memfd =
        |fd: &std::path::PathBuf| fs::read_link(fd).is_ok_and(|to| to.starts_with("/memfd:civic-ram (deleted)"));
    let fd = fds.into_iter().find(memfd).expect("its memory is there");
    let file = File::options().read(true).write(true).open(fd).unwrap();
    let size = NonZeroUsize::new(len + HUGE).unwrap();
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let place = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.unwrap();
    let start = NonZeroUsize::new((place.as_ptr() as usize).next_multiple_of(HUGE));
    let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED);
    // SAFETY: in place of a part of the mapping just made, which nothing else uses. It is never accessed.
    let map = unsafe { mmap(start, NonZeroUsize::new(len).unwrap(), access, flags, &file, offset as i64) }.unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    for within in (0..len).step_by(HUGE) {
        // -EAGAIN and -EBUSY: whoever writes there is in the way.
        let at = map.as_ptr().wrapping_byte_add(within);
        loop {
            // SAFETY: within this mapping; that changes how memory is kept, and nothing that is in it.
            let done = unsafe { libc::madvise(at, HUGE, libc::MADV_COLLAPSE) };
            if done == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "{}", nix::errno::Errno::last());
        }
    }
    // SAFETY: this function's own mapping, with what lies within it.
    unsafe { munmap(place, size.get()) }.unwrap();
}

/// Whether the kernel may make huge pages of a VM's memory.
fn may_be_huge(vm: &Vm) -> bool {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let mut lines = smaps.lines().skip_while(|line| !line.contains("/memfd:civic-ram"));
    let flags = lines.find(|line| line.starts_with("VmFlags:")).expect("its memory is mapped");
    !flags.split_whitespace().any(|flag| flag == "nh")
}

#[test]
fn they_are_split_before_a_fork_and_allowed_after_the_last() {
    let mut source = Setup::new(&counting()).cpus(CPUS).boot();
    rounds(&mut source, 2);
    for n in 0..4 {
        assert!(may_be_huge(&source));
        collapse(&source, PARTS as usize, PART as usize * usize::from(CPUS));
        let (report, mut children) = source.fork(vec![source.waiting(&format!("child{n}"))], false);
        let split = source.log().matches("huge pages of guest memory are split").count();
        assert_eq!(split, n + 1, "{}", source.log());
        assert!(!may_be_huge(&source));
        println!("{n}: {:?}", report.stages);
        live_for_a_while(&mut source, &mut children[0]);
        source.until("the page server to go", |vm| !vm.info().family.page_server);
    }
    rounds(&mut source, 2);
}
