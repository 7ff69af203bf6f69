use super::*;
use crate::image::{self, CHUNK, ImageError, MEMORY};
use crate::ram::PAGE;
use crate::testing::{Random, contents, fill, memfd, populated, ram};
use std::fs::{self, File};
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::sync::{Barrier, OnceLock};
use std::thread;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const P: u64 = PAGE as u64;
/// Pages in a chunk.
const C: u64 = CHUNK / P;

/// Saved memory: where it is, and which pages hold [`contents`].
struct Fixture {
    dir: tempfile::TempDir,
    pages: u64,
    data: Vec<bool>,
}

impl Fixture {
    /// RAM in which `is_data` says which pages are not zero.
    fn new(pages: u64, is_data: impl Fn(u64) -> bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let memory = memfd(pages * P);
        let data: Vec<_> = (0..pages).map(is_data).collect();
        fill(&memory, (0..pages).filter(|&page| data[page as usize]));
        image::save(&memory, dir.path(), &mut |_| ControlFlow::Continue(())).unwrap();
        Self { dir, pages, data }
    }

    /// 64 MiB, a quarter of it holes of all sizes.
    fn large() -> Self {
        Self::new(16384, |page| {
            let mut random = Random(page / 5 + 1);
            random.below(4) != 0 && page / C % 20 != 3
        })
    }

    fn expected(&self, page: u64) -> [u8; PAGE] {
        if self.data[page as usize] { contents(page) } else { [0; PAGE] }
    }

    fn data_bytes(&self) -> u64 {
        self.data.iter().filter(|data| **data).count() as u64 * P
    }

    /// Empty memory in two regions of different lengths, the seam of which lies within a chunk.
    fn memory(&self) -> Arc<GuestMemoryMmap> {
        let first = (self.pages / 3 + 1) * P;
        ram(&[first, self.pages * P - first])
    }

    fn image(&self) -> Image {
        Image::open(self.dir.path(), self.pages * P).unwrap()
    }

    fn start(&self, memory: &Arc<GuestMemoryMmap>) -> LazyMemory {
        let unexpected = |e| panic!("{e:?}");
        self.start_telling(memory, unexpected)
    }

    fn start_telling(
        &self,
        memory: &Arc<GuestMemoryMmap>,
        failed: impl FnOnce(Arc<LoadError>) + Send + 'static,
    ) -> LazyMemory {
        LazyMemory::start(userfault(), Arc::clone(memory), self.image(), failed).unwrap()
    }

    /// Flips a bit of a page in the image.
    fn damage(&self, page: u64) {
        let memory = File::options().read(true).write(true).open(self.dir.path().join(MEMORY)).unwrap();
        let mut byte = [0];
        memory.read_exact_at(&mut byte, page * P).unwrap();
        memory.write_all_at(&[byte[0] ^ 4], page * P).unwrap();
    }
}

fn userfault() -> Userfault {
    Userfault::open(FEATURES).unwrap()
}

fn memfd_of(memory: &GuestMemoryMmap) -> File {
    memory.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap()
}

/// Where a page is for the guest.
fn gpa(memory: &GuestMemoryMmap, page: u64) -> GuestAddress {
    let within = |region: &vm_memory::GuestRegionMmap| {
        let distance = (page * P).checked_sub(region.file_offset()?.start())?;
        (distance < region.len()).then(|| GuestAddress(region.start_addr().0 + distance))
    };
    memory.iter().find_map(within).unwrap()
}

/// A page as a vCPU would see it.
fn touch(memory: &GuestMemoryMmap, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    memory.read_slice(&mut bytes, gpa(memory, page)).unwrap();
    bytes
}

/// Whether the kernel would still ask for missing pages of `memory`: "um" among the flags of its mappings.
fn is_registered(memory: &GuestMemoryMmap) -> bool {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let starts: Vec<_> = memory.iter().map(|region| format!("{:x}-", region.as_ptr() as u64)).collect();
    let mut ours = false;
    smaps.lines().any(|line| {
        if line.as_bytes()[0].is_ascii_digit() || line.as_bytes()[0].is_ascii_lowercase() {
            ours = starts.iter().any(|start| line.starts_with(start));
        }
        ours && line.starts_with("VmFlags:") && line.split(' ').any(|flag| flag == "um")
    })
}

/// Whether this process has a file below `dir` open.
fn has_open(dir: &std::path::Path) -> bool {
    let links = fs::read_dir("/proc/self/fd").unwrap().map(|entry| fs::read_link(entry.unwrap().path()));
    links.flatten().any(|target| target.starts_with(dir))
}

#[test]
fn nothing_of_the_loading_is_left() {
    let fixture = Fixture::large();
    let memory = fixture.memory();
    assert!(!is_registered(&memory));
    let lazy = fixture.start(&memory);
    assert!(is_registered(&memory) || lazy.counters().bytes_left == 0);
    lazy.finish().unwrap();
    lazy.finish().unwrap();
    assert!(!is_registered(&memory));
    assert!(!has_open(fixture.dir.path()));
    let counters = lazy.counters();
    assert_eq!((counters.chunks, counters.bytes_left), (fixture.image().chunks() as u64, 0));
    // All of it is there, and no more than that.
    let memfd = memfd_of(&memory);
    assert_eq!(populated(&memfd), fixture.data_bytes());
    fs::remove_dir_all(fixture.dir.path()).unwrap();
    for page in 0..fixture.pages {
        assert!(touch(&memory, page) == fixture.expected(page), "page {page}");
    }
}

#[test]
fn memory_that_was_loaded_is_saved_as_it_was() {
    let fixture = Fixture::large();
    let memory = fixture.memory();
    fixture.start(&memory).finish().unwrap();
    let again = tempfile::tempdir().unwrap();
    image::save(&memfd_of(&memory), again.path(), &mut |_| ControlFlow::Continue(())).unwrap();
    let index = |dir: &tempfile::TempDir| fs::read(dir.path().join(image::INDEX)).unwrap();
    assert!(index(&again) == index(&fixture.dir));
}

/// Readers and writers at work from the first moment on. Every page belongs to one of them: it knows what must be there.
#[test]
fn threads_see_what_was_saved_and_keep_what_they_wrote() {
    // On a busy machine the loader may be done before a thread gets to run, which tests nothing.
    assert!((0..20).any(|_| threads_at_work_while_it_loads() > 0), "nobody ever had to wait");
}

/// Returns how often somebody had to wait.
fn threads_at_work_while_it_loads() -> u64 {
    const THREADS: u64 = 4;
    let fixture = Arc::new(Fixture::large());
    let memory = fixture.memory();
    let ready = Arc::new(Barrier::new(THREADS as usize + 1));
    let worker = |id: u64| {
        let (fixture, memory, ready) = (Arc::clone(&fixture), Arc::clone(&memory), Arc::clone(&ready));
        thread::spawn(move || {
            let mut random = Random(id + 1);
            let own = |n: u64| n * THREADS + id;
            let mut written = vec![None; fixture.pages as usize];
            ready.wait();
            for step in 1..=20_000u64 {
                // The far end first, where the loader comes last.
                let page = own(fixture.pages / THREADS - 1 - random.below(1 + step * fixture.pages / THREADS / 20_001));
                let mark: &mut Option<u64> = &mut written[page as usize];
                let address = gpa(&memory, page);
                if random.below(2) == 0 {
                    *mark = Some(step << 8 | id);
                    memory.write_obj(step << 8 | id, GuestAddress(address.0 + 8)).unwrap();
                } else {
                    let mut expected = fixture.expected(page);
                    if let Some(mark) = mark {
                        expected[8..16].copy_from_slice(&mark.to_ne_bytes());
                    }
                    assert!(touch(&memory, page) == expected, "page {page}, step {step}");
                }
            }
            written
        })
    };
    let workers: Vec<_> = (0..THREADS).map(worker).collect();
    // They start touching memory when it is registered, and a moment later than the loader.
    let lazy = fixture.start(&memory);
    ready.wait();
    let written: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
    lazy.finish().unwrap();
    let memfd = memfd_of(&memory);
    for page in 0..fixture.pages {
        let mut expected = fixture.expected(page);
        if let Some(mark) = written[(page % THREADS) as usize][page as usize] {
            expected[8..16].copy_from_slice(&mark.to_ne_bytes());
        }
        let mut bytes = [0; PAGE];
        memfd.read_exact_at(&mut bytes, page * P).unwrap();
        assert!(bytes == expected, "page {page} in the end");
    }
    lazy.counters().faults
}

/// KVM and system calls on guest memory fault in the kernel, where a userfaultfd for user mode only would fail them.
#[test]
fn the_kernel_waits_for_pages_too() {
    let fixture = Fixture::large();
    let memory = fixture.memory();
    let lazy = fixture.start(&memory);
    let page = (0..fixture.pages).rev().find(|&page| fixture.data[page as usize]).unwrap();
    let (from, to) = nix::unistd::pipe().unwrap();
    let mut to = File::from(to);
    memory.write_all_volatile_to(gpa(&memory, page), &mut to, PAGE).unwrap();
    let mut bytes = [0; PAGE];
    File::from(from).read_exact(&mut bytes).unwrap();
    assert!(bytes == contents(page));
    lazy.finish().unwrap();
}

#[test]
fn a_large_sparse_memory_is_there_at_once() {
    let pages = (64 << 30) / P;
    let dir = tempfile::tempdir().unwrap();
    let saved = memfd(pages * P);
    let data = [0, 5, pages / 2, pages - 1];
    fill(&saved, data);
    image::save(&saved, dir.path(), &mut |_| ControlFlow::Continue(())).unwrap();
    let memory = ram(&[3 << 30, 61 << 30]);
    let image = Image::open(dir.path(), pages * P).unwrap();
    let lazy = LazyMemory::start(userfault(), Arc::clone(&memory), image, |e| panic!("{e:?}")).unwrap();
    for page in data {
        assert!(touch(&memory, page) == contents(page), "page {page}");
    }
    assert!(touch(&memory, pages / 3) == [0; PAGE]);
    lazy.finish().unwrap();
    assert!(touch(&memory, pages / 5) == [0; PAGE]);
    assert!(populated(&memfd_of(&memory)) <= 6 * P);
}

#[test]
fn damage_is_told_before_anybody_sees_it() {
    let fixture = Fixture::new(64 * C, |_| true);
    let bad = 40 * C + 3;
    fixture.damage(bad);
    let memory = fixture.memory();
    let told = Arc::new(OnceLock::new());
    let lazy = fixture.start_telling(&memory, {
        let told = Arc::clone(&told);
        move |e| told.set(e).unwrap()
    });
    // Whether this fault finds it or the loader by itself, it is let through only afterwards.
    let seen = touch(&memory, bad);
    let first = Arc::clone(told.get().expect("let through before the failure was told"));
    assert!(seen == [0; PAGE], "damaged bytes were let through");
    let is_it =
        |e: &LoadError| matches!(e, LoadError::Image(ImageError::Damaged { offset, .. }) if *offset == 40 * CHUNK);
    assert!(is_it(&first), "{first:?}");
    assert!(is_it(&lazy.finish().unwrap_err()));
    assert!(is_it(&lazy.finish().unwrap_err()));
    // Nobody waits any more, wherever they touch it.
    assert!(!is_registered(&memory));
    for page in 0..fixture.pages {
        let bytes = touch(&memory, page);
        assert!(bytes == contents(page) || bytes == [0; PAGE], "page {page}");
    }
}

#[test]
fn damage_nobody_touches_is_told_too() {
    let fixture = Fixture::new(64 * C, |_| true);
    fixture.damage(64 * C - 1);
    let (tell, told) = mpsc::channel();
    let memory = fixture.memory();
    let lazy = fixture.start_telling(&memory, move |e| tell.send(e).unwrap());
    assert!(matches!(&*told.recv().unwrap(), LoadError::Image(ImageError::Damaged { .. })));
    assert!(lazy.finish().is_err());
    let e = fixture.image().load_all(&memfd(fixture.pages * P), &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(e, LoadError::Image(ImageError::Damaged { .. })));
}

/// A file that is cut off while a VM runs from it.
#[test]
fn an_image_that_goes_away_is_told() {
    let fixture = Fixture::new(64 * C, |_| true);
    let image = fixture.image();
    File::options().write(true).open(fixture.dir.path().join(MEMORY)).unwrap().set_len(10 * CHUNK).unwrap();
    let (tell, told) = mpsc::channel();
    let memory = fixture.memory();
    let lazy = LazyMemory::start(userfault(), Arc::clone(&memory), image, move |e| tell.send(e).unwrap()).unwrap();
    assert!(matches!(&*told.recv().unwrap(), LoadError::Image(ImageError::Read { .. })));
    assert!(lazy.finish().is_err());
}

/// Dropped while threads wait for pages, which is against the rules: they must come free all the same.
#[test]
fn a_drop_in_the_middle_leaves_nobody_waiting() {
    let fixture = Arc::new(Fixture::large());
    let mut in_the_middle = false;
    // Whether a drop comes in time is luck on a busy machine. Once is enough.
    for _ in 0..50 {
        let memory = fixture.memory();
        let lazy = fixture.start(&memory);
        let toucher = |id: u64| {
            let (fixture, memory) = (Arc::clone(&fixture), Arc::clone(&memory));
            thread::spawn(move || {
                for page in (0..fixture.pages).rev().filter(|page| page % 2 == id) {
                    let bytes = touch(&memory, page);
                    assert!(bytes == fixture.expected(page) || bytes == [0; PAGE], "page {page}");
                }
            })
        };
        let touchers: Vec<_> = (0..2).map(toucher).collect();
        while lazy.counters().faults == 0 && lazy.counters().bytes_left > 0 {
            thread::yield_now();
        }
        let shared = Arc::clone(&lazy.shared);
        drop(lazy);
        assert!(!is_registered(&memory));
        assert!(!has_open(fixture.dir.path()));
        in_the_middle = shared.bytes_left.load(Ordering::Relaxed) > 0;
        touchers.into_iter().for_each(|toucher| toucher.join().unwrap());
        if in_the_middle {
            break;
        }
    }
    assert!(in_the_middle, "everything was loaded before the drop, each time");
}

#[test]
fn memory_that_does_not_fit_is_refused() {
    let fixture = Fixture::new(64, |page| page % 2 == 0);
    let start = |memory| LazyMemory::start(userfault(), memory, fixture.image(), |e| panic!("{e:?}")).err();
    let e = start(ram(&[65 * P]));
    assert!(matches!(e, Some(StartError::Size { image, ram }) if (image, ram) == (64 * P, 65 * P)), "{e:?}");
    let used = fixture.memory();
    fill(&memfd_of(&used), [7]);
    let e = start(Arc::clone(&used));
    assert!(matches!(e, Some(StartError::NotEmpty { offset }) if offset == 7 * P), "{e:?}");
    assert!(!is_registered(&used));
    let private = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 * PAGE)]).unwrap();
    assert!(matches!(start(Arc::new(private)), Some(StartError::Ram(RamError::NotSo { .. }))));
}
