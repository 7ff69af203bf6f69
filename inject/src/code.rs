//! What runs in the guest's kernel: made for one kernel and one address, with nothing left to be resolved there.
//!
//! ```text
//! 0x0000  stub     queue a user-mode helper, ring            runs in place of schedule(), in whatever task came by; never sleeps
//!         init     tmpfs, loader into it, working directory  runs in the helper's new task, just before its exec; may sleep
//!         cleanup  keep the outcome, ring                    runs once, when the exec has succeeded or anything failed
//! 0x1000  mailbox  what came of it (Mailbox)
//! 0x2000  strings  path, arguments, environment
//! 0x3000  the loader's image
//! ```
//!
//! Rings are `out` instructions, at which a vCPU leaves the guest with its registers. None of the three parts is returned through once the
//! mailbox says that both have rung: the monitor finishes the stub and the cleanup itself, so the memory may go before their tasks go on.
//!
//! The tmpfs is attached nowhere: the helper's working directory and its running program hold it, and with the last of them it is gone.
//! The file must be closed for good before the exec, or that is refused (ETXTBSY), and a plain `fput` is put off: in a kernel thread,
//! which the helper is up to 5.18, to a work (so `__fput_sync`), else to the task's own work (so that is run).
//!
//! Rules of that place: direct calls only (an indirect one may meet a sealed ENDBR), ENDBR where the kernel calls us through a pointer,
//! no red zone, no vector registers, stack aligned to 8, and gfp 0, which neither sleeps nor reclaims in any version.

use civic_guest::memory::Gva;
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use crate::targets::Targets;

/// The port of the rings, and of the trap in the kernel's own text: one whose number fits an `out` of two bytes.
pub const PORT: u8 = 0xe4;
/// Length of the instruction that rings.
pub const OUT_LEN: u64 = 2;
/// It.
pub const OUT: [u8; OUT_LEN as usize] = [0xe6, PORT];

/// How long the slot is, and how it must be aligned: what one page directory entry maps.
pub const SLOT_BYTES: u64 = 2 << 20;

const MAILBOX: u64 = 0x1000;
const STRINGS: u64 = 0x2000;
const LOADER: u64 = 0x3000;

const NAME: &str = "civic";
const ENVIRONMENT: [&str; 2] = ["HOME=/", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];
/// From here to the top, a pointer is an error (`IS_ERR_VALUE`, include/linux/err.h).
const FIRST_ERROR: i32 = -4095;
/// `PF_KTHREAD`, include/linux/sched.h.
const KERNEL_THREAD: i32 = 0x0020_0000;
/// `O_WRONLY | O_CREAT`.
const OPEN_FLAGS: u32 = 0o101;
const MODE: u32 = 0o700;

/// Why there is no code.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// It does not fit the slot.
    #[error("the loader and its arguments take {bytes} bytes, more than the {SLOT_BYTES} that there are")]
    TooLong {
        /// What it would take.
        bytes: u64,
    },
    /// The kernel's functions cannot be called from there, or it is a fault of ours.
    #[error("cannot assemble what is to run in the guest's kernel")]
    Assemble(#[from] IcedError),
}

/// Code and data for a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    at: Gva,
    bytes: Vec<u8>,
    queued: Gva,
    finished: Gva,
}

/// What happens when the guest rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// The stub: the helper is queued, or cannot be.
    Queued,
    /// The cleanup: nothing of the slot is needed any more.
    Finished,
}

impl Code {
    /// For the slot at `at`: has the loader started with these arguments, after its name.
    ///
    /// # Errors
    /// When it does not fit, or the kernel is out of reach.
    pub fn new(targets: &Targets, at: Gva, loader: &[u8], arguments: &[&str]) -> Result<Self, CodeError> {
        let mut strings = Strings { at: at.0 + STRINGS, bytes: Vec::new() };
        let path = strings.text(NAME);
        let tmpfs = strings.text("tmpfs");
        let argv = strings.list([NAME].iter().chain(arguments));
        let envp = strings.list(&ENVIRONMENT);
        let bytes = STRINGS + strings.bytes.len() as u64;
        if bytes > LOADER {
            return Err(CodeError::TooLong { bytes });
        }
        let places = Places { at: at.0, path, tmpfs, argv, envp, loader_bytes: loader.len() as u64 };
        let (code, [queued, finished]) = assemble(targets, &places)?;
        let bytes = LOADER + loader.len() as u64;
        if bytes > SLOT_BYTES || code.len() as u64 > MAILBOX {
            return Err(CodeError::TooLong { bytes });
        }
        let mut all = vec![0; bytes as usize];
        for (offset, part) in [(0, &code[..]), (MAILBOX, &Mailbox::EMPTY), (STRINGS, &strings.bytes), (LOADER, loader)]
        {
            all[offset as usize..][..part.len()].copy_from_slice(part);
        }
        Ok(Self { at, bytes: all, queued: Gva(queued), finished: Gva(finished) })
    }

    /// What the slot holds from its start.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where a task is to go on that is to queue the helper: with its registers as they are at the entry of `schedule()`.
    pub fn stub(&self) -> Gva {
        self.at
    }

    /// Whether the instruction before `rip` is a ring.
    pub fn ring(&self, rip: Gva) -> Option<Ring> {
        match rip {
            rip if rip == self.queued => Some(Ring::Queued),
            rip if rip == self.finished => Some(Ring::Finished),
            _ => None,
        }
    }

    /// Whether it is an address of the slot.
    pub fn contains(&self, at: Gva) -> bool {
        (self.at.0..self.at.0 + SLOT_BYTES).contains(&at.0)
    }
}

/// What the guest has left in the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mailbox {
    /// What `call_usermodehelper_exec` returned, or -ENOMEM if it was not reached; none before.
    pub queued: Option<i32>,
    /// The helper's `retval`: 0, or why there was no exec; none before the cleanup.
    pub finished: Option<i32>,
    /// How far init has come, and what it got there.
    pub stage: Stage,
    /// What the last call in init returned.
    pub last: i64,
}

/// How far init has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It has not begun.
    NotBegun,
    /// It has asked for the tmpfs.
    FileSystem,
    /// It has made one.
    Mount,
    /// It has opened a file there.
    File,
    /// It has written the loader.
    Written,
    /// All is done.
    Ready,
    /// Nothing of ours.
    Unknown(u32),
}

impl Mailbox {
    const NEVER: i32 = i32::MAX;
    const EMPTY: [u8; Self::LEN] = {
        let mut empty = [0; Self::LEN];
        let never = Self::NEVER.to_le_bytes();
        let mut n = 0;
        while n < never.len() {
            empty[n] = never[n];
            empty[4 + n] = never[n];
            n += 1;
        }
        empty
    };
    const QUEUED: u64 = 0;
    const FINISHED: u64 = 4;
    const STAGE: u64 = 8;
    const LAST: u64 = 16;

    /// Its bytes.
    pub const LEN: usize = 24;
    /// Where it is in the slot.
    pub const AT: u64 = MAILBOX;

    /// From the slot's bytes at [`Mailbox::AT`], which the guest may have written as it likes.
    pub fn read(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: u64| i32::from_le_bytes(std::array::from_fn(|n| bytes[at as usize + n]));
        let told = |word: i32| (word != Self::NEVER).then_some(word);
        let stage = match word(Self::STAGE) as u32 {
            0 => Stage::NotBegun,
            1 => Stage::FileSystem,
            2 => Stage::Mount,
            3 => Stage::File,
            4 => Stage::Written,
            5 => Stage::Ready,
            other => Stage::Unknown(other),
        };
        let last = i64::from_le_bytes(std::array::from_fn(|n| bytes[Self::LAST as usize + n]));
        Self { queued: told(word(Self::QUEUED)), finished: told(word(Self::FINISHED)), stage, last }
    }
}

/// Zero-terminated strings and lists of pointers to them.
struct Strings {
    at: u64,
    bytes: Vec<u8>,
}

impl Strings {
    fn here(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }

    fn text(&mut self, text: &str) -> u64 {
        let at = self.here();
        self.bytes.extend(text.bytes());
        self.bytes.push(0);
        at
    }

    fn list<'a>(&mut self, texts: impl IntoIterator<Item = &'a &'a str>) -> u64 {
        let mut pointers: Vec<u64> = texts.into_iter().map(|text| self.text(text)).collect();
        pointers.push(0);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.here();
        self.bytes.extend(pointers.iter().flat_map(|pointer| pointer.to_le_bytes()));
        at
    }
}

struct Places {
    at: u64,
    path: u64,
    tmpfs: u64,
    argv: u64,
    envp: u64,
    loader_bytes: u64,
}

impl Places {
    fn mailbox(&self, field: u64) -> u64 {
        self.at + MAILBOX + field
    }
}

/// The code, and the addresses behind its two rings.
fn assemble(targets: &Targets, places: &Places) -> Result<(Vec<u8>, [u64; 2]), IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    // With what follows: no direct call becomes an indirect one.
    asm.set_prefer_short_branch(false);
    let (mut init, mut cleanup) = (asm.create_label(), asm.create_label());
    let (mut queued, mut finished) = (asm.create_label(), asm.create_label());
    stub(&mut asm, targets, places, init, cleanup, &mut queued)?;
    asm.set_label(&mut init)?;
    self::init(&mut asm, targets, places)?;
    asm.set_label(&mut cleanup)?;
    asm.endbr64()?;
    asm.mov(eax, dword_ptr(rdi + targets.info_retval))?;
    asm.mov(dword_ptr(places.mailbox(Mailbox::FINISHED)), eax)?;
    asm.out(u32::from(PORT), al)?;
    asm.set_label(&mut finished)?;
    asm.ret()?;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS | BlockEncoderOptions::DONT_FIX_BRANCHES;
    let made = asm.assemble_options(places.at, options)?;
    let behind = [made.label_ip(&queued)?, made.label_ip(&finished)?];
    Ok((made.inner.code_buffer, behind))
}

/// Entered with the registers of whoever called `schedule()`; they are given back when it has rung.
fn stub(
    asm: &mut CodeAssembler,
    targets: &Targets,
    places: &Places,
    init: CodeLabel,
    cleanup: CodeLabel,
    queued: &mut CodeLabel,
) -> Result<(), IcedError> {
    let mut ring = asm.create_label();
    asm.mov(rdi, places.path)?;
    asm.mov(rsi, places.argv)?;
    asm.mov(rdx, places.envp)?;
    asm.xor(ecx, ecx)?;
    asm.lea(r8, ptr(init))?;
    asm.lea(r9, ptr(cleanup))?;
    // The seventh argument, of no use to us.
    asm.push(0)?;
    asm.call(targets.call_usermodehelper_setup.0)?;
    asm.add(rsp, 8)?;
    asm.mov(dword_ptr(places.mailbox(Mailbox::QUEUED)), -errno::ENOMEM)?;
    asm.test(rax, rax)?;
    asm.je(ring)?;
    // Where the kernel has one helper for all (CONFIG_STATIC_USERMODEHELPER), this is its path by now.
    asm.mov(rdx, places.path)?;
    asm.mov(qword_ptr(rax + targets.info_path), rdx)?;
    asm.mov(rdi, rax)?;
    // UMH_NO_WAIT.
    asm.xor(esi, esi)?;
    asm.call(targets.call_usermodehelper_exec.0)?;
    asm.mov(dword_ptr(places.mailbox(Mailbox::QUEUED)), eax)?;
    asm.set_label(&mut ring)?;
    asm.out(u32::from(PORT), al)?;
    asm.set_label(queued)?;
    asm.ud2()
}

/// `int init(struct subprocess_info *, struct cred *)`.
fn init(asm: &mut CodeAssembler, targets: &Targets, places: &Places) -> Result<(), IcedError> {
    let stage = |asm: &mut CodeAssembler, n: i32| {
        asm.mov(dword_ptr(places.mailbox(Mailbox::STAGE)), n)?;
        asm.mov(qword_ptr(places.mailbox(Mailbox::LAST)), rax)
    };
    let (mut no_type, mut fail, mut leave) = (asm.create_label(), asm.create_label(), asm.create_label());
    let (mut user_task, mut closed) = (asm.create_label(), asm.create_label());
    // On the stack: struct path { mnt, dentry }, loff_t.
    const PATH: u32 = 0;
    const POSITION: u32 = 16;
    asm.endbr64()?;
    for register in [rbx, r12, rbp] {
        asm.push(register)?;
    }
    asm.sub(rsp, 24)?;

    asm.mov(rdi, places.tmpfs)?;
    asm.call(targets.get_fs_type.0)?;
    stage(asm, 1)?;
    asm.test(rax, rax)?;
    asm.je(no_type)?;
    asm.mov(rdi, rax)?;
    asm.xor(esi, esi)?;
    asm.mov(rdx, places.tmpfs)?;
    asm.xor(ecx, ecx)?;
    asm.call(targets.vfs_kern_mount.0)?;
    stage(asm, 2)?;
    asm.cmp(rax, FIRST_ERROR)?;
    asm.jae(leave)?;
    asm.mov(r12, rax)?;
    asm.mov(qword_ptr(rsp + PATH), rax)?;
    asm.mov(rcx, qword_ptr(rax + targets.mount_root))?;
    asm.mov(qword_ptr(rsp + PATH + 8), rcx)?;

    asm.mov(rbp, qword_ptr(targets.current as i64 as u64).gs())?;
    asm.mov(rdi, qword_ptr(rbp + targets.task_fs))?;
    asm.mov(rsi, rsp)?;
    asm.call(targets.set_fs_pwd.0)?;
    asm.mov(rdi, places.path)?;
    asm.mov(esi, OPEN_FLAGS)?;
    asm.mov(edx, MODE)?;
    asm.call(targets.filp_open.0)?;
    stage(asm, 3)?;
    asm.cmp(rax, FIRST_ERROR)?;
    asm.jae(fail)?;
    asm.mov(rbx, rax)?;
    asm.mov(rdi, rax)?;
    asm.mov(rsi, places.at + LOADER)?;
    asm.mov(rdx, places.loader_bytes)?;
    asm.lea(rcx, qword_ptr(rsp + POSITION))?;
    asm.mov(qword_ptr(rcx), 0)?;
    asm.call(targets.kernel_write.0)?;
    stage(asm, 4)?;
    asm.mov(qword_ptr(rsp + POSITION), rax)?;
    asm.mov(rdi, rbx)?;
    asm.test(dword_ptr(rbp + targets.task_flags), KERNEL_THREAD)?;
    asm.je(user_task)?;
    asm.call(targets.fput_sync.0)?;
    asm.jmp(closed)?;
    asm.set_label(&mut user_task)?;
    asm.call(targets.fput.0)?;
    asm.call(targets.task_work_run.0)?;
    asm.set_label(&mut closed)?;
    asm.mov(rcx, qword_ptr(rsp + POSITION))?;
    asm.mov(rax, -i64::from(errno::EIO) as u64)?;
    asm.mov(rdx, places.loader_bytes)?;
    asm.cmp(rcx, rdx)?;
    asm.jne(fail)?;
    stage(asm, 5)?;
    asm.xor(eax, eax)?;
    asm.set_label(&mut fail)?;
    // From here on only the working directory and the running program hold the mount.
    asm.mov(rbx, rax)?;
    asm.mov(rdi, r12)?;
    asm.call(targets.mntput.0)?;
    asm.mov(eax, ebx)?;
    asm.jmp(leave)?;
    asm.set_label(&mut no_type)?;
    asm.mov(eax, -errno::ENODEV)?;
    asm.set_label(&mut leave)?;
    asm.add(rsp, 24)?;
    for register in [rbp, r12, rbx] {
        asm.pop(register)?;
    }
    asm.ret()
}

/// Of x86-64 Linux, which is the guest's here, whatever the host's.
mod errno {
    pub const EIO: i32 = 5;
    pub const ENOMEM: i32 = 12;
    pub const ENODEV: i32 = 19;
}

#[cfg(test)]
mod tests;
