//! Overlays, and children of children.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::testing::Random;

fn overlay(below: impl Bytes + 'static) -> Overlay {
    Overlay::new(Arc::new(below), &std::env::temp_dir()).unwrap()
}

fn numbered(len: u64) -> HostBytes {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..len).map(|n| (n / 512 % 251 + 1) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    HostBytes::new(file)
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
}

const LEN: u64 = 3 * C + 1536;

fn change() -> impl Strategy<Value = Change> {
    let place = (0..LEN, prop_oneof![1..600_u64, Just(4096), 1..2 * C]);
    let place = prop_oneof![place.clone(), place.prop_map(|(at, len)| (at / 4096 * 4096, len))];
    let place = place.prop_map(|(at, len)| (at, len.min(LEN - at)));
    prop_oneof![
        4 => (place.clone(), any::<u8>()).prop_map(|((at, len), value)| Change::Write(at, len, value)),
        1 => place.clone().prop_map(|(at, len)| Change::Zero(at, len)),
        1 => place.prop_map(|(at, len)| Change::Discard(at, len)),
    ]
}

proptest! {
    #[test]
    fn an_overlay_is_a_disk(changes in prop::collection::vec(change(), 1..30), reads in prop::collection::vec((0..LEN, 0..2 * C), 5)) {
        let below = numbered(LEN);
        let before = all(&below);
        let mut model = before.clone();
        let below_file = below.file().try_clone().unwrap();
        let overlay = overlay(below);
        for change in changes {
            match change {
                Change::Write(at, len, value) => {
                    overlay.write_at(&vec![value; len as usize], at).unwrap();
                    model[at as usize..(at + len) as usize].fill(value);
                }
                Change::Zero(at, len) => {
                    overlay.zero(at, len).unwrap();
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Change::Discard(at, len) => {
                    overlay.discard(at, len).unwrap();
                    let now = all(&overlay);
                    let range = at as usize..(at + len) as usize;
                    // Each byte in it is as it was, or zero.
                    prop_assert!(now[range.clone()].iter().zip(&model[range.clone()]).all(|(now, was)| now == was || *now == 0));
                    model[range.clone()].copy_from_slice(&now[range]);
                }
            }
        }
        prop_assert!(all(&overlay) == model);
        for (at, len) in reads {
            let mut bytes = vec![1; len as usize];
            overlay.read_at(&mut bytes, at).unwrap();
            let mut expected = model[at as usize..].to_vec();
            expected.resize(len.max(LEN) as usize, 0);
            prop_assert!(bytes == expected[..len as usize]);
        }
        prop_assert!(all(&HostBytes::new(below_file)) == before);
    }
}

#[test]
fn nothing_is_written_past_the_end() {
    let overlay = overlay(numbered(1024));
    for (at, len) in [(1024, 1), (1000, 25), (u64::MAX, 1)] {
        assert!(overlay.write_at(&vec![1; len as usize], at).is_err());
        assert!(overlay.zero(at, len).is_err());
    }
    overlay.discard(0, 1 << 40).unwrap_err();
    overlay.discard(512, 512).unwrap();
    overlay.write_at(&[1; 24], 1000).unwrap();
    assert_eq!(overlay.size().unwrap(), 1024);
}

#[test]
fn zeroes_give_space_back() {
    let overlay = overlay(numbered(4 * C));
    overlay.write_at(&[1; 2 * C as usize], 0).unwrap();
    let parts = overlay.parts().unwrap();
    let file = HostBytes::new(parts.fds[0].try_clone().unwrap().into());
    assert_eq!(file.file().metadata().unwrap().blocks() * 512, 2 * C);
    overlay.discard(100, C).unwrap();
    assert!(file.file().metadata().unwrap().blocks() * 512 <= C + 4096);
    overlay.zero(0, 4 * C).unwrap();
    assert_eq!(file.file().metadata().unwrap().blocks(), 0);
    assert!(all(&overlay).iter().all(|byte| *byte == 0));
}

#[test]
fn writers_of_one_block_do_not_undo_each_other() {
    for round in 0..30 {
        let overlay = overlay(numbered(4 * C));
        // Each thread has every fourth sector of its own.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let overlay = &overlay;
                scope.spawn(move || {
                    let mut random = Random(thread + 4 * round + 1);
                    for _ in 0..300 {
                        let sector = random.below(4 * C / 2048) * 4 + thread;
                        if thread == 3 {
                            overlay.zero(sector * 512, 512).unwrap();
                        } else {
                            overlay.write_at(&[200 + thread as u8; 512], sector * 512).unwrap();
                        }
                        let mut bytes = [0; 512];
                        overlay.read_at(&mut bytes, sector * 512).unwrap();
                        assert_eq!(bytes, if thread == 3 { [0; 512] } else { [200 + thread as u8; 512] });
                    }
                });
            }
        });
        let expected = |sector: usize| ((sector % 251 + 1) as u8, [200, 201, 202, 0][sector % 4]);
        for (sector, bytes) in all(&overlay).as_chunks::<512>().0.iter().enumerate() {
            let (before, after) = expected(sector);
            assert!(*bytes == [before; 512] || *bytes == [after; 512], "sector {sector}");
        }
    }
}

/// A grandchild reads its grandparent's disk through what its parent wrote over it, while both write on.
#[test]
fn a_child_of_a_child_reads_all_layers() {
    let source = Source::new(8 * C, 1 << 30);
    source.fill(1, 0..8);
    let first = source.freezer.freeze().unwrap();
    let child = Arc::new(overlay(open(&first)));
    source.fill(2, 0..2);
    child.write_at(&[3; 5000], 3 * C + 100).unwrap();
    child.write_at(&[3; 512], 5 * C).unwrap();
    child.zero(6 * C, C).unwrap();
    let told = Told::default();
    let options = FreezerOptions { store: std::env::temp_dir(), limit: 1 << 30, reflink: None };
    let freezer = Freezer::over(Arc::clone(&child) as _, options, tell(&told)).unwrap();
    let write = |bytes: &[u8], at: u64| {
        freezer.before_write(at..at + bytes.len() as u64);
        child.write_at(bytes, at).unwrap();
    };
    let expected = all(&*child);
    let second = freezer.freeze().unwrap();
    // As another process would: everything from parts.
    let grandchild = || {
        let view = OverlayView::open(child.parts().unwrap(), Arc::new(open(&first))).unwrap();
        overlay(FrozenFile::open_layer(second.parts().unwrap(), Arc::new(view)).unwrap())
    };
    let early = grandchild();
    early.write_at(&[9; 100], 7 * C).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(5);
            for value in 0..2000 {
                write(&[value as u8; 700], random.below(7 * C - 700));
                source.write(&[value as u8; 700], random.below(8 * C - 700));
            }
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            assert!(all(&grandchild()) == expected);
        }
    });
    assert_ne!(all(&*child), expected);
    let mut with_own = expected.clone();
    with_own[7 * C as usize..][..100].fill(9);
    assert!(all(&early) == with_own);
    let mut late = vec![0; C as usize];
    grandchild().read_at(&mut late, 5 * C).unwrap();
    assert_eq!(late, expected[5 * C as usize..6 * C as usize]);
    // What its grandparent gives up is lost to it too.
    drop(first);
    early.read_at(&mut late, 5 * C).unwrap();
    let error = early.read_at(&mut late, 7 * C).unwrap_err();
    assert_eq!((why(&error), second.lost()), (Some(Lost::Ended), None));
    assert!(matches!(
        OverlayView::open(OverlayParts { fds: Vec::new(), ..child.parts().unwrap() }, child),
        Err(OpenError::Parts)
    ));
}
