//! The loader's hypercalls, answered by a tracer in place of a monitor.
//!
//! Its `ioperm` is kept from the kernel, so its `out` faults, and the tracer does what a monitor does on such an exit. Its program is not
//! traced.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use civic_inject::knock;
use civic_inject::wire::{
    Exit, FromGuest, Job, Launch, OP_RECV, OP_SEND, Step, Strings, ToGuest, UNMAPPED, pack, split,
};
use nix::libc::{EPERM, SYS_ioperm, user_regs_struct};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::guest::{DEADLINE, loader};

const PORT: u64 = 0x5d0;
const TOKEN: u64 = 0xfeed_beef_0123_4567;

/// What stands in for the monitor.
#[derive(Default)]
struct Monitor {
    to_guest: Vec<u8>,
    from_guest: Vec<u8>,
    calls: usize,
    /// After so many calls, all fail.
    broken_after: Option<usize>,
    /// The kernel forbids ports, and there is a breakpoint.
    locked_down: bool,
}

impl Monitor {
    /// Answers a hypercall. Seldom all of it at once, and sometimes not at all.
    fn answer(&mut self, memory: &File, regs: &user_regs_struct) -> i64 {
        assert_eq!(regs.r8, TOKEN);
        self.calls += 1;
        if self.broken_after.is_some_and(|calls| self.calls > calls) {
            return -5;
        }
        match self.calls % 5 {
            1 => return UNMAPPED,
            2 => return 0,
            _ => {}
        }
        let len = (regs.rsi as usize).min(1 + self.calls * 37 % 5000);
        match regs.rax as u32 {
            OP_SEND => {
                let mut bytes = vec![0; len];
                memory.read_exact_at(&mut bytes, regs.rdi).unwrap();
                self.from_guest.extend(bytes);
                len as i64
            }
            OP_RECV => {
                assert_eq!((regs.rdi + regs.rsi) % 4096, 0, "the buffer ends with a page");
                let len = len.min(self.to_guest.len());
                memory.write_all_at(&self.to_guest[..len], regs.rdi).unwrap();
                self.to_guest.drain(..len);
                len as i64
            }
            op => panic!("{op:#x}"),
        }
    }

    /// Runs a loader to its end; gives its exit status.
    fn run(&mut self) -> i32 {
        let mut command = Command::new(loader());
        command.arg(format!("port:{PORT:x}:{TOKEN:x}"));
        // SAFETY: one system call, after which the process is traced by this thread.
        unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
        let pid = Pid::from_raw(command.spawn().unwrap().id().cast_signed());
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(pid, Signal::SIGTRAP));
        ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_EXITKILL).unwrap();
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        if self.locked_down {
            // int3, as a stand-in: the processor goes on behind it, as the monitor does.
            memory.write_all_at(&[0xcc], knock().0).unwrap();
        }
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < DEADLINE);
            ptrace::syscall(pid, None).unwrap();
            match waitpid(pid, None).unwrap() {
                WaitStatus::Exited(_, status) => return status,
                WaitStatus::PtraceSyscall(_) => keep_ioperm(pid, if self.locked_down { -EPERM } else { 0 }),
                WaitStatus::Stopped(_, Signal::SIGTRAP) if self.locked_down => {
                    let mut regs = ptrace::getregs(pid).unwrap();
                    assert_eq!(regs.rip, knock().0 + 1);
                    regs.rax = self.answer(&memory, &regs).cast_unsigned();
                    ptrace::setregs(pid, regs).unwrap();
                }
                WaitStatus::Stopped(_, Signal::SIGSEGV) => {
                    let mut regs = ptrace::getregs(pid).unwrap();
                    let mut instruction = [0];
                    memory.read_exact_at(&mut instruction, regs.rip).unwrap();
                    assert_eq!((instruction, regs.rdx & 0xffff), ([0xef], PORT), "out dx, eax");
                    regs.rax = self.answer(&memory, &regs).cast_unsigned();
                    regs.rip += 1;
                    ptrace::setregs(pid, regs).unwrap();
                }
                // Its program's end.
                WaitStatus::Stopped(_, Signal::SIGCHLD) => {}
                status => panic!("{status:?}"),
            }
        }
    }

    /// What was said.
    fn frames(&self, mut each: impl FnMut(FromGuest<'_>)) {
        let mut rest = &self.from_guest[..];
        while let Some((frame, len)) = split(rest).unwrap() {
            each(FromGuest::decode(frame).unwrap());
            rest = &rest[len..];
        }
        assert_eq!(rest, b"");
    }
}

/// Has `ioperm` end with `result` without being made. Called where a system call begins and where it ends.
fn keep_ioperm(pid: Pid, result: i32) {
    let mut regs = ptrace::getregs(pid).unwrap();
    if regs.orig_rax == SYS_ioperm as u64 {
        assert_eq!((regs.rdi, regs.rsi, regs.rdx), (PORT, 4, 1));
        // No call has this number. Where it ends, this is seen again.
        regs.orig_rax = u64::MAX;
        ptrace::setregs(pid, regs).unwrap();
    } else if regs.orig_rax == u64::MAX {
        regs.rax = i64::from(result).cast_unsigned();
        ptrace::setregs(pid, regs).unwrap();
    }
}

#[test]
fn hypercalls_carry_everything() {
    carry_everything(Monitor::default());
}

#[test]
fn so_do_breakpoints() {
    carry_everything(Monitor { locked_down: true, ..Monitor::default() });
}

fn carry_everything(mut monitor: Monitor) {
    let argv = pack(["cat"]).unwrap();
    let input: Vec<u8> = (0..30_000u32).map(|n| (n % 251) as u8).collect();
    for message in [
        ToGuest::Launch(Launch::new(Job::Run(Strings::new(&argv).unwrap()))),
        ToGuest::Stdin(&input),
        ToGuest::StdinEnd,
    ] {
        message.encode(&mut monitor.to_guest).unwrap();
    }
    assert_eq!(monitor.run(), 0);
    let (mut output, mut end) = (Vec::new(), None);
    monitor.frames(|frame| match frame {
        FromGuest::Stdout(bytes) => output.extend_from_slice(bytes),
        FromGuest::Exited(exit) => end = Some(exit),
        FromGuest::Failed { .. } | FromGuest::Stderr(_) | FromGuest::Warning(_) => panic!("{frame:?}"),
        _ => {}
    });
    assert_eq!(end, Some(Exit::Code(0)));
    assert!(output == input);
}

#[test]
fn hypercalls_tell_of_failures() {
    let argv = pack(["/no/such/program"]).unwrap();
    let mut monitor = Monitor::default();
    ToGuest::Launch(Launch::new(Job::Run(Strings::new(&argv).unwrap()))).encode(&mut monitor.to_guest).unwrap();
    assert_eq!(monitor.run(), 0);
    let mut failed = None;
    monitor.frames(|frame| {
        if let FromGuest::Failed { step, .. } = frame {
            failed = Some(step);
        }
    });
    assert_eq!(failed, Some(Step::Exec));
}

#[test]
fn a_monitor_that_answers_no_more_ends_the_loader() {
    let argv = pack(["sleep", "1000"]).unwrap();
    for broken_after in [0, 40] {
        let mut monitor = Monitor { broken_after: Some(broken_after), ..Monitor::default() };
        ToGuest::Launch(Launch::new(Job::Run(Strings::new(&argv).unwrap()))).encode(&mut monitor.to_guest).unwrap();
        assert_eq!(monitor.run(), 1);
    }
}
