//! The protocol in every order in which its steps can be seen, also by processors that see them in another order than they were done
//! in: what is `Relaxed` here is what the kernel does for a `pread` or `pwrite`. By loom, on a hand-made copy of the steps:
//!
//! * [`Model::write`], the writing: [`Freezer::before_write`] and then the file, for one cluster and one generation;
//! * [`Model::give_up`], the end of a generation, whose slot is used again at once;
//! * [`Model::read`], the reading: [`FrozenFile`]'s.

use loom::sync::atomic::{AtomicUsize, Ordering, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;

const OLD: usize = 1;
const NEW: usize = 2;

struct Model {
    base: AtomicUsize,
    store: AtomicUsize,
    slot: AtomicUsize,
    lost: AtomicUsize,
    /// Whether the generation is alive.
    state: Mutex<bool>,
}

impl Model {
    fn new() -> Arc<Self> {
        let [store, slot, lost] = [0, 0, 0].map(AtomicUsize::new);
        Arc::new(Self { base: AtomicUsize::new(OLD), store, slot, lost, state: Mutex::new(true) })
    }

    fn write(&self, bytes: usize) {
        if self.slot.load(Ordering::Acquire) == 0 {
            let state = self.state.lock().unwrap();
            if *state && self.slot.load(Ordering::Acquire) == 0 {
                // A load. Loom 0.7 would take a plain one for the last of all that the writes may conflict with, forget the reader's,
                // and try a single order.
                let old = self.base.fetch_add(0, Ordering::Relaxed);
                self.store.store(old, Ordering::Relaxed);
                self.slot.store(1, Ordering::Release);
            }
        }
        fence(Ordering::Release);
        self.base.store(bytes, Ordering::Relaxed);
    }

    fn give_up(&self) {
        let mut state = self.state.lock().unwrap();
        *state = false;
        self.lost.store(1, Ordering::Release);
        fence(Ordering::SeqCst);
        self.store.store(NEW, Ordering::Relaxed);
    }

    fn read(&self) -> Option<usize> {
        let mut bytes = self.base.load(Ordering::Relaxed);
        // The first look at the slot only saves a read of the base, so it is left out: there are fewer orders.
        fence(Ordering::Acquire);
        if self.slot.load(Ordering::Acquire) != 0 {
            bytes = self.store.load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        (self.lost.load(Ordering::Acquire) == 0).then_some(bytes)
    }
}

#[test]
fn in_no_order_does_a_child_see_another_time() {
    loom::model(|| {
        let model = Model::new();
        let write = |bytes| {
            let model = Arc::clone(&model);
            thread::spawn(move || model.write(bytes))
        };
        let writers = [write(NEW), write(NEW + 1)];
        assert_eq!(model.read(), Some(OLD));
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(model.read(), Some(OLD));
    });
}

#[test]
fn nor_of_a_generation_that_is_given_up() {
    loom::model(|| {
        let model = Model::new();
        let other = Arc::clone(&model);
        let source = thread::spawn(move || {
            other.write(NEW);
            other.give_up();
            other.write(NEW + 1);
        });
        assert!(model.read().is_none_or(|bytes| bytes == OLD));
        source.join().unwrap();
        assert_eq!(model.read(), None);
    });
}
