mod layers;
mod model;
mod processes;
mod races;
mod reflinks;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;

const C: u64 = CLUSTER;

/// What an `on_lost` was told.
type Told = Arc<Mutex<Vec<(GenerationId, Lost)>>>;

/// A file that is frozen now and then, as a VM's block device would use it.
struct Source {
    file: File,
    freezer: Arc<Freezer>,
    told: Told,
}

impl Source {
    fn new(len: u64, limit: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Self::over(file, limit)
    }

    fn over(file: File, limit: u64) -> Self {
        let told = Told::default();
        let options = FreezerOptions { store: std::env::temp_dir(), limit, reflink: None };
        let freezer = Freezer::over_file(reopen_read_only(&file).unwrap(), options, tell(&told)).unwrap();
        Self { file, freezer, told }
    }

    fn write(&self, bytes: &[u8], offset: u64) {
        self.freezer.before_write(offset..offset + bytes.len() as u64);
        self.file.write_all_at(bytes, offset).unwrap();
    }

    fn fill(&self, value: u8, clusters: std::ops::Range<u64>) {
        self.write(&vec![value; ((clusters.end - clusters.start) * C) as usize], clusters.start * C);
    }

    fn resize(&self, len: u64) {
        let now = self.file.metadata().unwrap().len();
        self.freezer.before_write(len..now);
        self.file.set_len(len).unwrap();
    }

    fn punch(&self, offset: u64, len: u64) {
        self.freezer.before_write(offset..offset + len);
        files::punch(&self.file, offset, len).unwrap();
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn told(&self) -> Vec<Lost> {
        locked(&self.told).iter().map(|(_, why)| *why).collect()
    }
}

fn tell(told: &Told) -> OnLost {
    let told = Arc::clone(told);
    Box::new(move |id, why| locked(&told).push((id, why)))
}

fn open(generation: &Generation) -> FrozenFile {
    FrozenFile::open(generation.parts().unwrap()).unwrap()
}

fn all(bytes: &dyn Bytes) -> Vec<u8> {
    let mut content = vec![1; bytes.size().unwrap() as usize];
    bytes.read_at(&mut content, 0).unwrap();
    content
}

fn why(error: &io::Error) -> Option<Lost> {
    error.get_ref()?.downcast_ref().copied()
}

fn lost(frozen: &FrozenFile) -> Option<Lost> {
    let mut byte = [0];
    let told = frozen.read_at(&mut byte, 0).err().and_then(|e| why(&e));
    assert_eq!(frozen.lost(), told);
    told
}

#[test]
fn a_child_reads_what_was_there_at_the_fork_point() {
    let source = Source::new(10 * C + 1000, 1 << 30);
    source.fill(1, 0..8);
    source.write(&[9; 1000], 10 * C);
    let before = source.content();
    assert!(!source.freezer.needs(0..C));
    let generation = source.freezer.freeze().unwrap();
    let child = open(&generation);
    assert_eq!(child.size().unwrap(), 10 * C + 1000);
    assert_eq!(all(&child), before);
    assert!(source.freezer.needs(5 * C..5 * C + 1) && !source.freezer.needs(5 * C..5 * C));

    source.write(&[2; 10], 3 * C - 5);
    source.fill(3, 5..6);
    source.write(&[4], 9 * C + 77);
    source.write(&[5; 2000], 10 * C + 999);
    assert!(!source.freezer.needs(2 * C..4 * C) && source.freezer.needs(2 * C..4 * C + 1));
    assert_eq!(all(&child), before);
    let mut part = vec![7; 3 * C as usize];
    child.read_at(&mut part, 8 * C + 10).unwrap();
    assert_eq!(part[..(2 * C + 990) as usize], before[8 * C as usize + 10..]);
    assert!(part[(2 * C + 990) as usize..].iter().all(|byte| *byte == 0));
    // Clusters 2, 3, 5 and 10; the ninth was all zeroes.
    assert_eq!(source.freezer.usage(), Usage { generations: 1, stored: 4 * C });
    assert_eq!(source.told(), []);

    drop(generation);
    assert_eq!(lost(&child), Some(Lost::Ended));
    assert_eq!(source.freezer.usage(), Usage { generations: 0, stored: 0 });
    source.fill(9, 0..10);
    assert_eq!(source.freezer.usage().stored, 0);
}

#[test]
fn generations_share_what_is_stored() {
    let source = Source::new(8 * C, 1 << 30);
    source.fill(1, 0..8);
    let first = source.freezer.freeze().unwrap();
    source.fill(2, 0..2);
    let second = source.freezer.freeze().unwrap();
    let third = source.freezer.freeze().unwrap();
    assert_eq!(source.freezer.usage().stored, 2 * C);
    // Cluster 0 twice, 5 once for all three.
    source.fill(3, 0..1);
    source.fill(3, 5..6);
    assert_eq!(source.freezer.usage(), Usage { generations: 3, stored: 4 * C });
    let bytes = |generation: &Generation, cluster: u64| {
        let mut byte = [0];
        open(generation).read_at(&mut byte, cluster * C).unwrap();
        byte[0]
    };
    for (generation, expected) in [(&first, [1, 1, 1]), (&second, [2, 2, 1]), (&third, [2, 2, 1])] {
        assert_eq!([0, 1, 5].map(|cluster| bytes(generation, cluster)), expected);
    }
    let blocks = || source.freezer.store().reader().metadata().unwrap().blocks() * 512;
    assert_eq!(blocks(), 4 * C);
    drop(second);
    assert_eq!(blocks(), 4 * C);
    drop(third);
    // The second content of cluster 0.
    assert_eq!((blocks(), source.freezer.usage().stored), (3 * C, 3 * C));
    assert_eq!([0, 1, 5].map(|cluster| bytes(&first, cluster)), [1, 1, 1]);
    // What was given back is used again.
    source.fill(4, 6..8);
    assert_eq!((blocks(), source.freezer.usage().stored), (5 * C, 5 * C));
}

#[test]
fn at_the_limit_the_oldest_is_given_up_and_its_space_used() {
    let source = Source::new(16 * C, 4 * C);
    source.fill(1, 0..16);
    let first = source.freezer.freeze().unwrap();
    let child = open(&first);
    source.fill(2, 0..3);
    let second = source.freezer.freeze().unwrap();
    source.fill(3, 0..1);
    assert_eq!(lost(&child), None);
    let newer = open(&second);
    source.fill(3, 8..9);
    assert_eq!((lost(&child), first.lost()), (Some(Lost::Limit), Some(Lost::Limit)));
    assert_eq!(*locked(&source.told), [(first.id(), Lost::Limit)]);
    let mut byte = [0];
    for (cluster, expected) in [(0, 2), (1, 2), (8, 1), (9, 1)] {
        newer.read_at(&mut byte, cluster * C).unwrap();
        assert_eq!(byte[0], expected);
    }
    source.fill(4, 9..11);
    assert_eq!((second.lost(), source.freezer.usage().stored), (None, 4 * C));
    // One more than there is room for, in one write.
    source.fill(5, 0..16);
    assert_eq!((lost(&newer), source.told()), (Some(Lost::Limit), vec![Lost::Limit; 2]));
    assert!(source.content().iter().all(|byte| *byte == 5));
    drop((first, second));
    assert_eq!(source.freezer.usage(), Usage { generations: 0, stored: 0 });

    let none = Source::new(2 * C, 0);
    none.fill(1, 0..2);
    let generation = none.freezer.freeze().unwrap();
    assert_eq!(all(&open(&generation)), none.content());
    none.fill(2, 0..1);
    assert_eq!(lost(&open(&generation)), Some(Lost::Limit));
}

#[test]
fn a_store_that_fails_costs_generations_and_no_write() {
    for (errno, reason) in [(libc::ENOSPC, Lost::NoSpace), (libc::EDQUOT, Lost::NoSpace), (libc::EIO, Lost::Store)] {
        let source = Source::new(8 * C, 1 << 30);
        source.fill(1, 0..8);
        let generations: Vec<_> = (0..3).map(|_| source.freezer.freeze().unwrap()).collect();
        let faults = &source.freezer.store().faults;
        faults.set(Some((2, errno)));
        source.fill(2, 0..2);
        assert_eq!(source.told(), []);
        source.fill(2, 2..8);
        assert_eq!(source.told(), [reason; 3]);
        assert!(source.content().iter().all(|byte| *byte == 2));
        assert!(generations.iter().all(|generation| lost(&open(generation)) == Some(reason)));
        // The next one has nothing to do with it.
        faults.set(None);
        let next = source.freezer.freeze().unwrap();
        source.fill(3, 0..8);
        assert!(all(&open(&next)).iter().all(|byte| *byte == 2));
    }
}

#[test]
fn what_is_stored_for_one_who_ends_meanwhile_is_given_back() {
    for failing in [None, Some((0, libc::ENOSPC))] {
        let source = Source::new(4 * C, 1 << 30);
        source.fill(1, 0..4);
        let (generation, store) = (source.freezer.freeze().unwrap(), source.freezer.store());
        store.faults.set(failing);
        store.faults.meanwhile(move || drop(generation));
        source.fill(2, 0..1);
        assert_eq!(source.freezer.usage(), Usage { generations: 0, stored: 0 });
        assert_eq!(store.reader().metadata().unwrap().blocks(), 0);
    }
}

#[test]
fn what_cannot_be_read_cannot_be_preserved() {
    struct Unreadable;
    impl Bytes for Unreadable {
        fn size(&self) -> io::Result<u64> {
            Ok(4 * C)
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            buffer.fill(1);
            if offset < C { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        }
    }
    let told = Told::default();
    let options = FreezerOptions { store: std::env::temp_dir(), limit: 1 << 30, reflink: None };
    let freezer = Freezer::over(Arc::new(Unreadable), options, tell(&told)).unwrap();
    let generation = freezer.freeze().unwrap();
    freezer.before_write(C..4 * C);
    assert_eq!(generation.lost(), None);
    freezer.before_write(0..1);
    assert_eq!((generation.lost(), locked(&told).len()), (Some(Lost::Unreadable), 1));
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let source = Source::new(4 * C, 1 << 30);
    let generation = source.freezer.freeze().unwrap();
    let parts = || generation.parts().unwrap();
    let opened = |change: fn(&mut FrozenParts)| {
        let mut parts = parts();
        change(&mut parts);
        FrozenFile::open(parts)
    };
    assert!(opened(|_| {}).is_ok());
    assert!(matches!(opened(|parts| drop(parts.fds.pop())), Err(OpenError::Parts)));
    assert!(matches!(opened(|parts| parts.fds.clear()), Err(OpenError::Parts)));
    assert!(matches!(opened(|parts| parts.fds.swap(1, 2)), Err(OpenError::Part(_))));
    let preserved = |len, cluster| FrozenStateV1::Preserved { len, cluster };
    assert!(matches!(
        FrozenFile::open(FrozenParts { state: preserved(4 * C, 4096), ..parts() }),
        Err(OpenError::Cluster(4096))
    ));
    for len in [3 * C, 5 * C, u64::MAX] {
        let wrong = FrozenParts { state: preserved(len, C as u32), ..parts() };
        assert!(matches!(FrozenFile::open(wrong), Err(OpenError::Part(_))), "{len}");
    }
    let layer = FrozenParts { state: FrozenStateV1::Layer { len: 4 * C, cluster: C as u32 }, ..parts() };
    assert!(matches!(FrozenFile::open(layer), Err(OpenError::Parts)));
    let base = Arc::new(HostBytes::new(tempfile::tempfile().unwrap()));
    assert!(matches!(FrozenFile::open_layer(parts(), base), Err(OpenError::Parts)));
    // A child's descriptors are for reading.
    for fd in parts().fds {
        let file = File::from(fd);
        assert!(file.write_all_at(&[1], 0).is_err());
    }
}

#[test]
fn a_disk_that_nobody_writes_needs_no_generation() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[5; 3000], 0).unwrap();
    let frozen = FrozenFile::open(FrozenParts::of_read_only(&file).unwrap()).unwrap();
    assert_eq!((all(&frozen), frozen.lost()), (vec![5; 3000], None));
}

#[test]
fn a_child_can_outlive_its_source_and_keep_others_off_the_file() {
    let lock = |file: &File| {
        let whole = libc::flock { l_type: libc::F_WRLCK as libc::c_short, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).map(drop)
    };
    let named = tempfile::NamedTempFile::new().unwrap();
    let source = Source::over(named.reopen().unwrap(), 1 << 30);
    lock(&source.file).unwrap();
    source.fill(1, 0..4);
    let generation = source.freezer.freeze().unwrap();
    source.fill(2, 1..2);
    let child = open(&generation);
    let before = all(&child);
    assert_eq!(child.keep_writers_off().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // The source dies: nothing of it is left, and nobody ends the generation.
    std::mem::forget(generation);
    drop(source.file);
    child.keep_writers_off().unwrap();
    assert!(lock(&named.reopen().unwrap()).is_err());
    assert!(all(&child) == before);
}

/// What may happen to a source, by random numbers.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Punch(u64, u64),
    Resize(u64),
    Freeze,
    Drop(usize),
    Check(usize, u64, u64),
}

const MOST: u64 = 6 * C;

fn step() -> impl Strategy<Value = Step> {
    let near =
        prop_oneof![0..MOST, (0..6_u64, 0..3_u64).prop_map(|(cluster, more)| (cluster * C + more).saturating_sub(1))];
    let len = prop_oneof![1..100_u64, Just(C), 1..2 * C];
    prop_oneof![
        6 => (near.clone(), len.clone(), any::<u8>()).prop_map(|(at, len, value)| Step::Write(at, len, value)),
        1 => (near.clone(), len.clone()).prop_map(|(at, len)| Step::Punch(at, len)),
        1 => near.clone().prop_map(Step::Resize),
        2 => Just(Step::Freeze),
        1 => any::<usize>().prop_map(Step::Drop),
        4 => (any::<usize>(), near, len).prop_map(|(which, at, len)| Step::Check(which, at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn every_generation_stays_as_it_was(steps in prop::collection::vec(step(), 1..80), small in any::<bool>()) {
        let limit = if small { 5 * C } else { 1 << 30 };
        let source = Source::new(4 * C + 512, limit);
        source.write(&[1; 3 * C as usize], 100);
        let mut alive: Vec<(Generation, FrozenFile, Vec<u8>)> = Vec::new();
        for step in steps {
            match step {
                Step::Write(at, len, value) => source.write(&vec![value; len as usize], at),
                Step::Punch(at, len) => source.punch(at, len),
                Step::Resize(len) => source.resize(len),
                Step::Freeze => {
                    let generation = source.freezer.freeze().unwrap();
                    let child = open(&generation);
                    alive.push((generation, child, source.content()));
                }
                Step::Drop(which) if !alive.is_empty() => drop(alive.remove(which % alive.len())),
                Step::Check(which, at, len) if !alive.is_empty() => {
                    let (generation, child, content) = &alive[which % alive.len()];
                    let mut bytes = vec![1; len as usize];
                    match child.read_at(&mut bytes, at) {
                        Ok(()) => {
                            let mut expected = content[content.len().min(at as usize)..].to_vec();
                            expected.resize(len as usize, 0);
                            prop_assert!(bytes == expected);
                        }
                        Err(e) => prop_assert!(small && why(&e) == Some(Lost::Limit) && generation.lost().is_some()),
                    }
                }
                _ => {}
            }
        }
        let given_up = alive.iter().filter(|(generation, ..)| generation.lost().is_some()).count();
        // Given up oldest first.
        prop_assert!(alive[..given_up].iter().all(|(generation, ..)| generation.lost().is_some()));
        for (_, child, content) in &alive[given_up..] {
            prop_assert!(all(child) == *content);
        }
        alive.clear();
        prop_assert_eq!(source.freezer.usage(), Usage { generations: 0, stored: 0 });
    }
}
