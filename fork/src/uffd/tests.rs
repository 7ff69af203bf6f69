use super::*;
use crate::ram::Ram;
use crate::testing::{self, contents};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use vm_memory::{Bytes, GuestAddress};

const P: u64 = PAGE as u64;

fn offsets(faults: Vec<Fault>) -> Vec<u64> {
    faults.into_iter().map(|fault| fault.offset).collect()
}

fn open() -> Userfault {
    Userfault::open(FeatureFlags::MISSING_SHMEM).unwrap()
}

fn page(ram: &Ram, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    ram.memfd().read_exact_at(&mut bytes, page * P).unwrap();
    bytes
}

#[test]
fn says_which_feature_is_missing() {
    let future = FeatureFlags::from_bits_retain(1 << 62);
    match Userfault::open(FeatureFlags::MISSING_SHMEM | future) {
        Err(UffdError::Lacks { missing }) => assert_eq!(missing, future),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_not_registered_is_not_filled() {
    let ram = Ram::new(testing::ram(&[2 * P])).unwrap();
    let e = open().copy(ram.mappings(), 0, &contents(0)).unwrap_err();
    assert!(matches!(e, UffdError::Call { call: "UFFDIO_COPY", .. }), "{e:?}");
    assert_eq!(testing::populated(ram.memfd()), 0);
}

#[test]
fn a_copy_keeps_pages_that_are_there_and_passes_the_seam_of_regions() {
    let ram = Ram::new(testing::ram(&[3 * P, 3 * P])).unwrap();
    let uffd = open();
    uffd.register_missing(ram.mappings()).unwrap();
    testing::fill(ram.memfd(), [1, 5]);
    let new: Vec<u8> = (10..16).flat_map(contents).collect();
    uffd.copy(ram.mappings(), 0, &new).unwrap();
    for n in 0..6 {
        let expected = if n == 1 || n == 5 { n } else { 10 + n };
        assert_eq!(page(&ram, n), contents(expected), "page {n}");
    }
}

/// Has somebody wait for a page that then comes by `write(2)`, which tells no userfaultfd, and `answer`s that.
fn answer_too_late(answer: impl Fn(&Userfault, &Mappings, u64)) {
    let memory = testing::ram(&[2 * P]);
    let ram = Ram::new(Arc::clone(&memory)).unwrap();
    let uffd = open();
    uffd.register_missing(ram.mappings()).unwrap();
    let sleeper = thread::spawn(move || memory.read_obj::<[u8; 8]>(GuestAddress(P)).unwrap());
    let mut events = EventBuffer::new(4);
    let mut wait = [PollFd::new(uffd.0.as_fd(), PollFlags::POLLIN)];
    poll(&mut wait, PollTimeout::NONE).unwrap();
    assert_eq!(offsets(uffd.faults(ram.mappings(), &mut events).unwrap()), [P]);
    testing::fill(ram.memfd(), [1]);
    answer(&uffd, ram.mappings(), P);
    assert_eq!(sleeper.join().unwrap(), contents(1)[..8]);
    assert!(uffd.faults(ram.mappings(), &mut events).unwrap().is_empty());
}

#[test]
fn a_sleeper_wakes_even_if_its_page_came_another_way() {
    answer_too_late(|uffd, mappings, offset| uffd.zero(mappings, offset).unwrap());
    answer_too_late(|uffd, mappings, offset| {
        uffd.copy(mappings, offset, &contents(9)).unwrap();
    });
}

#[test]
fn a_zero_page_takes_a_page() {
    let ram = Ram::new(testing::ram(&[2 * P])).unwrap();
    let uffd = open();
    uffd.register_missing(ram.mappings()).unwrap();
    uffd.zero(ram.mappings(), P).unwrap();
    assert_eq!(testing::populated(ram.memfd()), P);
    assert_eq!(page(&ram, 1), [0; PAGE]);
}
