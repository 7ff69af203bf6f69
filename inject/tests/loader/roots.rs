//! Programs from stores: file systems in files, on loop devices of this host.

use std::path::Path;
use std::process::Command;

use civic_inject::wire::{Disk, Root, Step, Store};
use nix::errno::Errno;
use tempfile::TempDir;

use crate::guest::{Guest, Heard};

/// A loop device with a file system that has nothing but a shell.
struct Loop {
    name: String,
    _image: TempDir,
}

impl Loop {
    /// Made by `mkfs`, which is given the file and a folder whose content is to be in it. `None` if this host has no such program.
    fn new(mkfs: &str, arguments: &[&str]) -> Option<Self> {
        let image = tempfile::tempdir().unwrap();
        let root = image.path().join("root");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::copy("/usr/bin/busybox", root.join("bin/busybox")).expect("a static busybox is here");
        let file = image.path().join("image");
        std::fs::File::create(&file).unwrap().set_len(200 << 20).unwrap();
        let made = Command::new(mkfs).args(arguments).arg(&root).arg(&file).output();
        let Ok(made) = made else {
            eprintln!("SKIPPED: there is no {mkfs}");
            return None;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let set_up = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
        assert!(set_up.status.success(), "{}", String::from_utf8_lossy(&set_up.stderr));
        let device = String::from_utf8(set_up.stdout).unwrap();
        let name = Path::new(device.trim()).file_name().unwrap().to_str().unwrap().to_owned();
        Some(Self { name, _image: image })
    }

    fn run(&self, read_only: bool, script: &str) -> Heard {
        let store = Store { disk: Disk::Name(&self.name), read_only };
        let mut guest = Guest::start("echo content > file");
        let dir = guest.dir.path().to_str().unwrap().to_owned();
        // What the test's other threads have mounted is no matter here.
        guest.run(&["/bin/busybox", "sh", "-c", script, "sh", &dir], |launch| launch.root = Root::Store(store))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(Path::new("/dev").join(&self.name)).status();
    }
}

/// What is seen from within a store.
const LOOK: &str = "export PATH=; busybox() { /bin/busybox \"$@\"; }; busybox cat /guest$1/file; cd /; \
    for file in /proc/self/status /sys/class /dev/null /dev/pts/ptmx /guest/proc/self; do busybox test -e $file || echo no $file; done; \
    for folder in / /tmp /run /guest/tmp; do echo 2>/dev/null > $folder/new && echo $folder; busybox rm -f $folder/new; done";

#[test]
fn a_store_is_the_root_and_has_the_guests_in_it() {
    let Some(store) = Loop::new("mkfs.ext4", &["-q", "-d"]) else { return };
    let heard = store.run(false, LOOK);
    assert_eq!(heard.stdout(), "content\n/\n/tmp\n/run\n/guest/tmp\n", "{heard:?}");
    assert_eq!(heard.warnings, [""; 0]);
    // What was written stays.
    assert_eq!(store.run(false, "echo kept > /run/kept").warnings, [""; 0]);
    let heard = store.run(true, LOOK);
    assert_eq!(heard.stdout(), "content\n/tmp\n/run\n/guest/tmp\n", "{heard:?}");
    assert_eq!(heard.warnings, [""; 0]);
    assert_eq!(store.run(false, "/bin/busybox cat /run/kept").stdout(), "kept\n");
}

#[test]
fn a_store_without_folders_that_cannot_be_written_is_one() {
    let Some(store) = Loop::new("mkfs.ext4", &["-q", "-d"]) else { return };
    let heard = store.run(true, "exit 9");
    heard.assert_code(9);
    assert_eq!(heard.warnings.len(), 7, "{heard:?}");
}

/// Whether the file system of a store needs no recovery and has no fault.
fn is_clean(store: &Loop) -> bool {
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(Path::new("/dev").join(&store.name)).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
    checked.status.success() && !said.contains("recovery")
}

#[test]
fn a_tidy_end_leaves_no_process_and_a_clean_store() {
    let Some(store) = Loop::new("mkfs.ext4", &["-q", "-d"]) else { return };
    // In the background, twice over, and with a file of the store's open that has no name any more.
    let script = "(/bin/busybox setsid /bin/busybox sh -c '(exec 3>/gone; /bin/busybox rm /gone; echo > /there; \
        while :; do echo x >&3; /bin/busybox sleep 0.01; done) & :' &) ; until [ -e /there ]; do :; done; exit 3";
    for round in 0..5 {
        let disk = Disk::Name(&store.name);
        let mut guest = Guest::new(&crate::guest::Setting {
            after: "for p in /proc/[0-9]*; do echo $(cat $p/cmdline 2>/dev/null | tr '\\0' ' '); done > left",
            ..Default::default()
        });
        let heard = guest.run(&["/bin/busybox", "sh", "-c", script], |launch| {
            (launch.root, launch.tidy_up) = (Root::Store(Store { disk, read_only: false }), true);
        });
        heard.assert_code(3);
        assert_eq!(heard.warnings, [""; 0], "round {round}");
        assert!(is_clean(&store), "round {round}");
        guest.wait_for_end();
        let left = std::fs::read_to_string(guest.dir.path().join("left")).unwrap();
        assert!(!left.contains("busybox"), "{left}");
    }
    // Also where there is no program, and where the store cannot be written.
    let disk = Disk::Name(&store.name);
    let heard = Guest::start("").run(&["/none"], |launch| {
        (launch.root, launch.tidy_up) = (Root::Store(Store { disk, read_only: false }), true);
    });
    heard.assert_failed(Step::Exec, Errno::ENOENT as i32);
    assert!(is_clean(&store));
    let heard = Guest::start("").run(&["/bin/busybox", "true"], |launch| {
        (launch.root, launch.tidy_up) = (Root::Store(Store { disk, read_only: true }), true);
    });
    heard.assert_code(0);
    assert_eq!(heard.warnings, [""; 0]);
}

#[test]
fn a_store_that_others_use_too_is_said_to_stay() {
    let Some(store) = Loop::new("mkfs.ext4", &["-q", "-d"]) else { return };
    let mut other = Guest::start(&format!("mkdir -p m; mount /dev/{} m", store.name));
    let disk = Disk::Name(&store.name);
    let heard = Guest::start("").run(&["/bin/busybox", "true"], |launch| {
        (launch.root, launch.tidy_up) = (Root::Store(Store { disk, read_only: false }), true);
    });
    heard.assert_code(0);
    assert!(heard.warnings.len() == 1 && heard.warnings[0].contains("still in use"), "{heard:?}");
    other.run(&["true"], |_| {}).assert_code(0);
}

#[test]
fn a_store_may_be_another_file_system() {
    let Some(store) = Loop::new("mkfs.btrfs", &["-q", "-r"]) else { return };
    let heard = store.run(false, LOOK);
    assert_eq!(heard.stdout(), "content\n/\n/tmp\n/run\n/guest/tmp\n", "{heard:?}");
}

#[test]
fn a_terminal_is_found_in_a_store() {
    let Some(store) = Loop::new("mkfs.ext4", &["-q", "-d"]) else { return };
    let disk = Disk::Name(&store.name);
    let heard = Guest::start("").run(&["/bin/busybox", "tty"], |launch| {
        launch.root = Root::Store(Store { disk, read_only: false });
        launch.tty = Some(Default::default());
    });
    assert_eq!(heard.stdout(), "/dev/pts/0\r\n", "{heard:?}");
}

#[test]
fn a_disk_that_does_not_come_is_said() {
    for (disk, name) in [(Disk::Serial("no-such"), "serial number no-such"), (Disk::Name("no-such"), "name no-such")] {
        let heard = Guest::start("").run(&["true"], |launch| {
            launch.timeout_ms = 20;
            launch.root = Root::Store(Store { disk, read_only: true });
        });
        let text = heard.assert_failed(Step::Store, Errno::ENODEV as i32);
        assert_eq!(text, format!("the guest's kernel has found no disk with the {name}"));
    }
}

#[test]
fn a_disk_without_a_file_system_is_said() {
    let Some(disk) = Loop::new("true", &[]) else { return };
    let heard = disk.run(true, "");
    let text = heard.assert_failed(Step::Store, Errno::EINVAL as i32);
    assert!(text.ends_with(&format!("from the disk {}", disk.name)), "{text}");
}
