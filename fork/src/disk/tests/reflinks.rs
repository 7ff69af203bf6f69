//! Copies by reflink, and what is done where the file system has none.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use super::*;

/// What tells a test that it has a file system with reflinks, and where.
const FOLDER: &str = "CIVIC_REFLINK_DIR";

fn source(dir: &Path) -> Source {
    let file = files::Nameless::new(dir).unwrap().file;
    file.set_len(8 * C + 512).unwrap();
    let told = Told::default();
    let options = FreezerOptions { store: dir.to_owned(), limit: 1 << 30, reflink: Some(dir.to_owned()) };
    let freezer = Freezer::over_file(reopen_read_only(&file).unwrap(), options, tell(&told)).unwrap();
    let source = Source { file, freezer, told };
    source.fill(1, 0..8);
    source
}

fn check(source: &Source, copies: bool) {
    source.freezer.prepare().unwrap();
    let before = source.content();
    let generation = source.freezer.freeze().unwrap();
    assert_eq!(generation.is_copy(), copies);
    let child = open(&generation);
    source.fill(2, 1..5);
    source.punch(5 * C, 2 * C);
    source.resize(10 * C);
    assert!(all(&child) == before);
    assert_eq!(source.freezer.usage().generations, usize::from(!copies));
    assert!(generation.parts().unwrap().fds.into_iter().all(|fd| File::from(fd).write_all_at(&[1], 0).is_err()));
    let second = source.freezer.freeze().unwrap();
    assert_eq!(second.is_copy(), copies);
    assert!(all(&open(&second)) == source.content() && all(&child) == before);
    drop(generation);
    // A copy lives as long as anyone has it.
    assert_eq!(child.lost(), if copies { None } else { Some(Lost::Ended) });
}

#[test]
fn without_reflinks_clusters_are_preserved() {
    // tmpfs says EOPNOTSUPP; a file of another file system says EXDEV; an unfit folder something else.
    let memory = Path::new("/dev/shm");
    check(&source(memory), false);
    for dir in ["/proc", "/missing"] {
        let unfit = source(memory);
        let options = FreezerOptions { store: memory.to_owned(), limit: 1 << 30, reflink: Some(dir.into()) };
        let reader = reopen_read_only(&unfit.file).unwrap();
        let freezer = Freezer::over_file(reader, options, tell(&unfit.told)).unwrap();
        check(&Source { freezer, ..unfit }, false);
    }
}

/// By root the test mounts a btrfs of its own. Anyone else can name a folder that has reflinks.
#[test]
fn with_reflinks_the_source_preserves_nothing() {
    if let Some(dir) = std::env::var_os(FOLDER) {
        return check(&source(dir.as_ref()), true);
    }
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let kernel = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !nix::unistd::geteuid().is_root() || !has("mkfs.btrfs") || !kernel.contains("btrfs") {
        let why = "NOT TESTED: copies by reflink. It takes root, mkfs.btrfs (btrfs-progs) and a kernel with btrfs, or ";
        // Past what the harness keeps to itself.
        return std::io::stderr().write_all(format!("{why}{FOLDER}=FOLDER\n").as_bytes()).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let script = r#"cd "$0" && mkdir mnt && truncate -s 128M image && mkfs.btrfs -q image && mount -o loop image mnt &&
        exec "$1" --exact --nocapture "$2""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(dir.path()).arg(std::env::current_exe().unwrap());
    command.arg("disk::tests::reflinks::with_reflinks_the_source_preserves_nothing");
    let out = command.env(FOLDER, dir.path().join("mnt")).output().unwrap();
    assert!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
}
