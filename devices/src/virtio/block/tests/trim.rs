//! Discards, zeroes, and when things are on the disk.

use std::os::unix::fs::MetadataExt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::virtio::block::flight::{Flight, Work};
use crate::virtio::block::job::Action;
use crate::virtio::block::request::{Extent, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, Refusal, Request, Terms};

const TRIM: u64 = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

fn segments(list: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes = |&(sector, count, flags): &(u64, u32, u32)| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    list.iter().flat_map(bytes).collect()
}

pub fn ask(setup: &mut Setup, kind: u32, list: &[(u64, u32, u32)]) -> u8 {
    setup.status(&[Part::Say(&header(kind, 0)), Part::Say(&segments(list)), Part::Room(1)])
}

fn full_image(sectors: u64) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&vec![9; sectors as usize * 512], 0).unwrap();
    image.as_file().sync_all().unwrap();
    image
}

/// The sectors that are zero; the others must be whole.
fn zeroed(file: &File) -> Vec<u64> {
    let mut bytes = vec![1; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let sectors = bytes.chunks(512).zip(0..);
    sectors.filter(|(bytes, _)| *bytes != [9; 512]).map(|(bytes, i)| (assert_eq!(bytes, [0; 512]), i).1).collect()
}

#[test]
fn discards_and_zeroes_what_it_is_told_to() {
    let image = full_image(4096);
    let full = image.as_file().metadata().unwrap().blocks();
    let mut setup = Setup::new(open(image.path(), false).unwrap(), TRIM);
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 3, 0), (100, 1, 1)]), OK);
    assert_eq!(zeroed(image.as_file()), [8, 9, 10, 100]);
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_DISCARD, &[(2048, 1024, 0), (3072, 1023, 0), (0, 0, 0)]), OK);
    assert_eq!(zeroed(image.as_file()).len(), 4 + 2047);
    assert!(image.as_file().metadata().unwrap().blocks() < full * 3 / 4);
    assert_eq!((setup.count("discards"), setup.count("write_zeroes"), setup.count("errors")), (1, 1, 0));
}

#[test]
fn zeroes_are_written_where_they_cannot_be_had_otherwise() {
    // Memory files can deallocate but not zero a range; a character device can do neither.
    for flags in [0, 1] {
        let memory = nix::sys::memfd::memfd_create(c"disk", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let memory = File::from(memory);
        memory.write_all_at(&[9; 64 * 512], 0).unwrap();
        let mut setup = Setup::new(Disk::claiming(memory.try_clone().unwrap(), 64 * 512), TRIM);
        assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, flags), (60, 4, flags)]), OK);
        assert_eq!(zeroed(&memory), [1, 2, 60, 61, 62, 63]);
    }
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut setup = Setup::new(Disk::claiming(full, 1 << 20), TRIM);
    assert_eq!(ask(&mut setup, VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 0)]), IOERR);
}

#[test]
fn refuses_segments_that_make_no_sense() {
    let _no_forks = FORKS.read().unwrap();
    let image = full_image(64);
    let mut setup = Setup::new(open(image.path(), false).unwrap(), TRIM);
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for kind in [discard, zeroes] {
        for list in
            [&[(64, 1, 0)][..], &[(0, 65, 0)], &[(u64::MAX, 1, 0)], &[(0, u32::MAX, 0)], &[(0, 1, 0), (63, 2, 0)]]
        {
            assert_eq!(ask(&mut setup, kind, list), IOERR, "{list:?}");
        }
        assert_eq!(ask(&mut setup, kind, &[]), IOERR);
        assert_eq!(ask(&mut setup, kind, &[(0, 1, 0); MAX_SEGMENTS as usize + 1]), IOERR);
        assert_eq!(ask(&mut setup, kind, &[(0, 1, 2)]), UNSUPP);
        assert_eq!(setup.status(&[Part::Say(&header(kind, 0)), Part::Say(&[0; 15]), Part::Room(1)]), IOERR);
    }
    assert_eq!(ask(&mut setup, discard, &[(0, 1, 1)]), UNSUPP);
    assert!(zeroed(image.as_file()).is_empty());
    // Not negotiated.
    drop(setup);
    let mut setup = Setup::on(&image);
    assert_eq!([ask(&mut setup, discard, &[(0, 1, 0)]), ask(&mut setup, zeroes, &[(0, 1, 0)])], [UNSUPP; 2]);
    drop(setup);
    let mut setup = Setup::new(open(image.path(), true).unwrap(), TRIM);
    assert_eq!([ask(&mut setup, discard, &[(0, 1, 0)]), ask(&mut setup, zeroes, &[(0, 1, 0)])], [IOERR; 2]);
    assert_eq!(setup.block.features() & TRIM, 1 << VIRTIO_BLK_F_FLUSH);
    assert!(zeroed(image.as_file()).is_empty());
}

proptest! {
    #[test]
    fn what_passes_lies_on_the_disk(
        kind in 0_u32..16,
        sector in prop_oneof![0_u64..300, any::<u64>()],
        body in prop::collection::vec((prop_oneof![0_u64..300, any::<u64>()], prop_oneof![0_u32..300, any::<u32>()], 0_u32..4), 0..20),
        cut in 0_usize..400,
        room in 0_usize..2000,
    ) {
        let terms = Terms { bytes: 256 * 512, read_only: false, features: TRIM };
        let mut bytes = [&header(kind, sector)[..], &segments(&body)].concat();
        bytes.truncate(cut);
        let ram = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap();
        let mut areas = crate::virtio::areas::Areas::default();
        areas.push(vm_memory::GuestMemoryBackend::get_slice(&ram, vm_memory::GuestAddress(0), bytes.len()).unwrap());
        areas.copy_from(&bytes);
        let sectors = |bytes: u64| bytes.is_multiple_of(512);
        let inside = |offset: u64, len: u64| offset + len <= terms.bytes && sectors(offset) && sectors(len);
        match terms.read(&mut areas, room) {
            Ok(Request::Read(offset)) => prop_assert!(inside(offset, room as u64)),
            Ok(Request::Write(offset)) => prop_assert!(inside(offset, areas.len() as u64)),
            Ok(Request::Discard(extents)) => {
                prop_assert!(extents.iter().all(|extent| inside(extent.offset, extent.len) && !extent.unmap));
            }
            Ok(Request::WriteZeroes(extents)) => {
                let sound = |extent: &Extent| inside(extent.offset, extent.len) && extent.len <= u64::from(MAX_SEGMENT_SECTORS) * 512;
                prop_assert!(extents.iter().all(sound) && extents.len() <= MAX_SEGMENTS as usize);
            }
            Ok(Request::Flush | Request::Identify) | Err(Refusal::Invalid | Refusal::Unsupported) => {}
        }
    }
}

#[test]
fn a_driver_that_cannot_flush_finds_everything_on_the_disk() {
    let image = full_image(8);
    let disk = Arc::new(open(image.path(), false).unwrap());
    let block = Block::new("x", Arc::clone(&disk), BlockOptions::default()).unwrap();
    let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    let write_back = |features| block.shared(features).write_back.load(Ordering::Relaxed);
    assert_eq!([0, flush, wce, flush | wce].map(write_back), [false, true, false, true]);

    let ram = Arc::new(vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap());
    let disk = &*disk;
    let actions = |work, stable| {
        let mut flight = Flight::new(work, stable);
        let next = std::iter::from_fn(move || flight.next(disk).unwrap());
        next.map(|job| job.action).collect::<Vec<_>>()
    };
    let write = |stable| {
        let mut areas = crate::virtio::areas::Areas::default();
        areas.push(vm_memory::GuestMemoryBackend::get_slice(&*ram, vm_memory::GuestAddress(0), 512).unwrap());
        let areas = crate::virtio::held::HeldAreas::new(&areas, &ram).unwrap();
        actions(Work::Transfer { write: true, offset: 0, areas }, stable)
    };
    assert_eq!(write(false), [Action::Write { stable: false }]);
    assert_eq!(write(true), [Action::Write { stable: true }]);
    let extents =
        || [Extent { offset: 0, len: 512, unmap: false }, Extent { offset: 512, len: 512, unmap: true }].into();
    let (discard, punch) = (Action::Discard { len: 512 }, Action::Punch { len: 512 });
    let zero = Action::ZeroRange { len: 512 };
    assert_eq!(actions(Work::Discard(extents()), false), [discard, discard]);
    assert_eq!(actions(Work::Discard(extents()), true), [discard, discard, Action::Sync]);
    assert_eq!(actions(Work::WriteZeroes(extents()), true), [zero, punch, Action::Sync]);
}

#[test]
fn the_driver_switches_the_cache_and_a_reset_switches_it_back() {
    let image = full_image(8);
    let features = TRIM | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    let mut setup = Setup::new(open(image.path(), false).unwrap(), features);
    let mode = |setup: &Setup| {
        let mut byte = [9];
        setup.block.read_config(32, &mut byte);
        byte[0]
    };
    assert_eq!(mode(&setup), 1);
    setup.block.write_config(32, &[0]);
    setup.block.write_config(31, &[7]);
    setup.block.write_config(32, &[1, 1]);
    assert_eq!(mode(&setup), 0);
    let write = |setup: &mut Setup| {
        setup.status(&[Part::Say(&header(VIRTIO_BLK_T_OUT, 1)), Part::Say(&[3; 512]), Part::Room(1)])
    };
    assert_eq!(write(&mut setup), OK);
    let saved = setup.block.save();
    setup.block.reset();
    assert_eq!(mode(&setup), 1);
    setup.block.restore(saved.clone()).unwrap();
    assert_eq!(mode(&setup), 0);
    // Without FLUSH it is write-through from the start, and says so.
    setup.block.reset();
    setup.block.activate(setup.driver.activation(1 << VIRTIO_BLK_F_CONFIG_WCE)).unwrap();
    assert_eq!((mode(&setup), write(&mut setup)), (0, OK));

    let DeviceState::Block(saved) = saved else { panic!() };
    for wrong in [
        BlockStateV1 { bytes: 512, ..saved.clone() },
        BlockStateV1 { serial: [1; 20], ..saved.clone() },
        BlockStateV1 { queues: 2, ..saved.clone() },
    ] {
        let refused = setup.block.restore(DeviceState::Block(wrong));
        assert!(matches!(refused, Err(StateError::Differs { .. })));
    }
    assert_eq!(setup.block.restore(DeviceState::Rng), Err(StateError::WrongDevice("block device")));
}
