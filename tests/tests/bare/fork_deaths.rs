//! Forks in which somebody dies, stands still or runs out of room, at any stage. The source always goes on, and finds in its memory what it
//! wrote; a child that cannot live says why.
//!
//! When somebody dies is chosen at random: some of these stages last for microseconds.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use civic_api::ForkRequest;
use civic_tests::bare::vm::{Setup, Vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::torn::{CPUS, counting, rounds};

/// How long a child whose page server is gone may take to say so and end, in a debug build on a busy machine.
const END: Duration = Duration::from_secs(5);

/// Numbers that look random and are the same each time (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn rounds_asked(usual: u32) -> u32 {
    std::env::var("CIVIC_FORKS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// Sends the signal within the next `most`.
fn some_time(random: &mut Random, most: Duration, pid: u32, signal: Signal) -> JoinHandle<()> {
    let wait = Duration::from_micros(random.below(most.as_micros() as u64));
    std::thread::spawn(move || {
        std::thread::sleep(wait);
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid as i32), signal);
    })
}

fn source() -> Vm {
    let mut source = Setup::new(&counting()).cpus(CPUS).boot();
    rounds(&mut source, 1);
    source
}

#[test]
fn a_page_server_that_is_killed_at_any_stage_takes_only_the_forks_with_it() {
    let (mut source, mut random) = (source(), Random(7));
    let (mut lived, mut refused) = (0, 0);
    for n in 0..rounds_asked(16) {
        let pager = source.page_server();
        let waiting = source.waiting(&format!("child{n}"));
        let killer = some_time(&mut random, Duration::from_millis(60), pager, Signal::SIGKILL);
        let outcome = source.attempt_fork(vec![waiting], false);
        killer.join().unwrap();
        let killed = Instant::now();
        match outcome {
            Ok((report, children)) => {
                lived += report.children.len();
                for mut child in children {
                    let status = child.ends();
                    assert!(killed.elapsed() < END, "it ended after {:?}", killed.elapsed());
                    assert!(!status.success());
                    // One that has no time to say so is killed by the source's watchdog.
                    let says = child.log().contains("its page server has died");
                    assert!(says || status.code().is_none(), "{status}: {}", child.log());
                }
            }
            Err((e, waiting)) => {
                refused += 1;
                assert!(e.refusal().is_some(), "{e}");
                drop(waiting);
            }
        }
        source.until("the page server to be missed", |vm| !vm.info().family.page_server);
        source.until("the children to be forgotten", |vm| vm.info().family.children.is_empty());
        rounds(&mut source, 1);
    }
    println!("{lived} children lived, {refused} forks were refused");
    let (_, mut children) = source.fork(vec![source.waiting("last")], false);
    rounds(&mut children[0], 1);
    rounds(&mut source, 1);
}

#[test]
fn a_child_that_is_killed_at_any_stage_leaves_nothing() {
    let (mut source, mut random) = (source(), Random(11));
    let (mut lived, mut refused) = (0, 0);
    for n in 0..rounds_asked(16) {
        let waiting = vec![source.waiting(&format!("a{n}")), source.waiting(&format!("b{n}"))];
        source.page_server();
        // One that comes when nobody waits any more waits itself, for a minute.
        source.until("the page server to come", |vm| vm.info().family.page_server);
        let killer = some_time(&mut random, Duration::from_millis(60), waiting[0].pid(), Signal::SIGKILL);
        let outcome = source.attempt_fork(waiting, false);
        killer.join().unwrap();
        match outcome {
            Ok((report, mut children)) => {
                lived += report.children.len();
                assert!(report.failed.iter().all(|failed| failed.name == format!("a{n}")), "{report:?}");
                let mut other = children.remove(1).born();
                rounds(&mut other, 1);
                other.kill();
                assert!(other.ended().success());
            }
            // It was gone when the fork was asked for: then there is none, and who waits with it does so in vain.
            Err((e, waiting)) => {
                refused += 1;
                drop(waiting);
                assert!(e.refusal().is_some(), "{e}");
            }
        }
        source.until("all to be forgotten", |vm| vm.info().family == civic_api::Family::default());
        rounds(&mut source, 1);
    }
    println!("{lived} children lived, {refused} forks were refused");
}

#[test]
fn a_source_that_is_killed_at_any_stage_leaves_whole_children_or_none() {
    let mut random = Random(13);
    let mut lived = 0;
    for n in 0..rounds_asked(8) {
        let source = source();
        source.page_server();
        let waiting = source.waiting(&format!("child{n}"));
        let killer = some_time(&mut random, Duration::from_millis(60), source.pid(), Signal::SIGKILL);
        let outcome = source.attempt_fork(vec![waiting], false);
        killer.join().unwrap();
        match outcome {
            Ok((_, mut children)) => {
                lived += 1;
                let mut child = children.remove(0).born();
                rounds(&mut child, 2);
                child.kill();
                assert!(child.ended().success());
            }
            // It may have come to life when its source could not tell any more.
            Err((_, mut waiting)) => {
                let mut waiting = waiting.remove(0);
                // In vain, if it has ended.
                let _ = waiting.api(|client| async move { client.kill().await });
                waiting.ends();
            }
        }
    }
    println!("{lived} children lived");
}

#[test]
fn a_page_server_that_stands_still_is_given_up_with_the_forks() {
    let mut source = source();
    for n in 0..3 {
        let pager = source.page_server();
        let (_, mut children) = source.fork(vec![source.waiting(&format!("child{n}"))], false);
        rounds(&mut children[0], 1);
        kill(Pid::from_raw(pager as i32), Signal::SIGSTOP).unwrap();
        let (status, _) = children[0].ended_badly();
        assert!(!status.success());
        rounds(&mut source, 1);
        source.until("the children to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    }
}

#[test]
fn forks_that_need_more_than_may_be_kept_end_oldest_first_and_say_so() {
    let mut setup = Setup::new(&counting()).cpus(CPUS);
    setup.config.forks.memory_bytes = Some(1 << 20);
    let mut source = setup.boot();
    rounds(&mut source, 1);
    for n in 0..3 {
        source.page_server();
        let waiting = vec![source.waiting(&format!("a{n}")), source.waiting(&format!("b{n}"))];
        // They may be lost before they live.
        let (Ok((_, mut children)) | Err((_, mut children))) = source.attempt_fork(waiting, false);
        for child in &mut children {
            assert!(!child.ends().success());
            assert!(
                child.log().contains("overwritten more than the store of preserved pages holds (256 pages)"),
                "{}",
                child.log()
            );
        }
        rounds(&mut source, 1);
        source.until("the children to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    }
}

#[test]
fn whoever_asked_for_a_fork_may_be_gone_before_it_is_made() {
    let mut source = source();
    for n in 0..5 {
        source.page_server();
        let waiting = source.waiting(&format!("child{n}"));
        let body =
            serde_json::to_string(&ForkRequest { children: vec![waiting.name().into()], paused: false }).unwrap();
        let mut stream = UnixStream::connect(source.socket()).unwrap();
        write!(
            stream,
            "POST /v1/fork HTTP/1.1\r\nHost: civic\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        drop(stream);
        // It is made all the same, or was not begun; then whoever asks next gets it.
        let made = |vm: &Vm| {
            // One that was about to go when nobody waited yet is gone.
            vm.page_server();
            let _ = vm.try_fork(ForkRequest { children: vec![waiting.name().into()], paused: false });
            vm.info().family.children.len() == 1
        };
        source.until("the fork to be made", made);
        waiting.api(|client| async move { client.kill().await }).unwrap();
        assert!(waiting.ended().success());
        source.until("it to be forgotten", |vm| vm.info().family.children.is_empty());
        rounds(&mut source, 1);
    }
    let (_, mut children) = source.fork(vec![source.waiting("last")], false);
    rounds(&mut children[0], 1);
}
