//! Code injected by GDB at QEMU's stub, as the paper's section 3.5 has it: the real program, with a script, no symbols and no settings of
//! anybody's.
//!
//! ```text
//!  target remote ─▶ hbreak schedule ─▶ continue ─▶ a task is there
//!     ─▶ code, flag, jump written ─▶ hbreak code ─▶ continue ─▶ the task has jumped
//!     ─▶ instruction restored ─▶ detach
//! ```
//!
//! The paper writes its code before it breaks. Here that is done at the breakpoint: before it the guest may stand in a program whose page
//! tables lack its kernel. There is one more breakpoint, by which GDB knows that the jump was taken and may be undone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::code::{Helper, JUMP, SPARE, assemble};
use super::kernel::Kernel;
use crate::bench::machine::Tools;

/// All that one run of GDB needs, in files.
pub struct Injection<'a> {
    tools: &'a Tools,
    script: PathBuf,
    said: PathBuf,
}

impl<'a> Injection<'a> {
    /// Of what is to run in the guest whose QEMU has this stub.
    pub fn prepare(tools: &'a Tools, stub: &Path, kernel: &Kernel, helper: &Helper<'_>) -> Result<Self> {
        let file = |name: &str| tools.work.join(format!("injection.{name}"));
        let (jump, bytes) = assemble(&kernel.targets, helper, kernel.spare, kernel.page, kernel.claim);
        fs::write(file("code"), bytes)?;
        fs::write(file("gdb"), script(stub, kernel, &file("code"), jump))?;
        Ok(Self { tools, script: file("gdb"), said: file("said") })
    }

    /// Starts GDB.
    pub fn begin(self) -> Result<Running> {
        let mut command = self.tools.gdb();
        command.args(["-nx", "-nh", "-batch", "-x"]).arg(&self.script);
        let said = fs::File::create(&self.said)?;
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
        let child = command.spawn().context("cannot run gdb")?;
        Ok(Running { child, said: self.said })
    }
}

/// GDB at work; ended when dropped.
pub struct Running {
    child: Child,
    said: PathBuf,
}

impl Running {
    /// Waits until it has left the guest.
    pub fn end(mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "gdb does not end: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        };
        let said = self.said();
        // It goes on after some errors.
        if !status.success() || !said.contains(DONE) {
            bail!("gdb: {status}: {said}");
        }
        Ok(())
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Said by the script's last line.
const DONE: &str = "CIVIC-BENCH-INJECTED";

fn script(stub: &Path, kernel: &Kernel, code: &Path, jump: [u8; JUMP]) -> String {
    let Kernel { entry, spare, page, claim, .. } = kernel;
    let (jump, back) = (write(*spare, jump), write(*spare, SPARE));
    let (stub, code) = (stub.display(), code.display());
    format!(
        "set architecture i386:x86-64\ntarget remote {stub}\nhbreak *{entry:#x}\ncontinue\ndelete\n\
         restore {code} binary {page:#x}\nset {{unsigned long}}{claim:#x} = 0\n{jump}\
         hbreak *{page:#x}\ncontinue\ndelete\n{back}detach\necho {DONE}\\n\n"
    )
}

/// The instruction of five bytes at an address.
fn write(at: u64, bytes: [u8; JUMP]) -> String {
    let [first, rest @ ..] = bytes;
    let rest = u32::from_le_bytes(rest);
    format!("set {{unsigned int}}{:#x} = {rest:#x}\nset {{unsigned char}}{at:#x} = {first:#x}\n", at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::peer::code::Targets;

    #[test]
    fn the_script_breaks_writes_and_restores() {
        let targets = Targets {
            call_usermodehelper_setup: 1,
            call_usermodehelper_exec: 2,
            kern_path: 3,
            path_put: 4,
            path_mount: 5,
            usleep_range_state: 6,
        };
        let kernel = Kernel {
            targets,
            entry: 0xffff_ffff_8100_0000,
            spare: 0xffff_ffff_8100_0004,
            page: 0xffff_ffff_81ff_f000,
            claim: 0xffff_8880_0000_5000,
            filler: 0,
        };
        let said = script(Path::new("/s"), &kernel, Path::new("/c"), [0xe9, 1, 2, 3, 4]);
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines[1..5], ["target remote /s", "hbreak *0xffffffff81000000", "continue", "delete"]);
        assert_eq!(lines[5], "restore /c binary 0xffffffff81fff000");
        let there = lines.iter().position(|line| *line == "set {unsigned char}0xffffffff81000004 = 0xe9").unwrap();
        assert_eq!(lines[there - 1], "set {unsigned int}0xffffffff81000005 = 0x4030201");
        let back = lines.iter().position(|line| *line == "set {unsigned char}0xffffffff81000004 = 0xf").unwrap();
        assert_eq!(lines[back - 1], "set {unsigned int}0xffffffff81000005 = 0x441f");
        assert!(there < back && lines[back + 1] == "detach");
    }
}
