//! The loader: what the monitor starts inside a fork's kernel, to start a program there.
//!
//! ```text
//!   kernel ─▶ _start ─▶ Hello ─▶ Launch? ─▶ freeze ─▶ mounts of its own ─▶ network ─▶ fork ─▶ relay ─▶ tidy up? ─▶ Exited
//!                                  freeze.rs  root.rs, disk.rs   network.rs  program.rs  relay.rs   tidy.rs
//!                                                                                └▶ a program, or pack.rs, or unpack.rs
//! ```
//!
//! It is started as the kernel's user-mode helper, from a tmpfs that is mounted nowhere: uid 0, all capabilities, no open files, the
//! first process's namespaces and root. It knows nothing of the guest but Linux's system calls, 5.10 or later: no library, no shell and no
//! file of the guest is needed, `/proc`, `/sys` and `/dev` included, for it mounts its own and attaches them nowhere (`files.rs`).
//!
//! Arguments: the channel to the monitor (`channel.rs`), nothing else. What is said there is in the library of this package.
//!
//! Invariants:
//! * One thread, no heap. What it holds is bounded, in either direction: who does not read stops who writes.
//! * Every wait has an end, but for those for the program and for the host to take its output.
//! * Nothing that the guest sees is changed but by the program and by what [`Launch`] says: mounts are in a namespace of its own.
//! * The last frame is `Exited` or `Failed`.

// Without a standard library nothing can unwind. So where panics do, in a check of the sources by clippy or an editor, there is one.
#![cfg_attr(panic = "abort", no_std)]
#![no_main]

mod channel;
mod copy;
mod disk;
mod failure;
mod files;
mod freeze;
mod link;
mod memory;
mod network;
mod news;
mod pack;
mod program;
mod relay;
mod room;
mod root;
mod start;
mod sys;
mod tidy;
mod time;
mod unpack;

use civic_loader::{Exit, FromGuest, Launch, Malformed, Root, Stage, Step, ToGuest, VERSION};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall};

use crate::channel::{AnyChannel, Lost};
use crate::failure::{Ending, Failure, Text};
use crate::freeze::Frozen;
use crate::link::{Link, Pages};
use crate::program::Program;
use crate::relay::Relay;
use crate::room::{LINK_PAGES, STDIN_PAGES};
use crate::time::Deadline;

/// Until when the host has to say what to do, in milliseconds.
const LAUNCH_MS: u64 = 30_000;

/// Does everything; gives the exit status, which only tests on a host see.
fn run(argument: &[u8]) -> i32 {
    let started = sys::rdtsc();
    sys::ignore_signals();
    // Whatever a fork's guest was about to do can wait until the program runs. Not every kernel lets us (RT_GROUP_SCHED).
    let _ = sys::hurry(true);
    // Where pages of ours are taken away nevertheless, the monitor asks for them.
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    if files::fill_standard().is_err() {
        return 2;
    }
    let (Ok(mut channel), Some(room)) = (AnyChannel::open(argument), room::take()) else {
        return 2;
    };
    let mut link = Link::new(channel.get(), room.from_host.buffer(), room.to_host.buffer());
    let mut text = Text::new();
    let told = match converse(&mut link, &mut room.stdin, &mut room.launch, &mut room.report, started) {
        Ok(exit) => link.tell(FromGuest::Exited(exit)),
        Err(Ending::Failed(failure)) => link.tell(failure.frame(&mut text)),
        Err(Ending::Lost) => Err(Lost),
    };
    match told.and_then(|()| link.flush()) {
        Ok(()) => 0,
        Err(Lost) => 1,
    }
}

/// All but the last words.
fn converse<'a>(
    link: &mut Link<'_>,
    stdin: &mut Pages<STDIN_PAGES>,
    launch: &'a mut Pages<LINK_PAGES>,
    report: &'a mut Pages<1>,
    started: u64,
) -> Result<Exit, Ending<'a>> {
    let credit = stdin.bytes().len() as u32;
    link.tell(FromGuest::Hello { version: VERSION, credit })?;
    link.tell(FromGuest::Stage { stage: Stage::Started, tsc: started })?;
    let launch = receive(link, launch.bytes())?;
    reached(link, Stage::Configured)?;

    let mut frozen = Frozen::new(launch.freeze, link)?;
    reached(link, Stage::Frozen)?;
    let exit = serve(link, stdin, &launch, report.bytes(), &mut frozen);
    if launch.thaw_at_end {
        // A host that is gone does not hear of it.
        let _ = frozen.thaw(link);
    }
    exit
}

/// Makes a place for the program, and serves it to its end.
fn serve<'a>(
    link: &mut Link<'_>,
    stdin: &mut Pages<STDIN_PAGES>,
    launch: &Launch<'a>,
    report: &'a mut [u8],
    frozen: &mut Frozen,
) -> Result<Exit, Ending<'a>> {
    // Before the root changes; the program needs it as well.
    let proc = files::detached(c"proc", &[]).ok();
    if let Some(proc) = &proc {
        // Memory may run out because of the program: that is to end, not its end to be unheard of.
        let _ = files::write(proc, c"self/oom_score_adj", b"-1000");
    }
    root::leave_namespace()?;
    match launch.root {
        Root::Guest => root::complete(link)?,
        Root::Store(store) => root::enter(link, &store, Deadline::after_ms(launch.timeout_ms.into()))?,
    }
    reached(link, Stage::Mounted)?;
    if !launch.tidy_up {
        let exit = attend(link, stdin, launch, report, frozen, proc.as_ref());
        if matches!(launch.root, Root::Store(_)) {
            tidy::sync_store(link)?;
        }
        return exit;
    }
    tidy::adopt();
    let exit = attend(link, stdin, launch, report, frozen, proc.as_ref());
    tidy::end_orphans(proc.as_ref());
    if matches!(launch.root, Root::Store(_)) {
        tidy::leave_store(link)?;
    }
    exit
}

/// Serves the program, for which there is a place.
fn attend<'a>(
    link: &mut Link<'_>,
    stdin: &mut Pages<STDIN_PAGES>,
    launch: &Launch<'a>,
    report: &'a mut [u8],
    frozen: &mut Frozen,
    proc: Option<&OwnedFd>,
) -> Result<Exit, Ending<'a>> {
    network::set_up(link, launch)?;
    reached(link, Stage::NetworkUp)?;
    // What the kernel or the first process has started meanwhile.
    frozen.again();
    let program = Program::start(launch, proc, report)?;
    let _ = sys::hurry(false);
    reached(link, Stage::Execed)?;
    Relay::new(link, program, stdin.buffer(), frozen).run()
}

fn reached(link: &mut Link<'_>, stage: Stage) -> Result<(), Lost> {
    link.tell(FromGuest::Stage { stage, tsc: sys::rdtsc() })?;
    link.send().map(drop)
}

/// What to do. The host has to say it in its first frame, which is kept in `place`.
fn receive<'a>(link: &mut Link<'_>, place: &'a mut [u8]) -> Result<Launch<'a>, Ending<'a>> {
    let deadline = Deadline::after_ms(LAUNCH_MS);
    let len = loop {
        link.send()?;
        link.recv()?;
        if let Some((_, len)) = link.frame()? {
            break len;
        }
        if deadline.passed() {
            return Err(Failure::new(Step::Protocol, Errno::TIMEDOUT, "the monitor did not say what to do").into());
        }
        link.wait(link::Watched::new());
    };
    let bytes = link.take(len, place);
    match civic_loader::split(bytes)?.map(|(frame, _)| ToGuest::decode(frame)).transpose()? {
        Some(ToGuest::Launch(launch)) => Ok(launch),
        _ => Err(Malformed::Field("launch").into()),
    }
}
