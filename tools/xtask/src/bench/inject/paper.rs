//! The CIVIC paper's way, whole: a clone of a running guest that fetches its memory by post-copy when it touches it (section 3.2), a store
//! plugged into it, and GDB, which has it start a shell script on that store (`peer.rs` says what stands for what).
//!
//! ```text
//!  source ── background-snapshot ──▶ second, stands still ── post-copy, page by page ──▶ clone ◀── gdb
//! ```
//!
//! Where there is a choice it is made for speed: all that GDB is to write is in files beforehand; GDB is Debian's smallest, without Python, and
//! looks at no symbols; the store is plugged in while the clone stands still, which is not counted, as it is not where Civic forks with `--store`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use super::{FOLDER, LOADER, PATIENCE, Program, Run};
use crate::bench::clock::Clock;
use crate::bench::guest::Guest;
use crate::bench::io::complaints;
use crate::bench::machine::{Spec, Tools};
use crate::bench::peer::clone::{Second, Sockets, Source};
use crate::bench::peer::code::Helper;
use crate::bench::peer::gdb::Injection;
use crate::bench::peer::kernel::{Kernel, look_up};
use crate::bench::peer::plug_store;
use crate::bench::peer::stub::Stub;

/// QEMU with the guest that is cloned.
pub struct Paper<'a> {
    tools: &'a Tools,
    source: Source<'a>,
    second: Spec,
    clone: Spec,
    /// The clone's.
    sockets: Sockets,
    store: PathBuf,
    kernel: Kernel,
}

/// What a [`Paper`] is made with.
pub struct Parts<'a> {
    pub guest: Guest<'a>,
    /// The source's control socket, and its GDB stub's, which is used to look at its kernel only.
    pub control: PathBuf,
    pub stub: PathBuf,
    pub second: Spec,
    pub clone: Spec,
    /// Those two's.
    pub sockets: [Sockets; 2],
    pub store: PathBuf,
}

impl<'a> Paper<'a> {
    /// Looks at a guest that is up, and has it stand still.
    pub fn new(tools: &'a Tools, parts: Parts<'a>) -> Result<Self> {
        let Parts { mut guest, control, stub, second, clone, sockets: [seconds, sockets], store } = parts;
        let symbols = guest.run(&look_up(), PATIENCE)?;
        let mut source = Source::new(tools, guest, &control, seconds, PATIENCE)?;
        source.halt()?;
        let kernel = Kernel::new(&symbols, &mut Stub::connect(&stub, PATIENCE)?)?;
        Ok(Self { tools, source, second, clone, sockets, store, kernel })
    }

    /// Has a clone start programs: with the store just plugged in, and then once more.
    pub fn round(&mut self, round: usize, programs: &[Program; 2], clock: &Clock) -> Result<[Run; 2]> {
        self.source.go()?;
        self.source.guest.run("true", PATIENCE)?;
        let mut second = self.source.second(&self.second, format!("bench-second-{round}"))?;
        self.source.snapshot()?;
        second.runs(PATIENCE)?;
        second.halt(PATIENCE)?;
        self.source.complete()?;
        self.source.halt()?;
        let name = format!("bench-clone-{round}");
        let mut clone = second.clone_on_demand(self.tools, &self.clone, &self.sockets, name, PATIENCE)?;
        plug_store(&mut clone.qmp, &self.store, PATIENCE)?;
        let first = self.start(&mut clone, &programs[0], clock)?;
        clone.halt(PATIENCE)?;
        let again = self.start(&mut clone, &programs[1], clock)?;
        complaints(&mut clone.guest)?;
        Ok([first, again])
    }

    /// From a clone that stands still until a program in it speaks; afterwards that has ended and the clone runs.
    fn start(&self, clone: &mut Second<'_>, program: &Program, clock: &Clock) -> Result<Run> {
        let argv = [LOADER, &program.0];
        let helper = Helper { device: "/dev/vda", folder: FOLDER, argv: &argv };
        let injection = Injection::prepare(self.tools, self.sockets.stub(), &self.kernel, &helper)?;
        let (mark, call) = (clock.mark(), Instant::now());
        let gdb = injection.begin()?;
        let spoke = clone.guest.wait(&program.line(), PATIENCE);
        let stretch = clock.stretch(&mark)?;
        let (_, spoke) = spoke.map_err(|e| e.context(format!("the program in QEMU's clone; gdb: {}", gdb.said())))?;
        gdb.end(PATIENCE)?;
        clone.guest.run(&format!("until umount {FOLDER}; do usleep 50000; done 2>/dev/null"), PATIENCE)?;
        Ok(Run { took: (spoke - call).as_secs_f64() * 1e3 / stretch, stages: Vec::new() })
    }
}
