//! The source's side: generations of a disk that its VM goes on writing.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use nix::errno::Errno;

use super::files::{Nameless, reopen_read_only};
use super::frozen::{FrozenParts, FrozenStateV1};
use super::store::{Slots, Store};
use super::table::{Kept, Lost, Slot, Table, clusters};
use super::{Bytes, CLUSTER, HostBytes, locked};

nix::ioctl_write_int!(
    /// FICLONE (linux/fs.h): the file becomes the one in the argument, sharing its blocks.
    ficlone, 0x94, 9
);

/// So many clusters can be copied at a time.
const COPIERS: usize = 64;

/// Names a generation of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GenerationId(pub u64);

/// Is told of generations that were given up, on the thread that was about to write: it must neither wait nor take long.
pub type OnLost = Box<dyn Fn(GenerationId, Lost) + Send + Sync>;

/// How to freeze a disk.
#[derive(Clone, Debug)]
pub struct FreezerOptions {
    /// The folder on whose file system the store is. It has no name there.
    pub store: PathBuf,
    /// The most bytes of the store. A limit below [`CLUSTER`] lets a generation live until the first write.
    pub limit: u64,
    /// A folder on the disk's own file system: where that shares blocks between files (reflinks), each fork point gets such a copy
    /// and nothing is preserved. Making it waits for what is dirty of the file to be written: see [`Freezer::prepare`].
    pub reflink: Option<PathBuf>,
}

/// What a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Generations alive.
    pub generations: usize,
    /// Bytes in use, or not given back yet.
    pub stored: u64,
}

/// Freezes one disk, time and again. One per disk, for as long as the disk is open.
pub struct Freezer {
    /// What is written, as it is now.
    base: Base,
    reflink: Option<PathBuf>,
    /// The file system was found unable to.
    no_reflinks: AtomicBool,
    store: Store,
    on_lost: OnLost,
    /// A lock per cluster, in turns: whoever preserves it has it, so that it is copied once. Nothing but that depends on it: slots are
    /// set under the state's lock, for who lacks them, and nobody overwrites a cluster before it has one.
    copying: [Mutex<()>; COPIERS],
    state: Mutex<State>,
    /// That of the newest generation, for those who only look whether there is anything to do.
    newest: RwLock<Option<Arc<Table>>>,
}

enum Base {
    File(HostBytes),
    Layers(Arc<dyn Bytes>),
}

struct State {
    /// Oldest first.
    live: Vec<Live>,
    slots: Slots,
    next: u64,
}

struct Live {
    id: GenerationId,
    table: Arc<Table>,
    /// What it uses of the store.
    held: Vec<Slot>,
}

impl Freezer {
    /// For the disk in `file`, which is opened for reading (see [`reopen_read_only`]): a duplicate of this goes to children.
    ///
    /// # Errors
    /// When there is no place for the store.
    pub fn over_file(file: File, options: FreezerOptions, on_lost: OnLost) -> io::Result<Arc<Self>> {
        Self::new(Base::File(HostBytes::new(file)), options, on_lost)
    }

    /// For a disk that is more than a file: an [`Overlay`](super::Overlay). Its children need another way to what is under it.
    ///
    /// # Errors
    /// As [`Freezer::over_file`].
    pub fn over(base: Arc<dyn Bytes>, options: FreezerOptions, on_lost: OnLost) -> io::Result<Arc<Self>> {
        Self::new(Base::Layers(base), options, on_lost)
    }

    fn new(base: Base, options: FreezerOptions, on_lost: OnLost) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            base,
            reflink: options.reflink,
            no_reflinks: AtomicBool::new(false),
            store: Store::new(&options.store)?,
            on_lost,
            copying: [const { Mutex::new(()) }; COPIERS],
            state: Mutex::new(State { live: Vec::new(), slots: Slots::new(options.limit), next: 0 }),
            newest: RwLock::new(None),
        }))
    }

    /// Shortens the next [`Freezer::freeze`], if called soon before it, while the VM runs: a reflink is made only of what has been
    /// written to the disk.
    ///
    /// # Errors
    /// What fdatasync(2) says.
    pub fn prepare(&self) -> io::Result<()> {
        match &self.base {
            Base::File(file) if self.reflink.is_some() && !self.no_reflinks.load(Ordering::Relaxed) => {
                file.file().sync_data()
            }
            _ => Ok(()),
        }
    }

    /// The fork point: what the disk holds now is a generation, as long as what this returns lives. Nothing may be writing, and
    /// an image's metadata must be in its file.
    ///
    /// # Errors
    /// When there is no memory for its table, or the file's size cannot be told.
    pub fn freeze(self: &Arc<Self>) -> io::Result<Generation> {
        let len = self.base().size()?;
        let kind = match self.copy_by_reflink() {
            Some(file) => Kind::Copy(file),
            None => Kind::Preserved(Arc::new(Table::new(len)?)),
        };
        let mut state = locked(&self.state);
        let id = GenerationId(state.next);
        state.next += 1;
        if let Kind::Preserved(table) = &kind {
            state.live.push(Live { id, table: Arc::clone(table), held: Vec::new() });
            self.tell_newest(&state);
        }
        drop(state);
        Ok(Generation { freezer: Arc::clone(self), id, len, kind })
    }

    /// To be called before the bytes in `range` change in any way (written, punched, cut off), and before this returns they must not.
    /// It cannot fail; it lasts as long as copying what generations still lack of it.
    pub fn before_write(&self, range: Range<u64>) {
        let mut from = range.start / CLUSTER;
        while let Some(cluster) = self.lacking(from, &range) {
            self.preserve(cluster);
            from = cluster + 1;
        }
        // The tables before the write: the counterpart of `TableView::kept_meanwhile`.
        fence(Ordering::Release);
    }

    /// Whether a generation needs what the disk has in `range`: then giving it up, where that is only a hint, costs a copy. If not, it
    /// may change as after [`Freezer::before_write`].
    pub fn needs(&self, range: Range<u64>) -> bool {
        let needs = self.lacking(range.start / CLUSTER, &range).is_some();
        fence(Ordering::Release);
        needs
    }

    #[cfg(test)]
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// What the store holds.
    pub fn usage(&self) -> Usage {
        let state = locked(&self.state);
        Usage { generations: state.live.len(), stored: state.slots.taken() * CLUSTER }
    }

    /// The first cluster from `from` on to the end of `range` that a generation lacks. If the newest has one, all have.
    fn lacking(&self, from: u64, range: &Range<u64>) -> Option<u64> {
        let newest = self.newest.read().unwrap_or_else(PoisonError::into_inner);
        let table = newest.as_ref()?;
        let end = if range.is_empty() { 0 } else { clusters(range.end).min(table.clusters()) };
        (from..end).find(|cluster| table.lacks(*cluster))
    }

    /// Sees to it that no generation lacks the cluster, at whatever price for the generations.
    fn preserve(&self, cluster: u64) {
        let mut given_up = Vec::new();
        {
            let _copying = locked(&self.copying[(cluster % COPIERS as u64) as usize]);
            if locked(&self.state).lacks(cluster) {
                self.copy(cluster, &mut given_up);
                // Whoever it was for may have ended meanwhile, and nobody else would give it back.
                if locked(&self.state).live.is_empty() {
                    self.give_space_back();
                }
            }
        }
        for (id, why) in given_up {
            (self.on_lost)(id, why);
        }
    }

    fn copy(&self, cluster: u64, given_up: &mut Vec<(GenerationId, Lost)>) {
        let mut content = vec![0; CLUSTER as usize];
        if self.base().read_at(&mut content, cluster * CLUSTER).is_err() {
            let mut state = locked(&self.state);
            while let Some(id) = state.give_up(|live| live.table.lacks(cluster), Lost::Unreadable) {
                given_up.push((id, Lost::Unreadable));
            }
            return self.tell_newest(&state);
        }
        let zeroes = content.iter().all(|byte| *byte == 0);
        loop {
            let mut state = locked(&self.state);
            if !state.lacks(cluster) {
                return;
            }
            if zeroes {
                return state.set(cluster, Kept::Zeroes);
            }
            let taken = state.slots.take();
            drop(state);
            let why = match taken.map(|slot| self.store.write(slot, &content)) {
                Some(Ok(())) => None,
                Some(Err(e)) => Some(if full(&e) { Lost::NoSpace } else { Lost::Store }),
                None => Some(Lost::Limit),
            };
            let mut state = locked(&self.state);
            match (taken, why) {
                (Some(slot), None) => return state.set(cluster, Kept::Stored(slot)),
                (Some(slot), Some(_)) => state.slots.put_back(slot),
                (None, _) => {}
            }
            let why = why.unwrap_or(Lost::Store);
            // What that one used is now free, and is taken first.
            given_up.extend(state.give_up(|_| true, why).map(|id| (id, why)));
            self.tell_newest(&state);
        }
    }

    fn base(&self) -> &dyn Bytes {
        match &self.base {
            Base::File(file) => file,
            Base::Layers(base) => &**base,
        }
    }

    fn tell_newest(&self, state: &State) {
        let newest = state.live.last().map(|live| Arc::clone(&live.table));
        *self.newest.write().unwrap_or_else(PoisonError::into_inner) = newest;
    }

    /// A file of its own with what the disk holds now, if the file system can share the blocks.
    fn copy_by_reflink(&self) -> Option<File> {
        let (Base::File(base), Some(dir)) = (&self.base, &self.reflink) else { return None };
        if self.no_reflinks.load(Ordering::Relaxed) {
            return None;
        }
        let copied = Nameless::new(dir).and_then(|copy| reflink(base.file(), &copy.file).map(|()| copy.reader));
        // Whatever it is, there is the other way. Only what will not change is remembered.
        let never = [Errno::EOPNOTSUPP, Errno::ENOTTY, Errno::EXDEV, Errno::EINVAL, Errno::ENOSYS];
        let unable = |e: &io::Error| never.map(|errno| Some(errno as i32)).contains(&e.raw_os_error());
        if copied.as_ref().is_err_and(unable) {
            self.no_reflinks.store(true, Ordering::Relaxed);
        }
        copied.ok()
    }

    /// Ends a generation, and gives back its space.
    fn end(&self, id: GenerationId) {
        let mut state = locked(&self.state);
        state.give_up(|live| live.id == id, Lost::Ended);
        self.tell_newest(&state);
        drop(state);
        self.give_space_back();
    }

    /// Gives back what nobody uses.
    fn give_space_back(&self) {
        let mut warm = locked(&self.state).slots.take_warm();
        self.store.punch(&mut warm);
        locked(&self.state).slots.chill(warm);
    }
}

impl std::fmt::Debug for Freezer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Freezer").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

impl State {
    fn lacks(&self, cluster: u64) -> bool {
        self.live.iter().any(|live| live.table.lacks(cluster))
    }

    /// Says to all generations that lack the cluster where it is.
    fn set(&mut self, cluster: u64, kept: Kept) {
        let mut used = false;
        for live in self.live.iter_mut().filter(|live| live.table.lacks(cluster)) {
            if let Kept::Stored(slot) = kept {
                self.slots.hold(slot);
                live.held.push(slot);
                used = true;
            }
            live.table.set(cluster, kept);
        }
        if let (Kept::Stored(slot), false) = (kept, used) {
            self.slots.put_back(slot);
        }
    }

    /// Gives up the oldest generation of which `which` is true, and says which that is.
    fn give_up(&mut self, which: impl Fn(&Live) -> bool, why: Lost) -> Option<GenerationId> {
        let at = self.live.iter().position(which)?;
        let live = self.live.remove(at);
        // Before anyone may overwrite what it needs, in the disk or in the store.
        live.table.give_up(why);
        for slot in live.held {
            self.slots.release(slot);
        }
        Some(live.id)
    }
}

fn full(error: &io::Error) -> bool {
    let full = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG];
    error.raw_os_error().is_some_and(|errno| full.contains(&errno))
}

fn reflink(from: &File, to: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: both are open descriptors; the call has no memory to touch.
    unsafe { ficlone(to, from as nix::sys::ioctl::ioctl_param_type) }?;
    Ok(())
}

/// A disk as it was at a fork point. Its children can read it as long as this lives and it is not [`Generation::lost`].
#[derive(Debug)]
pub struct Generation {
    freezer: Arc<Freezer>,
    id: GenerationId,
    len: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Preserved(Arc<Table>),
    /// A file that nobody writes.
    Copy(File),
}

impl Generation {
    /// Its name.
    pub fn id(&self) -> GenerationId {
        self.id
    }

    /// Why children cannot read it any more, if so.
    pub fn lost(&self) -> Option<Lost> {
        match &self.kind {
            Kind::Preserved(table) => table.lost(),
            Kind::Copy(_) => None,
        }
    }

    /// Whether it is a copy by reflink, which costs the source nothing.
    pub fn is_copy(&self) -> bool {
        matches!(self.kind, Kind::Copy(_))
    }

    /// What a child needs to read it: to be sent to as many as there are.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn parts(&self) -> io::Result<FrozenParts> {
        let shared = |file: &File| file.try_clone().map(OwnedFd::from);
        let cluster = CLUSTER as u32;
        let (state, fds) = match &self.kind {
            Kind::Copy(file) => (FrozenStateV1::File { len: self.len }, vec![shared(file)?]),
            Kind::Preserved(table) => {
                let (table, store) = (table.share()?, shared(self.freezer.store.reader())?);
                match &self.freezer.base {
                    Base::File(base) => {
                        let state = FrozenStateV1::Preserved { len: self.len, cluster };
                        (state, vec![shared(base.file())?, table, store])
                    }
                    Base::Layers(_) => (FrozenStateV1::Layer { len: self.len, cluster }, vec![table, store]),
                }
            }
        };
        Ok(FrozenParts { state, fds })
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Kind::Preserved(_) = self.kind {
            self.freezer.end(self.id);
        }
    }
}

impl FrozenParts {
    /// For a disk that nobody writes at all.
    ///
    /// # Errors
    /// What the system says; see [`reopen_read_only`].
    pub fn of_read_only(file: &File) -> io::Result<Self> {
        let file = HostBytes::new(reopen_read_only(file)?);
        let len = file.size()?;
        Ok(Self { state: FrozenStateV1::File { len }, fds: vec![file.file().try_clone()?.into()] })
    }
}
