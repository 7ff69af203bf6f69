//! Guests that stand still.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use civic_inject::wire::{Freeze, ToGuest};

use crate::guest::{DEADLINE, Guest, Heard, Setting};

/// Shell functions that say the state of the guest's second process, which is the first child of its shell, and wait for it to be another.
/// Who is stopped does nothing more, but is seen to be only once it would have run.
const STATE: &str = "state() { sed -n 's/^State:.\\(.\\).*/\\1/p' /proc/2/status; }; becomes() { until [ $(state) = $1 ]; do :; done; echo $1; }";

#[test]
fn all_processes_stop_and_go_on() {
    let mut guest = Guest::start("sleep 1000 &");
    let mut heard = Heard::default();
    guest.launch(&["sh", "-c", &format!("{STATE}; becomes T; becomes S")], |launch| {
        launch.freeze = Freeze::Stop;
    });
    guest.hear_until(&mut heard, |heard| heard.stdout == b"T\n");
    guest.send(ToGuest::Thaw);
    let heard = guest.hear_all(heard);
    heard.assert_code(0);
    assert_eq!(heard.stdout(), "T\nS\n");
}

#[test]
fn processes_go_on_at_the_end_if_wanted() {
    let after = format!("{STATE}; becomes S; echo > went-on");
    let mut guest = Guest::new(&Setting { before: "sleep 1000 &", after: &after, group: None });
    let heard = guest.run(&["sh", "-c", &format!("{STATE}; becomes T")], |launch| {
        (launch.freeze, launch.thaw_at_end) = (Freeze::Stop, true);
    });
    assert_eq!(heard.stdout(), "T\n");
    guest.wait_for_end();
    assert!(guest.dir.path().join("went-on").exists());
}

/// A control group of this host, with all of it gone in the end.
struct Group(PathBuf);

impl Group {
    /// `None` where there is no cgroup2, or none that can be changed.
    fn new(name: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let path = mounts.find(|mount| mount[2] == "cgroup2").map(|mount| Path::new(mount[1]).join(name));
        let made = path.filter(|path| std::fs::create_dir(path).is_ok());
        if made.is_none() {
            eprintln!("SKIPPED: this host has no cgroup2 that can be used");
        }
        made.map(Self)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let begun = Instant::now();
        // The guest's processes take a moment to be gone.
        while [self.0.join("some"), self.0.clone()]
            .iter()
            .any(|group| group.exists() && std::fs::remove_dir(group).is_err())
        {
            if begun.elapsed() > DEADLINE {
                eprintln!("{} could not be removed", self.0.display());
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn control_groups_freeze_and_thaw() {
    let Some(group) = Group::new(&format!("civic-loader-{}-freeze", std::process::id())) else { return };
    let before = "mkdir $GROUP/some; sleep 1000 & echo $! > $GROUP/some/cgroup.procs";
    let mut guest = Guest::new(&Setting { before, after: "", group: Some(&group.0) });
    let mut heard = Heard::default();
    let script = "frozen() { grep frozen $0/some/cgroup.events; }; frozen; grep 0:: /proc/1/cgroup /proc/self/cgroup; echo up; \
        while [ \"$(frozen)\" = 'frozen 1' ]; do :; done; frozen";
    guest.launch(&["sh", "-c", script, group.0.to_str().unwrap()], |launch| launch.freeze = Freeze::Cgroup);
    guest.hear_until(&mut heard, |heard| heard.stdout.ends_with(b"up\n"));
    assert_eq!(heard.stdout(), "frozen 1\n/proc/1/cgroup:0::/\n/proc/self/cgroup:0::/\nup\n");
    guest.send(ToGuest::Thaw);
    let heard = guest.hear_all(heard);
    assert!(heard.stdout().ends_with("up\nfrozen 0\n"));
    assert_eq!(heard.warnings, [""; 0]);
}

#[test]
fn without_control_groups_processes_are_stopped() {
    let Some(group) = Group::new(&format!("civic-loader-{}-stop", std::process::id())) else { return };
    let mut guest = Guest::new(&Setting { before: "sleep 1000 &", after: "", group: Some(&group.0) });
    let heard = guest.run(&["sh", "-c", &format!("{STATE}; becomes T")], |launch| launch.freeze = Freeze::Cgroup);
    assert_eq!(heard.stdout(), "T\n");
    assert_eq!(heard.warnings.len(), 1, "{heard:?}");
}
