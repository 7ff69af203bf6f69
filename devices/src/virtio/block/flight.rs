//! One request on its way: which job comes next, and what becomes of it when one fails.
//!
//! ```text
//!  next ──▶ job ── done ──▶ next ──▶ … ──▶ landed
//!            └── failed ──▶ recover ──▶ another job, or the request fails
//! ```
//!
//! A request has at most one job at a time, so no more jobs are in flight than requests.

use std::collections::VecDeque;
use std::io;

use super::disk::{Disk, Place};
use super::job::{Action, Job};
use super::request::Extent;
use crate::virtio::held::HeldAreas;

/// What of a request is left to do.
pub enum Work {
    /// Move `areas` from or to the disk.
    Transfer {
        /// To it.
        write: bool,
        /// Where.
        offset: u64,
        /// Not yet begun.
        areas: HeldAreas,
    },
    /// Bring everything to the disk.
    Sync,
    /// Deallocate ranges.
    Discard(VecDeque<Extent>),
    /// Have ranges read as zeroes.
    WriteZeroes(VecDeque<Extent>),
}

/// How a range is being zeroed: from what costs least to what always works.
#[derive(Clone, Copy)]
enum Attempt {
    Punch,
    ZeroRange,
    Write,
}

/// A request that is being carried out.
pub struct Flight {
    work: Option<Work>,
    /// Whether what it changes must be on the disk before it is answered.
    stable: bool,
    /// The range that is being zeroed.
    zeroing: Option<(Extent, Attempt)>,
}

impl Flight {
    /// Takes on `work`. If `stable`, its effect is on the disk before it lands.
    pub fn new(work: Work, stable: bool) -> Self {
        Self { work: Some(work), stable, zeroing: None }
    }

    /// The next job; `None` when all is done.
    ///
    /// # Errors
    /// When the disk cannot say where to turn.
    pub fn next(&mut self, disk: &Disk) -> io::Result<Option<Job>> {
        self.zeroing = None;
        let job = match &mut self.work {
            None => return Ok(None),
            Some(Work::Transfer { write, offset, areas }) => transfer(disk, *write, self.stable, offset, areas)?,
            Some(Work::Sync) => {
                self.work = None;
                return Ok(Some(Job::bare(disk.target(), Action::Sync, 0)));
            }
            Some(Work::Discard(extents)) => {
                let discard = |Extent { offset, len, .. }| Job::bare(disk.target(), Action::Discard { len }, offset);
                extents.pop_front().map(discard)
            }
            Some(Work::WriteZeroes(extents)) => {
                let first = |extent: Extent| if extent.unmap { Attempt::Punch } else { Attempt::ZeroRange };
                self.zeroing = extents.pop_front().map(|extent| (extent, first(extent)));
                self.zero(disk)
            }
        };
        if job.is_some() {
            return Ok(job);
        }
        // A transfer's writes say it themselves.
        let sync = self.stable && !matches!(self.work, Some(Work::Transfer { .. }));
        self.work = sync.then_some(Work::Sync);
        if sync { self.next(disk) } else { Ok(None) }
    }

    /// What to do instead of the job that failed.
    ///
    /// # Errors
    /// The failure, when there is nothing.
    pub fn recover(&mut self, disk: &Disk, error: io::Error) -> io::Result<Option<Job>> {
        if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
            return Err(error);
        }
        match (&self.work, &mut self.zeroing) {
            (_, Some((_, attempt))) => {
                *attempt = match attempt {
                    Attempt::Punch => Attempt::ZeroRange,
                    Attempt::ZeroRange => Attempt::Write,
                    Attempt::Write => return Err(error),
                };
                Ok(self.zero(disk))
            }
            // It was only a hint.
            (Some(Work::Discard(_)), None) => self.next(disk),
            _ => Err(error),
        }
    }

    fn zero(&self, disk: &Disk) -> Option<Job> {
        let (Extent { offset, len, .. }, attempt) = self.zeroing?;
        Some(match attempt {
            Attempt::Punch => Job::bare(disk.target(), Action::Punch { len }, offset),
            Attempt::ZeroRange => Job::bare(disk.target(), Action::ZeroRange { len }, offset),
            Attempt::Write => {
                let areas = HeldAreas::zeroes(len as usize);
                Job { areas, ..Job::bare(disk.target(), Action::Write { stable: false }, offset) }
            }
        })
    }
}

/// The job for the next part of a transfer, which is then no longer left.
fn transfer(
    disk: &Disk,
    write: bool,
    stable: bool,
    offset: &mut u64,
    areas: &mut HeldAreas,
) -> io::Result<Option<Job>> {
    while !areas.is_empty() {
        let place = disk.locate(*offset, areas.len() as u64, write, stable)?;
        let (Place::There { len, .. } | Place::Zeroes(len)) = &place;
        let part = areas.take(usize::try_from(*len).unwrap_or(usize::MAX));
        *offset += part.len() as u64;
        match place {
            Place::Zeroes(_) => part.clear(),
            Place::There { target, offset, padded, lease, .. } => {
                let action = if write { Action::Write { stable } } else { Action::Read { padded } };
                return Ok(Some(Job { areas: part, lease, ..Job::bare(target, action, offset) }));
            }
        }
    }
    Ok(None)
}
