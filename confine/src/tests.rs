use std::collections::BTreeSet;

use super::*;

/// What a kind's main filter names.
fn names(kind: Kind) -> BTreeSet<String> {
    let (name, text) = kind.reviewed();
    let filters: serde_json::Value = serde_json::from_str(text).unwrap();
    let rules = filters[name]["filter"].as_array().unwrap_or_else(|| panic!("{name}.json has no filter '{name}'"));
    rules.iter().map(|rule| rule["syscall"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_filter_compiles_and_ends_the_process_unless_it_only_audits() {
    for kind in Kind::ALL {
        let (name, text) = kind.reviewed();
        for mode in [Mode::Enforce, Mode::Audit] {
            assert!(compile(kind, mode).unwrap().contains_key(name), "{name}");
        }
        let filters: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(filters[name]["mismatch_action"], "kill_process");
        assert_eq!(filters[name]["match_action"], "allow");
    }
}

#[test]
fn nobody_may_do_what_leads_out() {
    for kind in Kind::ALL {
        let names = names(kind);
        for out in
            ["execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "mount", "setns"]
                .into_iter()
                .chain([
                    "unshare",
                    "pivot_root",
                    "chroot",
                    "bpf",
                    "keyctl",
                    "kexec_load",
                    "init_module",
                    "setuid",
                    "open_by_handle_at",
                ])
                .chain(["pidfd_getfd", "userfaultfd", "move_mount", "perf_event_open", "mknodat"])
        {
            // A monitor asks for one where /dev/userfaultfd is not for it.
            if (kind, out) != (Kind::Monitor, "userfaultfd") {
                assert!(!names.contains(out), "{kind:?}: {out}");
            }
        }
    }
    for kind in [Kind::Vcpu, Kind::Device, Kind::Pager] {
        for opening in
            ["open", "openat", "openat2", "creat", "unlink", "unlinkat", "rename", "memfd_create", "listen", "bind"]
        {
            assert!(!names(kind).contains(opening), "{kind:?}: {opening}");
        }
    }
}

#[test]
fn what_a_thread_may_do_whoever_starts_it_may() {
    for (inner, outer) in [(Kind::Device, Kind::Vcpu), (Kind::Vcpu, Kind::Monitor), (Kind::Api, Kind::Monitor)] {
        let more: Vec<_> = names(inner).difference(&names(outer)).cloned().collect();
        assert_eq!(more, Vec::<String>::new(), "{inner:?} in {outer:?}");
    }
}

#[test]
fn a_confined_thread_is_seen_to_be() {
    // Another thread than the test's own stays as it is: this one is narrowed alone, and goes.
    let program = compile(Kind::Monitor, Mode::Audit).unwrap();
    let confined = std::thread::spawn(move || {
        program.values().for_each(|program| apply_filter(program).unwrap());
        std::fs::read_to_string("/proc/thread-self/status").unwrap()
    });
    let status = confined.join().unwrap();
    assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
}
