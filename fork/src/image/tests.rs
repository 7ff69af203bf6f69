use super::index::Entry;
use super::*;
use crate::testing::{self, contents, fill, memfd, populated};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::MetadataExt;

const P: u64 = PAGE as u64;
/// Pages in a chunk.
const C: u64 = CHUNK / P;

fn quiet() -> impl FnMut(Progress) -> ControlFlow<()> {
    |_| ControlFlow::Continue(())
}

/// An image of `pages` pages of RAM, of which those in `data` hold something.
fn image(pages: u64, data: impl IntoIterator<Item = u64>) -> (tempfile::TempDir, Saved) {
    let dir = tempfile::tempdir().unwrap();
    let ram = memfd(pages * P);
    fill(&ram, data);
    let saved = save(&ram, dir.path(), &mut quiet()).unwrap();
    (dir, saved)
}

/// Everything loaded into a memfd.
fn load(dir: &Path, pages: u64) -> File {
    let ram = memfd(pages * P);
    Image::open(dir, pages * P).unwrap().load_all(&ram, &mut quiet()).unwrap();
    ram
}

fn assert_contents(ram: &File, pages: u64, data: &[u64]) {
    let mut bytes = [0; PAGE];
    for page in 0..pages {
        ram.read_exact_at(&mut bytes, page * P).unwrap();
        let expected = if data.contains(&page) { contents(page) } else { [0; PAGE] };
        assert!(bytes == expected, "page {page}");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_was_saved_is_loaded_and_holes_stay_holes() {
    // Chunks: whole, empty, one page in the middle, empty but populated, and a last one of two pages.
    let pages = 4 * C + 2;
    let data: Vec<_> = (0..C).chain([2 * C + 7, pages - 1]).collect();
    let ram = memfd(pages * P);
    fill(&ram, data.iter().copied());
    for zero in [2 * C + 8, 3 * C, 3 * C + 5] {
        ram.write_all_at(&[0; PAGE], zero * P).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    let saved = save(&ram, dir.path(), &mut |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    });
    assert_eq!(saved.unwrap(), Saved { bytes: data.len() as u64 * P, chunks: 3, holes: 2 });
    let total = 3 * CHUNK + 2 * P;
    let done = [CHUNK, 2 * CHUNK, 3 * CHUNK, total];
    assert_eq!(seen, done.map(|done| Progress { done, total }));

    let memory = fs::metadata(dir.path().join(MEMORY)).unwrap();
    assert_eq!((memory.len(), memory.mode() & 0o777), (pages * P, 0o600));
    assert!(memory.blocks() * 512 <= data.len() as u64 * P, "zero pages take room");
    let image = Image::open(dir.path(), pages * P).unwrap();
    assert_eq!((image.data(), image.chunks()), (2 * CHUNK + 2 * P, 3));
    assert_eq!(
        [0, CHUNK, 2 * CHUNK + 5, pages * P - 1].map(|offset| image.find(offset)),
        [Some(0), None, Some(1), Some(2)]
    );
    drop(image);

    let loaded = load(dir.path(), pages);
    assert_contents(&loaded, pages, &data);
    assert_eq!(populated(&loaded), data.len() as u64 * P);
    // And once more from what was loaded.
    let again = tempfile::tempdir().unwrap();
    save(&loaded, again.path(), &mut quiet()).unwrap();
    let index = |dir: &tempfile::TempDir| fs::read(dir.path().join(INDEX)).unwrap();
    assert_eq!(index(&again), index(&dir));
}

#[test]
fn the_cost_follows_the_data_not_the_size() {
    let pages = (64 << 30) / P;
    let data = [0, pages / 3, pages - 1];
    let (dir, saved) = image(pages, data);
    assert_eq!((saved.bytes, saved.chunks), (3 * P, 3));
    assert!(fs::metadata(dir.path().join(INDEX)).unwrap().len() < 100);
    let ram = load(dir.path(), pages);
    assert_eq!(populated(&ram), 3 * P);
    for page in data {
        let mut bytes = [0; PAGE];
        ram.read_exact_at(&mut bytes, page * P).unwrap();
        assert!(bytes == contents(page), "page {page}");
    }
}

#[test]
fn memory_without_anything_in_it_is_an_image_too() {
    let (dir, saved) = image(3, []);
    assert_eq!(saved, Saved { bytes: 0, chunks: 0, holes: 1 });
    assert_eq!(populated(&load(dir.path(), 3)), 0);
}

#[test]
fn a_save_that_fails_leaves_nothing_behind() {
    let ram = memfd(8 * CHUNK);
    fill(&ram, 0..8 * C);
    let dir = tempfile::tempdir().unwrap();
    let stopped = save(&ram, dir.path(), &mut |progress| {
        // Until it is whole, it is no image.
        assert!(matches!(Image::open(dir.path(), 8 * CHUNK), Err(ImageError::NoImage { .. })));
        if progress.done > 3 * CHUNK { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(SaveError::Stopped)));
    assert_eq!(names(dir.path()), [""; 0]);
    // And the next one works.
    save(&ram, dir.path(), &mut quiet()).unwrap();
    assert_eq!(names(dir.path()), [MEMORY, INDEX]);
}

#[test]
fn an_image_is_never_written_over() {
    let (dir, _) = image(4, [1]);
    let again = save(&memfd(4 * P), dir.path(), &mut quiet());
    assert!(matches!(again, Err(SaveError::Exists { path }) if path.ends_with(INDEX)));
    // Nor is what a killed save left, which somebody may still be writing.
    fs::remove_file(dir.path().join(INDEX)).unwrap();
    let again = save(&memfd(4 * P), dir.path(), &mut quiet());
    assert!(matches!(again, Err(SaveError::Exists { path }) if path.ends_with(MEMORY)));
    assert_eq!(names(dir.path()), [MEMORY]);
    assert!(matches!(Image::open(dir.path(), 4 * P), Err(ImageError::NoImage { .. })));
}

#[test]
fn a_full_disk_is_named() {
    let ram = memfd(2 * CHUNK);
    fill(&ram, [C]);
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut index = Index::new(2 * CHUNK).unwrap();
    let e = save::write_memory(&ram, &mut index, &full, Path::new("/there/memory"), &mut quiet()).unwrap_err();
    assert!(matches!(e, SaveError::NoSpace { written: 0, total: CHUNK, .. }), "{e:?}");
    assert!(e.to_string().contains("/there/memory"), "{e}");
    let nowhere = save(&ram, Path::new("/nonexistent"), &mut quiet());
    assert!(matches!(nowhere, Err(SaveError::Write { .. })));
}

#[test]
fn memory_that_is_no_ram_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [0, 100, 1 << 49] {
        let refused = save(&memfd(bytes), dir.path(), &mut quiet());
        assert!(matches!(refused, Err(SaveError::Size { bytes: b }) if b == bytes));
    }
    assert_eq!(names(dir.path()), [""; 0]);
    let (image, _) = image(4, [1]);
    let e = Image::open(image.path(), 4 * P).unwrap().load_all(&memfd(5 * P), &mut quiet()).unwrap_err();
    assert!(matches!(e, LoadError::Size { image, ram } if (image, ram) == (4 * P, 5 * P)));
}

#[test]
fn files_that_are_no_image_are_told_apart() {
    let (dir, _) = image(4, [1]);
    let index = dir.path().join(INDEX);
    let memory = dir.path().join(MEMORY);
    let good = fs::read(&index).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&index, bytes).unwrap();
        match Image::open(dir.path(), 4 * P) {
            Err(ImageError::Index { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(refused(b""), IndexError::Truncated { len: 0, .. }));
    assert!(matches!(refused(&[b'x'; 100]), IndexError::NotAnIndex));
    let mut other = good.clone();
    other[8] = 7;
    assert!(matches!(refused(&other), IndexError::OtherVersion { version: 7 }));
    fs::write(&index, &good).unwrap();
    assert!(matches!(
        Image::open(dir.path(), 5 * P),
        Err(ImageError::Index { source: IndexError::OtherSize { image, ram }, .. }) if (image, ram) == (4 * P, 5 * P)
    ));
    for len in [4 * P - 1, 4 * P + 1] {
        OpenOptions::new().write(true).open(&memory).unwrap().set_len(len).unwrap();
        assert!(matches!(Image::open(dir.path(), 4 * P), Err(ImageError::Length { len: l, .. }) if l == len));
    }
    // Neither waits for somebody to write to a pipe.
    for path in [&memory, &index] {
        fs::remove_file(path).unwrap();
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(Image::open(dir.path(), 4 * P), Err(ImageError::Open { path: p, .. }) if p == *path));
    }
}

/// RAM of the indexes below: enough for all chunks that they name.
const RAM: u64 = 1000 * CHUNK - 3 * P;

fn indexes() -> impl Strategy<Value = Index> {
    let chunks = proptest::collection::btree_map(0..1000u64, any::<u64>(), 0..50);
    chunks.prop_map(|chunks| {
        let mut index = Index::new(RAM).unwrap();
        for (chunk, contents) in chunks {
            index.push(chunk * CHUNK, &contents.to_le_bytes());
        }
        index
    })
}

fn decode(bytes: &[u8]) -> Result<Index, IndexError> {
    Index::read(bytes, bytes.len() as u64, RAM)
}

/// With the checksum put right.
fn summed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - 4;
    let sum = crc32fast::hash(&bytes[..body]);
    bytes[body..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

#[test]
fn an_index_that_lies_is_refused() {
    let entry = |chunk: u32| [chunk.to_le_bytes(), [0; 4]].concat();
    let index = |entries: &[u32]| {
        let empty = Index::new(RAM).unwrap().encode();
        let mut bytes = empty[..24].to_vec();
        bytes.extend((entries.len() as u64).to_le_bytes());
        bytes.extend(entries.iter().copied().flat_map(entry));
        bytes.extend([0; 4]);
        summed(bytes)
    };
    assert_eq!(decode(&index(&[0, 999])).unwrap().entries().last(), Some(&Entry { chunk: 999, sum: 0 }));
    for (entries, reason) in [(&[5, 4][..], "not in order"), (&[4, 4], "not in order"), (&[4, 1000], "beyond the end")]
    {
        let e = decode(&index(entries)).unwrap_err();
        assert!(e.to_string().contains(reason), "{e}");
    }
    // Believed, this one would have us allocate 2^63 bytes.
    let mut huge = index(&[1]);
    huge[24..32].copy_from_slice(&(u64::MAX / 16).to_le_bytes());
    assert!(matches!(decode(&summed(huge)), Err(IndexError::Damaged { .. })));
    let mut chunky = index(&[1]);
    chunky[12] = 1;
    assert!(matches!(decode(&summed(chunky)), Err(IndexError::Damaged { .. })));
    // Whole, but with something behind it.
    let longer = [index(&[1]), vec![0]].concat();
    assert!(matches!(decode(&longer), Err(IndexError::Damaged { .. })));
}

proptest! {
    #[test]
    fn an_index_comes_back(index in indexes()) {
        prop_assert_eq!(decode(&index.encode()).unwrap(), index);
    }

    #[test]
    fn any_flipped_bit_of_an_index_is_found(index in indexes(), at in any::<prop::sample::Index>()) {
        let mut bytes = index.encode();
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn any_truncation_of_an_index_is_found(index in indexes(), at in any::<prop::sample::Index>()) {
        let bytes = index.encode();
        let cut = &bytes[..at.index(bytes.len())];
        prop_assert!(decode(cut).is_err());
    }

    #[test]
    fn no_bytes_break_the_reader(mut bytes in proptest::collection::vec(any::<u8>(), 36..200), count in 0..20u64) {
        // With a good start and end, so that all of the reader is reached.
        let start = Index::new(RAM).unwrap().encode();
        bytes[..24].copy_from_slice(&start[..24]);
        bytes[24..32].copy_from_slice(&count.to_le_bytes());
        let len = bytes.len().min(36 + 8 * count as usize);
        bytes.truncate(len);
        let _ = decode(&summed(bytes));
    }

    #[test]
    fn data_runs_are_the_pages_that_are_not_zero(pages in proptest::collection::vec(any::<bool>(), 0..20)) {
        // The last byte of a page is the one that a short-sighted test for zero would miss.
        let bytes: Vec<u8> = pages.iter().flat_map(|&data| { let mut page = [0; PAGE]; page[PAGE - 1] = data.into(); page }).collect();
        let mut found = vec![false; pages.len()];
        let mut last = None;
        for run in data_runs(&bytes) {
            prop_assert!(run.start % PAGE == 0 && run.end % PAGE == 0 && !run.is_empty());
            prop_assert!(last.is_none_or(|last| run.start > last), "two runs that are one");
            last = Some(run.end);
            found[run.start / PAGE..run.end / PAGE].fill(true);
        }
        prop_assert_eq!(found, pages);
    }
}

#[test]
fn any_flipped_byte_of_a_chunk_is_found() {
    let pages = 5 * C + 3;
    let data: Vec<_> = (0..C).chain([3 * C + 2, pages - 1]).collect();
    let (dir, _) = image(pages, data);
    let file = OpenOptions::new().read(true).write(true).open(dir.path().join(MEMORY)).unwrap();
    let image = Image::open(dir.path(), pages * P).unwrap();
    proptest!(|(chunk in 0..3usize, within in any::<prop::sample::Index>(), flip in 1..=255u8)| {
        let range = image.index.range(image.index.entries()[chunk]);
        let at = range.start + within.index((range.end - range.start) as usize) as u64;
        let (mut byte, mut buffer) = ([0], Vec::new());
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ flip], at).unwrap();
        let found = image.read(chunk, &mut buffer);
        file.write_all_at(&byte, at).unwrap();
        let damaged = matches!(&found, Err(ImageError::Damaged { offset, .. }) if *offset == range.start);
        prop_assert!(damaged, "byte {at:#x}: {found:?}");
        prop_assert_eq!(image.read(chunk, &mut buffer).unwrap(), range.start);
    });
    // Cut off while it is open.
    file.set_len(3 * CHUNK).unwrap();
    let e = image.load_all(&testing::memfd(pages * P), &mut quiet()).unwrap_err();
    assert!(matches!(e, LoadError::Image(ImageError::Read { offset, .. }) if offset == 3 * CHUNK), "{e:?}");
}
