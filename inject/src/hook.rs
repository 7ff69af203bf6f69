//! One injection, seen from the vCPUs: what each does when it meets a trap.
//!
//! ```text
//!            schedule() reached                  stub rings                 cleanup rings
//!  Armed ─────────────────────▶ Diverted ─────────────────────▶ Queued ─────────────────▶ Done
//!                                   └──── cleanup rings first (the helper overtook us) ────▶ Done, once the stub has rung
//! ```
//!
//! Whoever meets the trap otherwise goes on where its site says. The task that is diverted gets all its registers back when the stub has
//! rung, on the vCPU that it is on by then: none of its own instructions runs twice or not at all, and it returns through nothing of ours.

use civic_guest::memory::Gva;

use crate::code::{Code, OUT_LEN, Ring};
use crate::site::Site;

/// What a vCPU is to do after it has left the guest by a trap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn<R> {
    /// Nothing: it was no trap of ours.
    Foreign,
    /// Go on here, with its other registers as they are.
    GoTo(Gva),
    /// Go on with these registers.
    Restore(R),
    /// Return: RIP becomes what RSP points to, which rises by 8.
    Return,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// No task has come by.
    Armed,
    /// A task is in the stub.
    Diverted,
    /// The helper waits to be run, or could not be queued.
    Queued,
    /// Nobody needs the slot any more.
    Done,
}

/// The traps of one injection. `R` is a vCPU's registers.
#[derive(Debug)]
pub struct Hook<R> {
    site: Site,
    code: Code,
    diverted: Option<R>,
    queued: bool,
    finished: bool,
}

impl<R: Clone> Hook<R> {
    /// With a trap at `site`.
    pub fn new(site: Site, code: Code) -> Self {
        Self { site, code, diverted: None, queued: false, finished: false }
    }

    /// Tells what a vCPU is to do that has just done the `out` before `rip`. `resume_at` gives its registers, to go on at an address.
    pub fn meet(&mut self, rip: Gva, resume_at: impl FnOnce(Gva) -> R) -> Turn<R> {
        if rip == self.site.at.plus(OUT_LEN) {
            if self.diverted.is_some() || self.queued {
                return Turn::GoTo(self.site.on);
            }
            self.diverted = Some(resume_at(self.site.on));
            return Turn::GoTo(self.code.stub());
        }
        match self.code.ring(rip) {
            Some(Ring::Queued) => match self.diverted.take() {
                Some(registers) => {
                    self.queued = true;
                    Turn::Restore(registers)
                }
                None => Turn::Foreign,
            },
            Some(Ring::Finished) => {
                self.finished = true;
                Turn::Return
            }
            None => Turn::Foreign,
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        match (self.diverted.is_some(), self.queued, self.finished) {
            (false, false, _) => Progress::Armed,
            (true, ..) => Progress::Diverted,
            (false, true, false) => Progress::Queued,
            (false, true, true) => Progress::Done,
        }
    }

    /// The code.
    pub fn code(&self) -> &Code {
        &self.code
    }
}

#[cfg(test)]
mod tests;
