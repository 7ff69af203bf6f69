//! A fork's monitor that has been taken over: it speaks the protocol as far as it must, and attacks. `tests/bare/hostile.rs` starts it in
//! the place of one, judges what it says, and looks at those whom it has attacked.
//!
//! ```text
//!   civic-hostile --introduced NAME ATTACK     in a jail: connected by descriptor 3
//!   civic-hostile SOCKET NAME ATTACK           connects itself
//! ```
//!
//! What it says are lines: `refused WHAT (why)` and `obeyed WHAT` of everything that it tries, `waits` and `born` as it comes along, at last
//! `over`. It stays until its input ends.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use civic_fork::hello::{Hello, Role, VERSION};
use civic_fork::mappings::{Hva, Mapping, Mappings};
use civic_fork::pager::habits::{Habits, WRITTEN};
use civic_fork::pager::protocol::{Request, Response};
use civic_fork::pager::{open_child, watch_child};
use civic_fork::uffd::Userfault;
use civic_fork::wire::{Wire, WireError};
use civic_vmm::fork::{ToChild, ToSource};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

const SOON: Duration = Duration::from_secs(20);
const PAGE: usize = 4096;
/// Messages of a flood: far more than a socket holds.
const FLOOD: usize = 200_000;
/// Rounds of adopting and forgetting: what is left of each would be more descriptors than a process usually may have.
const ROUNDS: u64 = 3000;

/// A system call, of whatever arguments.
fn call(number: libc::c_long, args: [usize; 6]) -> Result<usize, Errno> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: every caller passes numbers, or addresses and lengths of memory that is mapped and that nothing in this program refers to.
    Errno::result(unsafe { libc::syscall(number, a, b, c, d, e, f) }).map(|result| result as usize)
}

fn say(what: &str, tried: Result<usize, Errno>) {
    match tried {
        Ok(_) => println!("obeyed {what}"),
        Err(e) => println!("refused {what} ({e})"),
    }
}

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [place, name, attack] = &args[..] else { panic!("see the head of this file") };
    let jailed = place == "--introduced";
    let link = if jailed { Wire::inherited() } else { Wire::connect(Path::new(place)) };
    attack_with(&link.expect("a connection to the source"), name, attack, jailed);
    println!("over");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    // Whatever hangs goes too.
    std::process::exit(0);
}

fn attack_with(link: &Wire, name: &str, attack: &str, jailed: bool) {
    let role = match attack {
        "as-another" => Role::Child("good".into()),
        "as-page-server" => Role::PageServer,
        _ => Role::Child(name.into()),
    };
    link.send(&Hello { version: VERSION, role }, &[]).expect("somebody hears");
    if attack.starts_with("as-") {
        match link.receive::<ToChild>(SOON) {
            Err(WireError::Closed) => println!("refused {attack} (turned away)"),
            other => println!("obeyed {attack}: {other:?}"),
        }
        return;
    }
    let (welcome, fds) = link.receive::<ToChild>(SOON).expect("a welcome");
    assert!(matches!(welcome, ToChild::Welcome { .. }), "{welcome:?}");
    if attack == "memory" {
        write_memory(&fds[0], jailed);
        fds.iter().for_each(|fd| write_file(fd, jailed));
    }
    let child = Child::new(&fds[0]);
    let (lifeline, there) = Wire::pair().expect("a lifeline");
    let ready = ToSource::Ready { mappings: child.mappings.clone(), mirrors: Vec::new() };
    link.send(&ready, &[child.uffd.as_fd(), there.as_fd()]).expect("the source hears");
    drop(there);
    let (registered, _) = link.receive::<ToChild>(SOON).expect("an answer");
    assert_eq!(registered, ToChild::Registered);
    println!("waits");
    let (go, _) = link.receive::<ToChild>(Duration::MAX).expect("a birth");
    let ToChild::Go(go) = go else { panic!("{go:?}") };
    let disks = serde_json::from_str::<serde_json::Value>(&go.config).expect("a configuration")["disks"].clone();
    for _ in disks.as_array().into_iter().flatten() {
        let (_, fds) = link.receive::<ToChild>(SOON).expect("a disk");
        if attack == "memory" {
            fds.iter().for_each(|fd| write_file(fd, jailed));
        }
    }
    link.send(&ToSource::Started { at: 0 }, &[]).expect("the source hears");
    println!("born");
    match attack {
        "memory" => write_memory(&fds[0], jailed),
        "requests" => ask(&lifeline, &child),
        "descriptors" => exhaust(&lifeline, &child),
        "flood" => flood(&lifeline),
        "garbage" => garbage(&lifeline),
        "blocking" => block(&lifeline, child),
        other => panic!("no such attack: {other}"),
    }
}

/// Its memory, as a monitor has it.
struct Child {
    uffd: Userfault,
    mappings: Mappings,
    start: usize,
}

impl Child {
    fn new(ram: &OwnedFd) -> Self {
        let len = length(ram);
        let start = map(ram, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE).expect("its memory");
        let piece = Mapping { start: Hva(start as u64), len: len as u64, offset: 0 };
        let mappings = Mappings::new(vec![piece]).expect("mappings");
        let uffd = open_child().expect("a userfaultfd");
        watch_child(&uffd, &mappings).expect("memory that can be watched");
        Self { uffd, mappings, start }
    }
}

fn length(fd: &OwnedFd) -> usize {
    nix::sys::stat::fstat(fd).expect("a file").st_size as usize
}

fn number(fd: &impl AsRawFd) -> usize {
    fd.as_raw_fd() as usize
}

fn map(fd: &OwnedFd, len: usize, prot: i32, flags: i32) -> Result<usize, Errno> {
    call(libc::SYS_mmap, [0, len, prot as usize, flags as usize, number(fd), 0])
}

/// Whatever might change a file by a descriptor that one has been given, and by itself.
fn write_file(fd: &OwnedFd, jailed: bool) {
    let page = [0xa5u8; PAGE];
    let fd_number = number(fd);
    let name = std::fs::read_link(format!("/proc/self/fd/{fd_number}")).expect("a name");
    let (name, bytes) = (name.display(), page.as_ptr() as usize);
    let vector = libc::iovec { iov_base: bytes as *mut libc::c_void, iov_len: PAGE };
    let vector = &raw const vector as usize;
    say(&format!("write to {name}"), call(libc::SYS_pwrite64, [fd_number, bytes, PAGE, 0, 0, 0]));
    say(&format!("writev to {name}"), call(libc::SYS_pwritev, [fd_number, vector, 1, 0, 0, 0]));
    say(&format!("cut {name}"), call(libc::SYS_ftruncate, [fd_number, 0, 0, 0, 0, 0]));
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as usize;
    say(&format!("punch {name}"), call(libc::SYS_fallocate, [fd_number, punch, 0, PAGE, 0, 0]));
    say(
        &format!("zero {name}"),
        call(libc::SYS_fallocate, [fd_number, libc::FALLOC_FL_ZERO_RANGE as usize, 0, PAGE, 0, 0]),
    );
    let (read, write) = nix::unistd::pipe().expect("a pipe");
    nix::unistd::write(&write, &page).expect("room in it");
    let mut at = 0i64;
    let into = &raw mut at as usize;
    say(&format!("splice into {name}"), call(libc::SYS_splice, [number(&read), 0, fd_number, into, PAGE, 0]));
    let mine = File::from(memfd_create(c"mine", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    mine.set_len(PAGE as u64).expect("a size");
    say(&format!("sendfile to {name}"), call(libc::SYS_sendfile, [fd_number, number(&mine), 0, PAGE, 0, 0]));
    let (mut from, mut to) = (0i64, 0i64);
    let (from, to) = (&raw mut from as usize, &raw mut to as usize);
    let copied = call(libc::SYS_copy_file_range, [number(&mine), from, fd_number, to, PAGE, 0]);
    say(&format!("copy to {name}"), copied);
    say(&format!("seal {name}"), seal(fd));
    let shared = map(fd, PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    say(&format!("map {name} to write"), shared);
    if jailed {
        // Of the same user without a jail: who is that may do worse.
        for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            // What is sealed can be opened, and is no better for that.
            let again = reopen(fd, flags).and_then(|again| {
                let written = call(libc::SYS_pwrite64, [number(&again), bytes, PAGE, 0, 0, 0]);
                let cut = call(libc::SYS_ftruncate, [number(&again), 0, 0, 0, 0, 0]);
                let mapped = map(&again, PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
                written.or(cut).or(mapped)
            });
            say(&format!("write to {name} opened anew ({flags:#o})"), again);
        }
        say(&format!("let everybody in to {name}"), call(libc::SYS_fchmod, [fd_number, 0o666, 0, 0, 0, 0]));
    }
}

fn seal(fd: &impl AsFd) -> Result<usize, Errno> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).map(|_| 0)
}

fn reopen(fd: &OwnedFd, flags: i32) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
    let open = call(libc::SYS_openat, [libc::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0, 0, 0])?;
    // SAFETY: the kernel has just made this descriptor for us; it is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(open as RawFd) })
}

/// What might change the source's memory besides.
fn write_memory(ram: &OwnedFd, jailed: bool) {
    let len = length(ram);
    let read = libc::PROT_READ;
    let write = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let at = map(ram, len, read, libc::MAP_SHARED).expect("memory to read");
    say("let a shared mapping be written", call(libc::SYS_mprotect, [at, len, write, 0, 0, 0]));
    say("punch a shared mapping", call(libc::SYS_madvise, [at, PAGE, libc::MADV_REMOVE as usize, 0, 0, 0]));
    let uffd = open_child().expect("a userfaultfd");
    let mappings =
        Mappings::new(vec![Mapping { start: Hva(at as u64), len: len as u64, offset: 0 }]).expect("mappings");
    // Who could watch it could fill its holes.
    say("fill a shared mapping's holes", watch_child(&uffd, &mappings).map(|()| 0).map_err(|_| Errno::EPERM));
    let moved = call(libc::SYS_mremap, [at, len, len, libc::MREMAP_MAYMOVE as usize, 0, 0]).expect("it stays");
    say("let a moved mapping be written", call(libc::SYS_mprotect, [moved, len, write, 0, 0, 0]));
    let twin = call(libc::SYS_mremap, [moved, 0, len, libc::MREMAP_MAYMOVE as usize, 0, 0]);
    let twin = twin.expect("a second mapping of what is shared");
    say("let a second mapping be written", call(libc::SYS_mprotect, [twin, len, write, 0, 0, 0]));
    let own = map(ram, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE).expect("a private mapping");
    say("punch a private mapping", call(libc::SYS_madvise, [own, PAGE, libc::MADV_REMOVE as usize, 0, 0, 0]));
    // That can be written, but is nobody else's.
    let scribble = call(libc::SYS_getrandom, [own, len.min(1 << 20), 0, 0, 0, 0]);
    assert!(scribble.is_ok(), "{scribble:?}");
    for at in [moved, twin, own] {
        call(libc::SYS_munmap, [at, len, 0, 0, 0, 0]).expect("it was mapped");
    }
    if !jailed {
        // The same user can open it anew. Even so it cannot be cut under its machine, nor be sealed against its page server.
        let again = reopen(ram, libc::O_RDWR).expect("the user is the same");
        for (what, len) in [("cut", 0), ("lengthen", len + PAGE)] {
            say(&format!("{what} what was opened anew"), call(libc::SYS_ftruncate, [number(&again), len, 0, 0, 0, 0]));
        }
        say("seal what was opened anew", seal(&again));
        return;
    }
    // Nobody else is there.
    let others = std::fs::read_dir("/proc").expect("its own").flatten();
    let others = others.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in others.filter(|pid| *pid != std::process::id()) {
        println!("obeyed look at process {pid}");
    }
    for (what, number, args) in [
        ("signal everybody", libc::SYS_kill, [-1i32 as u32 as usize, 0, 0, 0, 0, 0]),
        ("trace its jailer", libc::SYS_ptrace, [libc::PTRACE_ATTACH as usize, 1, 0, 0, 0, 0]),
    ] {
        if std::process::id() != 1 || what == "signal everybody" {
            say(what, call(number, args));
        }
    }
}

fn answered(lifeline: &Wire) -> Response {
    loop {
        match lifeline.receive::<Response>(SOON).expect("an answer").0 {
            Response::Notice(_) => (),
            answer => return answer,
        }
    }
}

/// A memfd for a snapshot that has `pages` numbers behind as many pages, sealed or not, with its pages there or not.
fn snapshot(pages: u32, sealed: bool, there: bool) -> OwnedFd {
    use std::os::unix::fs::FileExt;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"own", flags).expect("a memfd"));
    let len = u64::from(pages) * PAGE as u64;
    file.set_len(len + u64::from(pages) * 4).expect("a size");
    for page in 0..pages {
        if there {
            file.write_all_at(&[7; PAGE], u64::from(page) * PAGE as u64).expect("a page");
        }
        file.write_all_at(&page.to_le_bytes(), len + u64::from(page) * 4).expect("a number");
    }
    if sealed {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_FUTURE_WRITE;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
    }
    file.into()
}

/// Asks the page server for what is not a child's to ask, and for what makes no sense.
fn ask(lifeline: &Wire, child: &Child) {
    let mappings = || child.mappings.clone();
    let page = Mapping { start: Hva(1 << 20), len: PAGE as u64, offset: 0 };
    let small = Mappings::new(vec![page]).expect("mappings");
    let adopt = |id, mappings| Request::Adopt { child: id, mappings };
    let own = |pages| Request::FreezeChild { children: vec![1, 2, u64::MAX], pages };
    let (pipe, _write) = nix::unistd::pipe().expect("a pipe");
    let (other, _here) = Wire::pair().expect("a pair");
    let (uffd, other) = (child.uffd.as_fd(), other.as_fd());
    let (open, hollow, whole) = (snapshot(2, false, true), snapshot(2, true, false), snapshot(2, true, true));
    let begin = Request::Begin {
        mappings: mappings(),
        limit: 1,
        habits: Habits { given: vec![(0, u32::MAX)], ..Habits::default() },
    };
    for (what, request, fds) in [
        ("begin anew", begin, vec![uffd, pipe.as_fd(), open.as_fd(), whole.as_fd()]),
        ("arm", Request::Arm, vec![]),
        ("arm ahead", Request::ArmAhead, vec![]),
        ("freeze its source", Request::Freeze { children: vec![0, 1] }, vec![]),
        ("abandon its source's fork", Request::Abandon, vec![]),
        ("have its source leave", Request::Leave, vec![]),
        ("ping", Request::Ping, vec![]),
        ("adopt without descriptors", adopt(1, mappings()), vec![]),
        ("adopt without a process", adopt(1, mappings()), vec![uffd, other]),
        ("adopt a pipe's memory", adopt(1, mappings()), vec![pipe.as_fd(), other, other]),
        ("adopt a file's life", adopt(1, mappings()), vec![uffd, whole.as_fd(), other]),
        ("adopt other memory", adopt(1, small), vec![uffd, other, other]),
        ("adopt a number that is none", adopt(u64::MAX, mappings()), vec![uffd, other, other]),
        ("be forked without pages", own(2), vec![]),
        ("be forked with a pipe", own(2), vec![pipe.as_fd()]),
        ("be forked with what can change", own(2), vec![open.as_fd()]),
        ("be forked with holes", own(2), vec![hollow.as_fd()]),
        ("be forked with too few pages", own(3), vec![whole.as_fd()]),
        ("be forked with too many pages", own(u32::MAX), vec![whole.as_fd()]),
    ] {
        lifeline.send(&request, &fds).expect("the page server hears");
        match answered(lifeline) {
            Response::Refused(why) => println!("refused {what} ({why})"),
            answer => println!("obeyed {what}: {answer:?}"),
        }
    }
    // These are answered, and nothing comes of them.
    for generation in 0..8 {
        lifeline.send(&Request::Lose { generation, why: "a lie".into() }, &[]).expect("the page server hears");
        assert_eq!(answered(lifeline), Response::Done);
    }
    for id in (0..64).chain([u64::MAX]) {
        lifeline.send(&Request::Forget { child: id }, &[]).expect("the page server hears");
        assert_eq!(answered(lifeline), Response::Done);
    }
    // What the next forks are given is bounded by what counts of this.
    for runs in [vec![(0, u32::MAX)], vec![(u32::MAX, u32::MAX); 1000], vec![(0, u32::MAX); 2]] {
        lifeline.send(&Request::Wrote { runs }, &[]).expect("the page server hears");
        assert_eq!(answered(lifeline), Response::Done);
    }
    lifeline.send(&Request::Expect, &[]).expect("the page server hears");
    let Response::Expected(runs) = answered(lifeline) else { panic!("nothing is expected") };
    assert!(runs.iter().map(|(_, len)| *len).sum::<u32>() <= WRITTEN, "{runs:?}");
    lifeline.send(&Request::Report, &[]).expect("the page server hears");
    let Response::Report(report) = answered(lifeline) else { panic!("no report") };
    assert!(report.children.is_empty() && report.generations.is_empty(), "others are told of: {report:?}");
}

/// Has children of its own without end.
fn exhaust(lifeline: &Wire, child: &Child) {
    let itself = call(libc::SYS_pidfd_open, [std::process::id() as usize, 0, 0, 0, 0, 0]).expect("a pidfd");
    // SAFETY: the kernel has just made this descriptor for us; it is nobody else's.
    let itself = unsafe { OwnedFd::from_raw_fd(itself as RawFd) };
    let (other, here) = Wire::pair().expect("a pair");
    let fds = [child.uffd.as_fd(), other.as_fd(), itself.as_fd(), other.as_fd()];
    let adopt = |id| {
        lifeline.send(&Request::Adopt { child: id, mappings: child.mappings.clone() }, &fds).expect("it hears");
        answered(lifeline)
    };
    let forget = |id| {
        lifeline.send(&Request::Forget { child: id }, &[]).expect("it hears");
        assert_eq!(answered(lifeline), Response::Done);
    };
    for round in 0..ROUNDS {
        assert_eq!(adopt(round), Response::Done, "round {round}");
        forget(round);
    }
    println!("forgotten");
    let mut count = 0;
    let why = loop {
        match adopt(count) {
            Response::Done => count += 1,
            Response::Refused(why) => break why,
            other => panic!("{other:?}"),
        }
    };
    println!("refused child {count} ({why})");
    // Grandchildren count too: a child of its own asks by the lifeline that it was given, which all of them share.
    here.send(&Request::Adopt { child: count, mappings: child.mappings.clone() }, &fds).expect("it hears");
    match answered(&here) {
        Response::Refused(why) => println!("refused a grandchild ({why})"),
        other => println!("obeyed a grandchild: {other:?}"),
    }
}

/// Asks and asks, and reads no answer.
fn flood(lifeline: &Wire) {
    for _ in 0..FLOOD {
        match lifeline.send(&Request::Report, &[]) {
            Ok(()) => (),
            Err(e) => return println!("refused a flood ({e})"),
        }
    }
    println!("obeyed a flood");
}

/// Says what nobody understands.
fn garbage(lifeline: &Wire) {
    let bytes = [0xffu8; 1000];
    nix::unistd::write(lifeline.as_fd(), &bytes).expect("it goes");
    match lifeline.receive::<Response>(SOON) {
        Err(WireError::Closed) => println!("refused garbage (given up)"),
        other => println!("obeyed garbage: {other:?}"),
    }
}

/// Has whoever reads its page faults wait, and takes them away before that.
fn block(lifeline: &Wire, child: Child) {
    let flags = OFlag::from_bits_retain(fcntl(child.uffd.as_fd(), FcntlArg::F_GETFL).expect("flags"));
    let pages = length_of(&child.mappings) / PAGE;
    let start = child.start;
    std::thread::spawn(move || {
        for page in 0..pages {
            // Waits for an answer, mostly for ever.
            let _ = call(libc::SYS_getrandom, [start + page * PAGE, 1, 0, 0, 0, 0]);
        }
    });
    fcntl(child.uffd.as_fd(), FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).expect("flags are everybody's");
    let thief = child.uffd.try_clone().expect("another descriptor");
    std::thread::spawn(move || {
        let mut bytes = [0; 32];
        while nix::unistd::read(&thief, &mut bytes).is_ok() {}
    });
    match lifeline.receive::<Response>(SOON) {
        Ok((Response::Failed(why), _)) => println!("refused to be waited for ({why})"),
        other => println!("obeyed when it was to be waited for: {other:?}"),
    }
}

fn length_of(mappings: &Mappings) -> usize {
    mappings.bytes() as usize
}
