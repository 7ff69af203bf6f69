//! The kernel of the CIVIC paper's way by itself, as fast as can be: the guest stands still, code is written into an empty piece of its memory
//! through QEMU's GDB stub, and a jump to it into `schedule()`. That is no way to look into a VM, for this is the VM itself; it is shown so that
//! nobody takes the pipeline's time (`paper.rs`) for the least that it could be.
//!
//! * The guest is no clone: nothing of its memory must be fetched when it is touched.
//! * A client of our own talks with the stub, not GDB.
//! * No breakpoint: the jump is written at once, the code lets only the first task through, and is taken away, with the jump, after the
//!   program has spoken, which is not counted.
//! * The helper is the program itself and not a script that starts it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::{FOLDER, PATIENCE, Program, Run, WORD};
use crate::bench::clock::Clock;
use crate::bench::guest::Guest;
use crate::bench::io::complaints;
use crate::bench::peer::code::{Helper, SPARE, assemble};
use crate::bench::peer::kernel::{CLAIM, IMAGE, Kernel, look_up};
use crate::bench::peer::stub::Stub;
use crate::bench::peer::{plug_store, unplug_store};
use crate::bench::qmp::Qmp;

/// QEMU with its guest.
pub struct Bare<'a> {
    guest: Guest<'a>,
    qmp: Qmp,
    stub: PathBuf,
    store: PathBuf,
    kernel: Kernel,
}

impl<'a> Bare<'a> {
    /// Looks at a guest that is up, and has it stand still.
    pub fn new(mut guest: Guest<'a>, control: &Path, stub: PathBuf, store: PathBuf) -> Result<Self> {
        let symbols = guest.run(&look_up(), PATIENCE)?;
        let mut qmp = Qmp::connect(control, PATIENCE)?;
        qmp.execute("stop", json!({}), PATIENCE)?;
        let kernel = Kernel::new(&symbols, &mut Stub::connect(&stub, PATIENCE)?)?;
        Ok(Self { guest, qmp, stub, store, kernel })
    }

    fn go(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({}), PATIENCE).map(drop)
    }

    fn halt(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}), PATIENCE).map(drop)
    }

    /// Has the guest start programs: with the store just plugged in, and then once more.
    pub fn round(&mut self, programs: &[Program; 2], clock: &Clock) -> Result<[Run; 2]> {
        self.go()?;
        self.guest.run("true", PATIENCE)?;
        self.halt()?;
        plug_store(&mut self.qmp, &self.store, PATIENCE)?;
        let first = self.start(&programs[0], clock)?;
        self.halt()?;
        let again = self.start(&programs[1], clock)?;
        unplug_store(&mut self.qmp, PATIENCE)?;
        self.halt()?;
        Ok([first, again])
    }

    /// From a guest that stands still until a program in it speaks; afterwards all is as before and the guest runs.
    fn start(&mut self, program: &Program, clock: &Clock) -> Result<Run> {
        let kernel = self.kernel;
        let argv = [WORD, &program.0];
        let helper = Helper { device: "/dev/vda", folder: FOLDER, argv: &argv };
        let (mark, call) = (clock.mark(), Instant::now());
        let mut stub = Stub::connect(&self.stub, PATIENCE)?;
        let (jump, code) = assemble(&kernel.targets, &helper, kernel.spare, kernel.page, kernel.claim);
        stub.write(CLAIM, &[0; 8])?;
        stub.write(kernel.page - IMAGE, &code)?;
        stub.write(kernel.spare - IMAGE, &jump)?;
        stub.go()?;
        let spoke = match self.guest.wait(&program.line(), PATIENCE) {
            Ok((_, spoke)) => spoke,
            Err(e) => {
                let flag = stub.stop().and_then(|()| stub.read(CLAIM, 1));
                return Err(e.context(format!("the program in QEMU's guest; a task came by: {flag:?}")));
            }
        };
        let stretch = clock.stretch(&mark)?;
        let took = (spoke - call).as_secs_f64() * 1e3 / stretch;
        stub.stop()?;
        stub.write(kernel.spare - IMAGE, &SPARE)?;
        // A task may still be in there.
        stub.go()?;
        self.guest.run(&format!("until umount {FOLDER}; do usleep 50000; done 2>/dev/null"), PATIENCE)?;
        stub.stop()?;
        stub.write(kernel.page - IMAGE, &vec![kernel.filler; code.len()])?;
        stub.write(CLAIM, &[0; 8])?;
        stub.detach()?;
        Ok(Run { took, stages: Vec::new() })
    }

    /// Fails if the guest's kernel complained; and lets it go on.
    pub fn finish(mut self) -> Result<()> {
        self.go()?;
        complaints(&mut self.guest)
    }
}
