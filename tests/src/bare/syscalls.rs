//! Counts the system calls of a process's threads, by tracing it.
//!
//! By the system calls themselves: monitors kick their vCPUs with a real-time signal, which nix's wrappers do not know.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, ptr};

use nix::libc::{self, c_int, pid_t};

/// How long what is traced is left alone while nothing happens.
const GLANCE: std::time::Duration = std::time::Duration::from_micros(50);

/// How many each thread made, by its number. The process's first thread has that of the process.
pub type Calls = BTreeMap<i32, usize>;

/// What `work` returns, and the system calls that the threads of the process made meanwhile, those included that begin meanwhile. The process must
/// be a child of this one. It goes on afterwards as if nothing had been.
pub fn during<T>(pid: u32, work: impl FnOnce() -> T) -> (T, Calls) {
    let (stop, traced) = (AtomicBool::new(false), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        // Who traces a thread is a thread, and only that one hears of it.
        let tracer = scope.spawn(|| {
            let threads = seize(pid);
            traced.wait();
            count(threads, &stop)
        });
        traced.wait();
        let done = work();
        stop.store(true, Ordering::SeqCst);
        (done, tracer.join().expect("it traces"))
    })
}

fn threads(pid: u32) -> Vec<pid_t> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A request about a thread; `data` is a number for all of those that are made here.
fn ptrace(request: libc::c_uint, thread: pid_t, data: c_int) -> Result<()> {
    // SAFETY: none of the requests here reads or writes this process's memory.
    let done = unsafe { libc::ptrace(request, thread, ptr::null_mut::<libc::c_void>(), i64::from(data)) };
    if done == -1 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// All of its threads, until there are no others. Those that they start are traced too.
fn seize(pid: u32) -> BTreeSet<pid_t> {
    let mut known = BTreeSet::new();
    loop {
        let new: Vec<_> = threads(pid).into_iter().filter(|thread| !known.contains(thread)).collect();
        if new.is_empty() {
            return known;
        }
        for thread in new {
            let seized = ptrace(libc::PTRACE_SEIZE, thread, libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE);
            match seized.and_then(|()| ptrace(libc::PTRACE_INTERRUPT, thread, 0)).map_err(|e| e.raw_os_error()) {
                // It has ended meanwhile, or is traced since its birth by one that is.
                Ok(()) | Err(Some(libc::ESRCH | libc::EPERM)) => drop(known.insert(thread)),
                Err(e) => panic!("thread {thread} cannot be traced: {e:?}"),
            }
        }
    }
}

/// The next stop or end of a thread that this one traces, and how; none where there is none now, or (an error) never will be.
fn next(wait: bool) -> Result<Option<(pid_t, c_int)>> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD | if wait { 0 } else { libc::WNOHANG };
    // SAFETY: `status` is a live int.
    match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
        -1 => Err(Error::last_os_error()),
        0 => Ok(None),
        thread => Ok(Some((thread, status))),
    }
}

fn count(mut threads: BTreeSet<pid_t>, stop: &AtomicBool) -> Calls {
    let (mut calls, mut inside) = (Calls::new(), BTreeSet::new());
    let mut stopping = false;
    loop {
        if !stopping && stop.load(Ordering::SeqCst) {
            stopping = true;
            // Each stops once more, to be let go.
            threads.retain(|thread| ptrace(libc::PTRACE_INTERRUPT, *thread, 0).is_ok());
        }
        if stopping && threads.is_empty() {
            return calls;
        }
        let (thread, status) = match next(stopping) {
            Ok(Some(told)) => told,
            Ok(None) => {
                std::thread::sleep(GLANCE);
                continue;
            }
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return calls,
            Err(e) => panic!("cannot wait for what is traced: {e}"),
        };
        if !libc::WIFSTOPPED(status) {
            threads.remove(&thread);
            continue;
        }
        // What it was to be told of: system calls and the tracer's own stops are SIGTRAP, the former with a mark.
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        let call = signal == libc::SIGTRAP | 0x80;
        // At its entry, and again at its end.
        if call && !inside.remove(&thread) {
            inside.insert(thread);
            *calls.entry(thread).or_default() += 1;
        }
        let deliver = if call || event != 0 || signal == libc::SIGTRAP { 0 } else { signal };
        // Either may find that it has been killed meanwhile.
        if stopping {
            threads.remove(&thread);
            let _ = ptrace(libc::PTRACE_DETACH, thread, deliver);
        } else {
            threads.insert(thread);
            let _ = ptrace(libc::PTRACE_SYSCALL, thread, deliver);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_process_calls_is_counted() {
        let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut to, mut from) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
        let mut echo = |times: usize| {
            for _ in 0..times {
                to.write_all(b"x").unwrap();
                from.read_exact(&mut [0]).unwrap();
            }
        };
        // It has begun.
        echo(1);
        let few = during(cat.id(), || echo(10)).1.values().sum::<usize>();
        let many = during(cat.id(), || echo(60)).1.values().sum::<usize>();
        // A read and a write for each.
        assert!((99..=101).contains(&(many - few)), "{few}, then {many}");
        // And it goes on, traced no more.
        echo(3);
        drop(to);
        assert!(cat.wait().unwrap().success());
    }
}
