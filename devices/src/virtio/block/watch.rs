//! Someone who is told before what an open disk consists of changes: a fork of the VM keeps what was there.
//!
//! Invariant: whoever changes a [`HostFile`]'s bytes says so first. Jobs do where they begin (`Engine::begin`), imago's own writes in
//! `ImageFile`, and an image's allocating writes in `Image`.

use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Wants to know what a disk's writers are about to do. Called by several threads at a time.
pub trait BeforeWrite: Send + Sync {
    /// Bytes in `range` are about to change; when this returns they may. For a disk in a file they are the file's bytes, whatever its
    /// format. The guest waits for it, so it must not take longer than it has to.
    fn before_write(&self, range: Range<u64>);

    /// Whether what is in `range` is still needed: then a discard, which is a hint, is left out.
    fn needs(&self, range: Range<u64>) -> bool;
}

/// Whom to tell. Nobody, mostly.
#[derive(Default)]
pub struct Watch {
    watched: AtomicBool,
    watcher: RwLock<Option<Arc<dyn BeforeWrite>>>,
}

impl Watch {
    /// From now on `watcher` is told.
    pub fn set(&self, watcher: Option<Arc<dyn BeforeWrite>>) {
        let watched = watcher.is_some();
        *self.watcher.write().unwrap_or_else(PoisonError::into_inner) = watcher;
        self.watched.store(watched, Ordering::Release);
    }

    /// To be called before `len` bytes at `offset` change.
    pub fn before_write(&self, offset: u64, len: u64) {
        if let Some(watcher) = self.watcher() {
            watcher.before_write(offset..offset.saturating_add(len));
        }
    }

    /// Whether someone needs what is there.
    pub fn needs(&self, offset: u64, len: u64) -> bool {
        self.watcher().is_some_and(|watcher| watcher.needs(offset..offset.saturating_add(len)))
    }

    fn watcher(&self) -> Option<Arc<dyn BeforeWrite>> {
        // Whoever set it did so while nothing was in flight, or has no right to be told of what is.
        if !self.watched.load(Ordering::Acquire) {
            return None;
        }
        self.watcher.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.watched).finish()
    }
}

/// An open file or block device, and who is told before it changes.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    /// To be told.
    pub watch: Watch,
}

impl HostFile {
    /// `file`, of which nobody wants to know.
    pub fn new(file: File) -> Self {
        Self { file, watch: Watch::default() }
    }
}

impl Deref for HostFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
