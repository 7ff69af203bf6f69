//! A fork's monitor that has been taken over attacks its source, its page server and the other forks: `civic-hostile`, in the place of one,
//! in a jail and without.
//!
//! The source stands still meanwhile, so that its memory must be the same to the last byte.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

use civic_api::ForkRequest;
use civic_tests::bare::vm::{Hostile, Setup, Vm};

use crate::pausing::{LINE_LEN, hammer};

/// Descriptors that one fork's children may take of the page server and of the source: two for each of 512.
const MOST: usize = 1100;

fn source(jailed: bool) -> Vm {
    let setup = Setup::new(&hammer()).cpus(2).disk("root", 1 << 20);
    let mut source = if jailed { setup.jailed() } else { setup }.boot();
    goes_on(&mut source);
    source
}

fn goes_on(vm: &mut Vm) {
    let before = vm.printed();
    vm.until("it goes on", |vm| vm.printed() > before + 10 * LINE_LEN);
}

fn hostile(source: &Vm, name: &str, attack: &str) -> Hostile {
    source.hostile(name, Path::new(env!("CARGO_BIN_EXE_civic-hostile")), attack)
}

/// What is in the source's RAM.
fn checksum(source: &Vm) -> u64 {
    let ram = fs::read_dir(format!("/proc/{}/fd", source.pid()))
        .unwrap()
        .flatten()
        .find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:civic-ram")));
    let bytes = fs::read(ram.expect("it has RAM").path()).unwrap();
    assert_eq!(bytes.len(), 32 << 20);
    assert!(bytes.iter().any(|byte| *byte != 0));
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    hasher.finish()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Forks the source into a good child and `civic-hostile`, which does its worst. Returns what it tried.
fn attacked(attack: &str, jailed: bool) -> BTreeSet<String> {
    let mut source = source(jailed);
    let good = source.waiting("good");
    source.pause();
    let (before, disk) = (checksum(&source), fs::read(source.setup().root().join("root.img")).unwrap());
    let mut evil = hostile(&source, "evil", attack);
    let mut tried = evil.until("waits");
    let page_server = source.page_server();
    let mut good = {
        source.until("both to wait", |vm| vm.info().family.waiting.len() == 2);
        let children = vec!["good".into(), "evil".into()];
        let report = source.try_fork(ForkRequest { children, paused: false }).unwrap();
        assert_eq!((report.children.len(), &*report.failed), (2, &[][..]));
        good.born()
    };
    let known = [descriptors(source.pid()), descriptors(page_server)];
    tried.extend(evil.until("over"));
    for (pid, before) in [source.pid(), page_server].into_iter().zip(known) {
        assert!(descriptors(pid) < before + MOST, "{pid} has {} descriptors", descriptors(pid));
    }
    assert_eq!(checksum(&source), before, "the source's memory is not what it was");
    assert!(fs::read(source.setup().root().join("root.img")).unwrap() == disk, "its disk is not");
    let broken: Vec<_> = tried.iter().filter(|line| line.starts_with("obeyed")).collect();
    assert!(broken.is_empty(), "{broken:#?}");
    // The source runs on, and so does the other child, with what it touches from now on.
    source.resume();
    goes_on(&mut source);
    goes_on(&mut good);
    assert!(source.info().family.children.iter().any(|child| child.name == "good"));
    assert_eq!(source.page_server(), page_server, "it is another one");
    let (_, mut more) = source.fork(vec![source.waiting("more")], false);
    goes_on(&mut more[0]);
    goes_on(&mut good);
    drop(evil);
    source.until("it to be forgotten", |vm| vm.info().family.children.len() == 2);
    source.until("its descriptors to be closed", |vm| {
        descriptors(vm.pid()) < known[0] + 32 && descriptors(page_server) < known[1] + 32
    });
    goes_on(&mut source);
    goes_on(&mut good);
    for line in &tried {
        println!("{line}");
    }
    tried.into_iter().filter(|line| line.starts_with("refused")).collect()
}

fn attacked_both_ways(attack: &str, least: usize) {
    for jailed in [true, false] {
        let refused = attacked(attack, jailed);
        assert!(refused.len() >= least, "{attack}: {refused:#?}");
    }
}

#[test]
fn what_a_fork_was_given_cannot_be_written() {
    // Of memory, kernel and disk: each way that there is.
    assert!(attacked("memory", true).len() >= 45);
    assert!(attacked("memory", false).len() >= 35);
}

#[test]
fn what_is_not_a_forks_to_ask_is_refused() {
    attacked_both_ways("requests", 19);
}

#[test]
fn descriptors_are_not_used_up() {
    attacked_both_ways("descriptors", 2);
}

#[test]
fn a_fork_that_does_not_read_is_given_up() {
    attacked_both_ways("flood", 1);
}

#[test]
fn a_fork_that_says_what_nobody_understands_is_given_up() {
    attacked_both_ways("garbage", 1);
}

#[test]
fn a_fork_whose_faults_would_be_waited_for_is_given_up() {
    attacked_both_ways("blocking", 1);
}

#[test]
fn nobody_is_taken_for_somebody_else() {
    let mut source = source(true);
    let good = source.waiting("good");
    for attack in ["as-another", "as-page-server"] {
        let tried = hostile(&source, "evil", attack).until("over");
        assert!(tried.len() == 1 && tried[0].starts_with("refused"), "{tried:?}");
    }
    assert_eq!(source.info().family.waiting, ["good"]);
    let (_, mut children) = source.fork(vec![good], false);
    goes_on(&mut children[0]);
    goes_on(&mut source);
}
