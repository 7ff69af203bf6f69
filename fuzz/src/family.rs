//! What the processes of a fork say to each other: introductions, hellos, requests and answers as datagrams, and snapshots, with what is made
//! of each by whoever hears it. What a live page server and a live source do is attacked by `tests/bare/hostile.rs`.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use civic_fork::hello::{Hello, Role, VERSION, Visitor};
use civic_fork::mappings::{Hva, Mapping, Mappings};
use civic_fork::pager::habits::{Habits, Runs, WRITTEN};
use civic_fork::pager::protocol::{Request, Response};
use civic_fork::pager::snapshot::{SEALS, Snapshot};
use civic_fork::ram::PAGE;
use civic_fork::wire::Wire;
use civic_vmm::fork::{ToChild, ToSource};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vm_memory::VolatileMemory;

/// Of the memory that snapshots and runs of pages are of.
const PAGES: usize = 64;
/// It has come already, or does not come.
const AT_ONCE: Duration = Duration::ZERO;

/// A connection on which these datagrams have come, and the end that said them.
fn said<'a>(datagrams: impl IntoIterator<Item = &'a [u8]>) -> (Wire, Wire) {
    let (here, there) = Wire::pair().expect("the host has sockets");
    for datagram in datagrams.into_iter().filter(|datagram| !datagram.is_empty()) {
        let _ = nix::unistd::write(there.as_fd(), datagram);
    }
    (here, there)
}

/// What comes of a datagram. What is understood means the same when it is said again.
fn understood<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let (here, _there) = said([bytes]);
    let (message, fds) = here.receive::<T>(AT_ONCE).ok()?;
    assert!(fds.is_empty());
    let again = postcard::to_stdvec(&message).expect("what was said can be said");
    assert_eq!(postcard::from_bytes::<T>(&again).as_ref(), Ok(&message));
    Some(message)
}

/// Mappings that were understood lead to every page, and nowhere else.
fn check_mappings(mappings: &Mappings) {
    let bytes = mappings.bytes();
    assert_eq!(bytes % PAGE as u64, 0);
    let pieces: Vec<_> = mappings.iter().collect();
    assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), bytes);
    let spans: Vec<_> = mappings.spans(0, u64::MAX).collect();
    assert_eq!(spans, pieces.iter().map(|piece| (piece.start, piece.len)).collect::<Vec<_>>());
    for piece in pieces {
        assert!(mappings.offset_of(piece.start).is_some_and(|offset| offset < bytes));
        for (start, len) in mappings.spans(piece.offset + PAGE as u64 - 1, 2) {
            assert!(len <= 2 && mappings.offset_of(start).is_some());
        }
    }
}

/// Runs that a child may lie about: what the next ones are given is bounded, and of their memory.
fn check_written(habits: Habits, runs: &Runs) {
    let mut habits = habits.within(PAGES as u32);
    habits.add_written(runs, PAGES);
    habits.add_written(runs, PAGES);
    let expected = habits.to_write(PAGES);
    let pages: Vec<u32> = expected.iter().flat_map(|&(first, len)| first..first + len).collect();
    assert!(pages.len() <= WRITTEN as usize && pages.iter().all(|page| (*page as usize) < PAGES));
    let asked = |page: u32| runs.iter().any(|&(first, len)| (first..first.saturating_add(len)).contains(&page));
    assert!(pages.iter().all(|page| asked(*page)), "{expected:?} of {runs:?}");
}

fn request(bytes: &[u8]) {
    match understood::<Request>(bytes) {
        Some(Request::Begin { mappings, habits, .. }) => {
            check_mappings(&mappings);
            check_written(habits, &vec![(0, u32::MAX), (u32::MAX, 1)]);
        }
        Some(Request::Adopt { mappings, .. }) => check_mappings(&mappings),
        Some(Request::Wrote { runs }) => check_written(Habits::default(), &runs),
        _ => {}
    }
}

/// The first word of somebody who connects, introduced or not.
fn hello(bytes: &[u8]) {
    // The first byte says where the second datagram begins.
    let Some((at, rest)) = bytes.split_first() else { return };
    let (first, second) = rest.split_at(usize::from(*at).min(rest.len()));
    let (here, _there) = said([first, second]);
    if let Ok(visitor) = Visitor::hear(&here, AT_ONCE) {
        // Nobody introduced it: an introduction has descriptors.
        let hello = if first.is_empty() { second } else { first };
        assert_eq!(postcard::from_bytes::<Hello>(hello), Ok(visitor.hello));
    }
}

/// A fork's own pages: how many it says there are, what it does not do about them, and their numbers.
fn snapshot(bytes: &[u8]) {
    let [count, lacks, numbers @ ..] = bytes else { return };
    let (whole, sealed) = (lacks & 1 == 0, lacks & 2 == 0);
    let there = usize::from(*count).min(PAGES + 1);
    let memfd = memfd_create(c"snapshot", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
    let mut memfd = File::from(memfd.expect("the host has memory"));
    let content: Vec<u8> = (0..there).flat_map(|place| [place as u8; PAGE]).chain(numbers.iter().copied()).collect();
    memfd.write_all(&content).expect("the host has memory");
    if !whole {
        memfd.set_len(content.len() as u64 + PAGE as u64 * u64::from(*lacks)).expect("the host has memory");
    }
    if sealed {
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(SEALS)).expect("it is new");
    }
    let count = u32::from(*count);
    let Ok(snapshot) = Snapshot::open(&memfd, count, PAGES, 0) else { return };
    assert!(sealed || count == 0, "somebody can change it");
    assert_eq!(snapshot.count(), count);
    let mut places = BTreeSet::new();
    for page in 0..PAGES as u32 {
        let found = snapshot.page(page);
        assert_eq!(found.is_some(), snapshot.has(page));
        if let Some(found) = found {
            places.insert(found.get_ref::<u8>(0).expect("it has a first byte").load());
        }
    }
    assert_eq!(places.len(), count as usize, "two pages have one place");
}

/// One message, or one snapshot: the first byte says which.
pub fn run(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 6 {
        0 => hello(bytes),
        1 => {
            if let Some(ToSource::Ready { mappings, .. }) = understood(bytes) {
                check_mappings(&mappings);
            }
        }
        2 => drop(understood::<ToChild>(bytes)),
        3 => request(bytes),
        4 => drop(understood::<Response>(bytes)),
        _ => snapshot(bytes),
    }
}

/// One of each that is what it should be.
pub fn seeds() -> Vec<Vec<u8>> {
    fn seed(kind: u8, message: &impl Serialize) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(postcard::to_stdvec(message).expect("a message can be said"));
        bytes
    }
    let piece = |start, offset| Mapping { start: Hva(start), len: 2 * PAGE as u64, offset };
    let mappings = Mappings::new(vec![piece(1 << 20, 0), piece(1 << 32, 2 * PAGE as u64)]).expect("they cover it");
    let habits = Habits { given: vec![(0, 3)], written: [vec![(1, 2)], vec![(2, 1)]] };
    let mut introduced = vec![0, 20];
    introduced.extend(b"civic-jail 1 7 pager");
    let said = |bytes: &[u8]| {
        let mut hello = vec![0, bytes.len() as u8];
        hello.extend(bytes);
        hello
    };
    let greeting = |role| said(&postcard::to_stdvec(&Hello { version: VERSION, role }).expect("it can be said"));
    let mut pages = vec![5, 2, 0];
    pages.extend([7u32, 3].iter().flat_map(|number| number.to_le_bytes()));
    vec![
        introduced,
        greeting(Role::PageServer),
        greeting(Role::Child("web-1".into())),
        seed(1, &ToSource::Ready { mappings: mappings.clone(), mirrors: vec![("net0".into(), 2)] }),
        seed(1, &ToSource::Failed { why: "it cannot".into() }),
        seed(2, &ToChild::Welcome { config: "{}".into() }),
        seed(3, &Request::Begin { mappings: mappings.clone(), limit: 9, habits }),
        seed(3, &Request::Adopt { child: 3, mappings }),
        seed(3, &Request::FreezeChild { children: vec![1, 2], pages: 4 }),
        seed(3, &Request::Wrote { runs: vec![(1, 2), (9, 60)] }),
        seed(4, &Response::Expected(vec![(4, 4)])),
        seed(4, &Response::Refused("no".into())),
        pages,
    ]
}
