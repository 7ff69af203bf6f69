use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use nix::fcntl::{SpliceFFlags, splice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::testing::{self, contents};

const PATIENCE: Duration = Duration::from_secs(10);

/// RAM of these sizes with a whole memfd full of [`contents`] in huge pages, but for one that is a hole.
fn ram(sizes: &[u64], hole: u64) -> (Arc<GuestMemoryMmap>, Ram) {
    let memory = testing::ram(sizes);
    let ram = Ram::new(Arc::clone(&memory)).unwrap();
    let pages = |huge: u64| huge * HUGE / PAGE as u64..(huge + 1) * HUGE / PAGE as u64;
    for huge in (0..ram.bytes() / HUGE).filter(|huge| *huge != hole) {
        testing::fill(ram.memfd(), pages(huge));
        collapse(ram.memfd(), huge * HUGE);
    }
    (memory, ram)
}

/// Puts the huge page there together, as the kernel does by itself where the host lets it.
fn collapse(memfd: &File, offset: u64) {
    let reserved = Window::new(memfd).unwrap();
    let start = (reserved.reserved.0.as_ptr() as u64).next_multiple_of(HUGE);
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    map(start as _, HUGE as usize, access, flags, memfd.as_raw_fd(), offset).unwrap();
    advise(Hva(start), HUGE, libc::MADV_POPULATE_READ, "MADV_POPULATE_READ").unwrap();
    // -EAGAIN: the kernel has its own page lists to put in order first.
    let deadline = Instant::now() + PATIENCE;
    while let Err(e) = advise(Hva(start), HUGE, libc::MADV_COLLAPSE, "MADV_COLLAPSE") {
        assert!(Instant::now() < deadline, "{e:?}");
    }
}

/// Nobody writes, or whoever does goes on.
fn as_they_are(work: &mut dyn FnMut()) {
    work();
}

fn huge_pages(ram: &Ram) -> Vec<u64> {
    Window::new(ram.memfd()).unwrap().huge_pages(&PageMap::open().unwrap(), 0, ram.bytes()).unwrap()
}

/// Of the memfd, so that it is not looked at through page tables.
fn check(ram: &Ram, hole: u64) {
    for page in 0..ram.bytes() / PAGE as u64 {
        let mut bytes = [0; PAGE];
        std::os::unix::fs::FileExt::read_exact_at(ram.memfd(), &mut bytes, page * PAGE as u64).unwrap();
        let expected = if page * PAGE as u64 / HUGE == hole { [0; PAGE] } else { contents(page) };
        assert!(bytes == expected, "page {page:#x}");
    }
}

#[test]
fn all_are_split_and_nothing_changes() {
    // Neither piece is mapped where huge pages could be mapped, by the kernel's choice or by the second's offset.
    for sizes in [&[8 * HUGE][..], &[3 * HUGE + 5 * PAGE as u64, 5 * HUGE - 5 * PAGE as u64]] {
        let (_memory, ram) = ram(sizes, 2);
        let there: Vec<_> = [0, 1, 3, 4, 5, 6, 7].map(|huge| huge * HUGE).into();
        assert_eq!(huge_pages(&ram), there);
        let before = testing::populated(ram.memfd());
        assert_eq!(split(&ram, PATIENCE, &as_they_are).unwrap(), there.len());
        assert_eq!(huge_pages(&ram), [0u64; 0]);
        assert_eq!(testing::populated(ram.memfd()), before);
        check(&ram, 2);
        assert_eq!(split(&ram, PATIENCE, &as_they_are).unwrap(), 0);
    }
}

#[test]
fn a_page_goes_that_is_punched_out_of_what_was_one() {
    let (_memory, ram) = ram(&[2 * HUGE], 1);
    split(&ram, PATIENCE, &as_they_are).unwrap();
    // Held like this it would stay, and be zero.
    let (held, _pipe) = hold(ram.memfd(), 7 * PAGE as u64);
    let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(ram.memfd(), mode, 7 * PAGE as i64, PAGE as i64).unwrap();
    assert_eq!(testing::populated(ram.memfd()), HUGE - PAGE as u64);
    let mut bytes = [0; PAGE];
    nix::unistd::read(&held, &mut bytes).unwrap();
    assert_eq!(bytes, contents(7));
}

#[test]
fn writers_lose_nothing() {
    const PAGES: u64 = 8 * HUGE / PAGE as u64;
    let (memory, ram) = ram(&[8 * HUGE], 8);
    let (stop, gate) = (AtomicBool::new(false), Arc::new(RwLock::new(())));
    let held = Arc::clone(&gate);
    let still = move |work: &mut dyn FnMut()| {
        let _shut = held.write().unwrap();
        work();
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3u64)
            .map(|writer| {
                let (memory, stop, gate) = (&memory, &stop, &gate);
                scope.spawn(move || {
                    let mut random = testing::Random(writer + 1);
                    let mut written = vec![0u64; PAGES as usize];
                    let mut count = 0;
                    while !stop.load(Ordering::Relaxed) || count < 10_000 {
                        let _open = gate.read().unwrap();
                        for _ in 0..100 {
                            count += 1;
                            let page = random.below(PAGES);
                            let at = GuestAddress(page * PAGE as u64 + writer * 8);
                            let there: u64 = memory.load(at, Ordering::Relaxed).unwrap();
                            let last = std::mem::replace(&mut written[page as usize], count);
                            assert!(last == 0 || there == last, "page {page:#x}: {there} in place of {last}");
                            memory.store(count, at, Ordering::Relaxed).unwrap();
                        }
                    }
                    count
                })
            })
            .collect();
        for _ in 0..20 {
            assert!(split(&ram, PATIENCE, &still).unwrap() > 0);
            allow(&ram).unwrap();
            (0..8).for_each(|huge| collapse(ram.memfd(), huge * HUGE));
        }
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|writer| assert!(writer.join().unwrap() >= 10_000));
    });
}

#[test]
fn one_that_is_in_use_is_told_and_split_later() {
    let (_memory, ram) = ram(&[4 * HUGE], 4);
    let held = hold(ram.memfd(), 2 * HUGE + PAGE as u64);
    let e = split(&ram, Duration::from_millis(20), &as_they_are).unwrap_err();
    assert!(matches!(e, HugeError::Held { offset } if offset == 2 * HUGE), "{e:?}");
    std::thread::scope(|scope| {
        let later = scope.spawn(|| split(&ram, PATIENCE, &as_they_are));
        drop(held);
        assert_eq!(later.join().unwrap().unwrap(), 1);
    });
    check(&ram, 4);
}

/// Has a reference to a page, as direct I/O has, as long as this lives.
fn hold(memfd: &File, offset: u64) -> (OwnedFd, OwnedFd) {
    let (read, write) = nix::unistd::pipe().unwrap();
    let mut from = offset as i64;
    assert_eq!(splice(memfd.as_fd(), Some(&mut from), &write, None, PAGE, SpliceFFlags::empty()).unwrap(), PAGE);
    (read, write)
}

#[test]
fn settings_are_read() {
    assert_eq!(chosen("always within_size advise [never] deny force\n"), Some("never"));
    assert_eq!(chosen(""), None);
    assert!(is_another_size("hugepages-64kB") && !is_another_size("hugepages-2048kB") && !is_another_size("enabled"));
    assert!(usable(), "this host cannot show huge pages, or has other sizes of them for shared memory");
}
