//! `civic store` as scripts see it, on images that are made here without packages.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

fn civic(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_civic")).arg("store").args(arguments).current_dir(dir).output().unwrap()
}

/// What it says on stderr, which must fail with 125.
fn complains(dir: &Path, arguments: &[&str]) -> String {
    let output = civic(dir, arguments);
    assert_eq!(output.status.code(), Some(125), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A store with these folders.
fn image(dir: &Path, folders: &[&str]) {
    let tree = dir.join("tree");
    for folder in folders {
        fs::create_dir_all(tree.join(folder)).unwrap();
    }
    File::create(dir.join("store.img")).unwrap().set_len(16 << 20).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d", "tree", "store.img"])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .current_dir(dir)
        .status();
    assert!(made.unwrap().success());
}

const FOLDERS: [&str; 6] = ["guest", "proc", "sys", "dev", "run", "tmp"];

#[test]
fn a_sound_store_and_a_broken_one() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), &FOLDERS);
    let sound = civic(dir.path(), &["check", "store.img", "--json"]);
    assert!(sound.status.success(), "{sound:?}");
    let report: serde_json::Value = serde_json::from_slice(&sound.stdout).unwrap();
    assert_eq!(report["size_bytes"], 16 << 20);
    assert_eq!(report["used_by"], serde_json::Value::Null);

    let broken = Command::new("debugfs")
        .args(["-w", "-R", "set_inode_field /guest links_count 9", "store.img"])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .current_dir(dir.path())
        .output();
    assert!(broken.unwrap().status.success());
    assert!(complains(dir.path(), &["check", "store.img"]).contains("its file system has errors"));
}

#[test]
fn what_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), &FOLDERS[1..]);
    assert!(complains(dir.path(), &["check", "store.img"]).contains("no folders guest"));
    fs::write(dir.path().join("note"), "no image").unwrap();
    assert!(complains(dir.path(), &["check", "note"]).contains("no ext4 file system"));
    assert!(complains(dir.path(), &["check", "none"]).contains("'none'"));
}

#[test]
fn an_image_that_a_vm_writes_to() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), &FOLDERS);
    let file = File::options().read(true).write(true).open(dir.path().join("store.img")).unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    let shown = civic(dir.path(), &["check", "store.img"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("a VM writes to it"), "{shown:?}");
    let told = complains(dir.path(), &["build", "store.img", "--package", "strace", "--force"]);
    assert!(told.contains("a VM uses 'store.img'"), "{told}");
}

#[test]
fn what_is_typed_wrong() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("old.img"), "").unwrap();
    let told = |arguments: &[&str]| complains(dir.path(), arguments);
    assert!(told(&["build", "old.img", "--package", "strace"]).contains("--force"));
    assert!(told(&["build", "new.img"]).contains("--package"));
    assert!(told(&["build", "new.img", "--package", "x;y"]).contains("no package has such a name"));
    assert!(told(&["build", "new.img", "--package", "strace", "--file", "none:/x"]).contains("--file"));
    assert!(told(&["build", "new.img", "--package", "strace", "--file", "none"]).contains("SRC:DST"));
    assert!(told(&["build", "new.img", "--package", "strace", "--setup", "none"]).contains("--setup"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
