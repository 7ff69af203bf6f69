//! VMs in jails: who they are, what filters them, and what a fork can do to its source. CIVIC_TEST_JAIL=1 runs all other tests so too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use civic_tests::bare::vm::{Setup, Vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::pausing::hammer;

/// The fields of each of a process's threads, by name and number.
fn threads(pid: u32) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("status")).ok()?;
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        let fields: BTreeMap<_, _> = fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
        Some((format!("{} {}", fields["Name"], fields["Pid"]), fields))
    };
    tasks.filter_map(|task| status(task.unwrap())).collect()
}

fn user(pid: u32) -> u32 {
    fs::metadata(format!("/proc/{pid}")).unwrap().uid()
}

fn counts(vm: &mut Vm) {
    let before = vm.printed();
    vm.until("it runs on", |vm| vm.printed() > before);
}

#[test]
fn every_thread_is_filtered_and_every_process_another_users() {
    let mut source = Setup::new(&hammer()).cpus(2).disk("root", 1 << 20).jailed().boot();
    counts(&mut source);
    let (_, mut children) = source.fork(vec![source.waiting("one"), source.waiting("two")], false);
    children.iter_mut().for_each(counts);
    let pids = [source.pid(), source.page_server(), children[0].pid(), children[1].pid()];
    let users: BTreeSet<_> = pids.iter().map(|pid| user(*pid)).collect();
    assert!(users.len() == 4 && !users.contains(&0), "{users:?}");
    let root = fs::metadata("/").unwrap();
    for pid in pids {
        let threads = threads(pid);
        assert!(!threads.is_empty());
        for (name, fields) in &threads {
            assert_eq!(fields["Seccomp"], "2", "{name} of {pid} makes whatever system call it wants");
            assert_eq!((&*fields["NoNewPrivs"], &*fields["CapEff"]), ("1", "0000000000000000"), "{name} of {pid}");
        }
        // A vCPU's and the API's are narrower than what they were started with.
        let of = |kind: &str| threads.iter().find(|(name, _)| name.starts_with(kind)).map(|(_, fields)| fields);
        if let (Some(main), Some(vcpu), Some(api)) = (of("civic-vmm"), of("vcpu0"), of("api")) {
            let filters = |fields: &BTreeMap<String, String>| fields["Seccomp_filters"].parse::<u32>().unwrap();
            assert!(filters(vcpu) > filters(main) && filters(api) > filters(main), "{pid}");
        } else {
            assert_eq!(pid, source.page_server());
        }
        let inside = fs::metadata(format!("/proc/{pid}/root")).unwrap();
        assert_ne!((inside.dev(), inside.ino()), (root.dev(), root.ino()), "{pid} sees the host's files");
        for namespace in ["mnt", "pid", "ipc", "uts"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(of(&pid.to_string()), of("self"), "{namespace} of {pid}");
        }
    }
}

#[test]
fn a_child_cannot_open_its_sources_memory_for_writing() {
    let mut source = Setup::new(&hammer()).jailed().boot();
    counts(&mut source);
    let (_, mut children) = source.fork(vec![source.waiting("child")], false);
    counts(&mut children[0]);
    let child = children[0].pid();
    // What it has of its source's RAM it has to read, and belongs to somebody else who lets nobody in.
    let rams = fs::read_dir(format!("/proc/{child}/fd")).unwrap().filter_map(|fd| {
        let fd = fd.unwrap();
        let is_ram = fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:civic-ram"));
        is_ram.then(|| fd.path())
    });
    let rams: Vec<_> = rams.collect();
    assert!(!rams.is_empty());
    for ram in &rams {
        let number = ram.file_name().unwrap().to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("/proc/{child}/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        assert_eq!(u32::from_str_radix(flags, 8).unwrap() & 0o3, 0, "{number} can be written");
        let meta = fs::metadata(ram).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.uid()), (0o600, user(source.pid())));
        assert_ne!(meta.uid(), user(child));
    }
}

#[test]
fn a_page_server_that_is_killed_or_stands_still_is_given_up_in_jails_too() {
    let mut source = Setup::new(&hammer()).cpus(2).jailed().boot();
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        counts(&mut source);
        let (_, mut children) = source.fork(vec![source.waiting("child")], false);
        counts(&mut children[0]);
        kill(Pid::from_raw(source.page_server() as i32), signal).unwrap();
        assert!(!children[0].ended_badly().0.success());
        counts(&mut source);
        source.until("its child to be forgotten", |vm| vm.info().family == civic_api::Family::default());
    }
}
