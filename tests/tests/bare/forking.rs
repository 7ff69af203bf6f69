//! Forks: two VMs go on from one moment, and neither the other's life nor its death is anybody's business.

use civic_api::{ErrorCode, ForkRequest, VmState};
use civic_tests::bare::vm::{Setup, Vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::pausing::{LINE_LEN, hammer};

/// Takes what `vm` prints from the next line on, `lines` of them: numbers that must follow each other. Returns the first.
fn count(vm: &mut Vm, lines: usize) -> u32 {
    vm.expect("\n");
    let text = vm.take(lines * LINE_LEN);
    let numbers: Vec<u32> = text
        .chunks_exact(LINE_LEN)
        .map(|line| u32::from_str_radix(std::str::from_utf8(&line[..8]).unwrap(), 16).unwrap())
        .collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    numbers[0]
}

/// How many pages a child was given, as its parent's metrics tell.
fn given(vm: &Vm, child: &str) -> u64 {
    vm.metric(&format!("civic_fork_child_pages{{child=\"{child}\"}}"))
}

#[test]
fn source_and_child_count_on_from_the_same_number() {
    let mut source = Setup::new(&hammer()).cpus(4).boot();
    source.until("output", |vm| vm.printed() > 20 * LINE_LEN);
    for round in 1..=3 {
        let name = format!("child{round}");
        let waiting = source.waiting(&name);
        assert_eq!(source.info().family.waiting, std::slice::from_ref(&name));
        let before = source.printed();
        let (report, mut children) = source.fork(vec![waiting], false);
        println!("{report:?}");
        assert_eq!((report.generation, report.children[0].name.as_str()), (round, name.as_str()));
        let child = &mut children[0];
        assert_eq!(report.children[0].pid, child.pid());
        let parent = child.info().family.parent.unwrap();
        assert_eq!((parent.name.as_str(), parent.generation), ("bare", round));
        let family = source.info().family;
        assert_eq!((family.children.len(), family.waiting.len()), (1, 0));
        let first = count(child, 30);
        assert!(first as usize >= before / LINE_LEN, "{first} was printed before the fork");
        let all_run = |vm: &Vm| vm.info().vcpus.iter().all(|vcpu| vcpu.exits.values().sum::<u64>() > 20);
        child.until("progress of every CPU", all_run);
        child.kill();
        assert!(child.ended().success());
        source.until("the child to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    }
    assert_eq!(count(&mut source, 20), 0x1);
    source.kill();
    assert!(source.ended().success());
}

#[test]
fn a_child_is_given_beforehand_what_the_one_before_it_needed() {
    let source = Setup::new(&hammer()).cpus(4).boot();
    source.until("output", |vm| vm.printed() > 20 * LINE_LEN);
    let (_, mut children) = source.fork(vec![source.waiting("first")], false);
    count(&mut children[0], 20);
    let needed = given(&source, "first");
    children[0].kill();
    assert!(children[0].ended().success());
    // Its page server goes too: another one does it.
    source.until("the child to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    let (_, children) = source.fork(vec![source.waiting("second")], true);
    source.until("pages for the child", |vm| given(vm, "second") >= needed);
    assert_eq!(children[0].state(), VmState::Paused);
}

#[test]
fn paused_children_of_one_fork_wait_to_be_resumed() {
    let mut source = Setup::new(&hammer()).cpus(2).boot();
    source.until("output", |vm| vm.printed() > 20 * LINE_LEN);
    source.pause();
    let waiting = vec![source.waiting("a"), source.waiting("b"), source.waiting("c")];
    let (report, mut children) = source.fork(waiting, true);
    assert_eq!(report.children.len(), 3);
    // Of one that was paused, it stays so.
    assert_eq!(source.state(), VmState::Paused);
    let first: Vec<u32> = children
        .iter_mut()
        .map(|child| {
            assert_eq!((child.state(), child.printed()), (VmState::Paused, 0));
            child.resume();
            count(child, 5)
        })
        .collect();
    assert!(first.iter().all(|number| *number == first[0]), "{first:?}");
    source.resume();
    // A source that ends leaves its children alone.
    source.kill();
    assert!(source.ended().success());
    for child in &mut children {
        count(child, 20);
        child.kill();
        assert!(child.ended().success());
    }
}

#[test]
fn a_fork_is_forked_and_its_children_outlive_it_and_its_source() {
    let mut source = Setup::new(&hammer()).cpus(2).boot();
    source.until("output", |vm| vm.printed() > 20 * LINE_LEN);
    let (_, mut children) = source.fork(vec![source.waiting("child")], false);
    let mut child = children.remove(0);
    let at_fork = count(&mut child, 20);
    for round in 1..=2 {
        let names = [format!("a{round}"), format!("b{round}")];
        let (report, mut grandchildren) = child.fork(names.iter().map(|name| child.waiting(name)).collect(), false);
        assert_eq!(report.generation, round);
        let parent = grandchildren[0].info().family.parent.unwrap();
        assert_eq!((parent.name.as_str(), parent.generation), ("child", round));
        assert_eq!(child.info().family.children.len(), 2);
        // The source knows its own children only.
        assert_eq!(source.info().family.children.len(), 1);
        let first: Vec<_> = grandchildren.iter_mut().map(|vm| count(vm, 20)).collect();
        assert!(first[0] == first[1] && first[0] > at_fork + 19, "{first:?}");
        grandchildren.iter().for_each(Vm::kill);
        assert!(grandchildren.iter_mut().all(|vm| vm.ended().success()));
        child.until("its children to be forgotten", |vm| vm.info().family.children.is_empty());
    }
    let (_, mut grandchildren) = child.fork(vec![child.waiting("grandchild")], false);
    let grandchild = &mut grandchildren[0];
    // Either tells of its own.
    for (vm, its) in [(&source, "child"), (&child, "grandchild")] {
        assert!(given(vm, its) > 0);
        // It may have been given beforehand whatever it needed.
        vm.metric(&format!("civic_fork_child_service_seconds_count{{child=\"{its}\"}}"));
        let text = vm.metrics();
        assert_eq!(text.matches("civic_fork_generation_pages{").count(), 1, "{text}");
    }
    child.kill();
    assert!(child.ended().success());
    count(grandchild, 20);
    source.until("the child to be forgotten", |vm| vm.info().family.children.is_empty());
    count(&mut source, 20);
    source.kill();
    assert!(source.ended().success());
    count(grandchild, 20);
    // And one that has neither can still be forked.
    let (_, mut last) = grandchild.fork(vec![grandchild.waiting("last")], false);
    grandchild.kill();
    assert!(grandchild.ended().success());
    count(&mut last[0], 20);
    last[0].kill();
    assert!(last[0].ended().success());
}

#[test]
fn all_forks_end_with_their_page_server_and_the_source_goes_on() {
    let mut source = Setup::new(&hammer()).cpus(2).boot();
    source.until("output", |vm| vm.printed() > 20 * LINE_LEN);
    let (_, mut children) = source.fork(vec![source.waiting("child")], false);
    let child = &mut children[0];
    let (_, mut grandchildren) = child.fork(vec![child.waiting("grandchild")], false);
    count(&mut grandchildren[0], 20);
    kill(Pid::from_raw(source.page_server() as i32), Signal::SIGKILL).unwrap();
    for vm in [&mut grandchildren[0], child] {
        assert!(!vm.ended_badly().0.success());
    }
    count(&mut source, 20);
    source.until("its children to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    let (_, mut children) = source.fork(vec![source.waiting("another")], false);
    count(&mut children[0], 20);
}

#[test]
fn a_monitor_that_waits_says_so_and_can_be_ended() {
    let source = Setup::new(&hammer()).boot();
    for end in ["stop", "kill", "source"] {
        let waiting = source.waiting("w");
        let info = waiting.api(|client| async move { client.info().await }).unwrap();
        assert_eq!((info.state, info.boots, info.vcpus.len()), (VmState::Waiting, 0, 0));
        assert_eq!(info.family.parent, Some(civic_api::Parent { name: "bare".into(), generation: 0 }));
        let refused = waiting.api(|client| async move { client.pause().await }).unwrap_err();
        assert_eq!(refused.refusal().map(|error| error.code), Some(ErrorCode::WrongState), "{refused}");
        match end {
            "stop" => waiting.api(|client| async move { client.stop().await }).unwrap(),
            "kill" => waiting.api(|client| async move { client.kill().await }).unwrap(),
            _ => source.kill(),
        }
        assert_eq!(waiting.ended().code(), Some(1), "{end}");
        if end != "source" {
            source.until("nobody waits", |vm| vm.info().family.waiting.is_empty());
        }
    }
}

#[test]
fn what_cannot_be_forked_is_refused_with_a_reason() {
    let source = Setup::new(&hammer()).launch();
    let fork = |children: &[&str]| {
        let children = children.iter().map(|name| (*name).to_owned()).collect();
        let error = source.try_fork(ForkRequest { children, paused: false }).unwrap_err();
        error.refusal().unwrap_or_else(|| panic!("{error}")).clone()
    };
    assert_eq!(fork(&["x"]).code, ErrorCode::WrongState, "it was never started");
    source.start();
    assert_eq!(fork(&[]).code, ErrorCode::InvalidRequest);
    assert_eq!(fork(&["x", "x"]).code, ErrorCode::InvalidRequest);
    assert_eq!(fork(&["../x"]).code, ErrorCode::InvalidRequest);
    assert_eq!(fork(&["x"]).code, ErrorCode::NotFound);
    let waiting = source.waiting("x");
    let without = fork(&["x"]);
    assert_eq!(without.code, ErrorCode::ForkFailed, "{without:?}");
    assert!(without.message.contains("page server"), "{without:?}");
    drop(waiting);
    source.until("nobody waits", |vm| vm.info().family.waiting.is_empty());
    let (_, children) = source.fork(vec![source.waiting("y")], false);
    // A fork cannot be saved yet, and says so.
    let error = children[0].try_save("s", civic_api::AfterSave::Resume).unwrap_err();
    assert!(error.to_string().contains("cannot be saved"), "{error}");
}
