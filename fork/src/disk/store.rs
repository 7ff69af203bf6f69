//! The store: a file of clusters that the source overwrote, and who uses which.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::CLUSTER;
use super::files::{Nameless, punch};
use super::table::Slot;

/// The file. Clusters in it are written once by whoever was given the slot, and then only read, until nobody uses them.
#[derive(Debug)]
pub struct Store {
    files: Nameless,
    #[cfg(test)]
    pub faults: tests::Faults,
}

impl Store {
    /// An empty one on the file system of the folder `dir`.
    pub fn new(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            files: Nameless::new(dir)?,
            #[cfg(test)]
            faults: tests::Faults::default(),
        })
    }

    /// For children: it cannot be written through this.
    pub fn reader(&self) -> &File {
        &self.files.reader
    }

    /// Stores a cluster.
    pub fn write(&self, slot: Slot, content: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        self.faults.check()?;
        self.files.file.write_all_at(content, slot.offset())
    }

    /// Gives back the space of slots that nobody uses.
    pub fn punch(&self, slots: &mut [Slot]) {
        slots.sort_unstable();
        for run in slots.chunk_by(|a, b| a.place() + 1 == b.place()) {
            // Where the file system has no holes the space is used again, if not given back.
            let _ = punch(&self.files.file, run[0].offset(), run.len() as u64 * CLUSTER);
        }
    }
}

/// Which slots are in use, and by how many generations.
#[derive(Debug)]
pub struct Slots {
    /// By place, as far as slots were ever given out.
    users: Vec<u32>,
    /// Free, with blocks on the disk: to be preferred, for they cost no space.
    warm: Vec<Slot>,
    /// Free, given back.
    cold: Vec<Slot>,
    most: u32,
}

impl Slots {
    /// For a store of up to so many bytes.
    pub fn new(limit: u64) -> Self {
        let most = u32::try_from(limit / CLUSTER).unwrap_or(u32::MAX).min(Slot::MOST);
        Self { users: Vec::new(), warm: Vec::new(), cold: Vec::new(), most }
    }

    /// A slot that nobody uses; `None` at the limit.
    pub fn take(&mut self) -> Option<Slot> {
        let fresh = |users: &mut Vec<u32>| {
            let place = u32::try_from(users.len()).ok().filter(|place| *place < self.most)?;
            users.push(0);
            Slot::at(place)
        };
        self.warm.pop().or_else(|| self.cold.pop()).or_else(|| fresh(&mut self.users))
    }

    /// Gives back a slot that was taken and got no users, but may have some blocks.
    pub fn put_back(&mut self, slot: Slot) {
        self.warm.push(slot);
    }

    /// Notes another user.
    pub fn hold(&mut self, slot: Slot) {
        self.users[slot.place() as usize] += 1;
    }

    /// A user is gone.
    pub fn release(&mut self, slot: Slot) {
        let users = &mut self.users[slot.place() as usize];
        *users -= 1;
        if *users == 0 {
            self.warm.push(slot);
        }
    }

    /// Hands out the free slots that have blocks, for these to be given back.
    pub fn take_warm(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.warm)
    }

    /// Takes back slots whose blocks were given back.
    pub fn chill(&mut self, slots: Vec<Slot>) {
        self.cold.extend(slots);
    }

    /// How many are used or have blocks.
    pub fn taken(&self) -> u64 {
        (self.users.len() - self.cold.len()) as u64
    }
}

#[cfg(test)]
pub mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Mutex;

    use super::super::locked;
    use super::*;

    type Meanwhile = Box<dyn FnOnce() + Send>;

    /// What a store's writes come to.
    #[derive(Default)]
    pub struct Faults {
        failing: Mutex<Option<(u64, i32)>>,
        meanwhile: Mutex<Option<Meanwhile>>,
    }

    impl std::fmt::Debug for Faults {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Faults").field("failing", &self.failing).finish_non_exhaustive()
        }
    }

    impl Faults {
        /// After so many more writes, all fail with this error, until told otherwise.
        pub fn set(&self, faults: Option<(u64, i32)>) {
            *locked(&self.failing) = faults;
        }

        /// Happens while the next write is going on.
        pub fn meanwhile(&self, what: impl FnOnce() + Send + 'static) {
            *locked(&self.meanwhile) = Some(Box::new(what));
        }

        pub fn check(&self) -> io::Result<()> {
            let meanwhile = locked(&self.meanwhile).take();
            if let Some(meanwhile) = meanwhile {
                meanwhile();
            }
            match &mut *locked(&self.failing) {
                None => Ok(()),
                Some((0, errno)) => Err(io::Error::from_raw_os_error(*errno)),
                Some((left, _)) => {
                    *left -= 1;
                    Ok(())
                }
            }
        }
    }

    #[test]
    fn slots_come_back_when_their_last_user_is_gone() {
        let mut slots = Slots::new(3 * CLUSTER + 1);
        let taken: Vec<_> = std::iter::from_fn(|| slots.take()).collect();
        assert_eq!(taken.len(), 3);
        slots.hold(taken[1]);
        slots.hold(taken[1]);
        slots.release(taken[1]);
        assert_eq!((slots.take(), slots.taken()), (None, 3));
        slots.release(taken[1]);
        let warm = slots.take_warm();
        assert_eq!((&warm[..], slots.take()), (&taken[1..2], None));
        slots.chill(warm);
        assert_eq!((slots.taken(), slots.take(), slots.taken()), (2, Some(taken[1]), 3));
        slots.put_back(taken[1]);
        assert_eq!(slots.take(), Some(taken[1]));
    }

    #[test]
    fn punching_gives_space_back() {
        let store = Store::new(&std::env::temp_dir()).unwrap();
        let slot = |place| Slot::at(place).unwrap();
        for place in 0..10 {
            store.write(slot(place), &[7; CLUSTER as usize]).unwrap();
        }
        let before = store.reader().metadata().unwrap().blocks();
        store.punch(&mut [slot(7), slot(2), slot(1), slot(8), slot(4)]);
        let after = store.reader().metadata().unwrap().blocks();
        assert_eq!((before, after), (10 * CLUSTER / 512, 5 * CLUSTER / 512));
    }
}
