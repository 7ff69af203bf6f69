//! The loader as that which copies: against the `tar` crate and GNU tar, both ways, and against archives that are made to do harm.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use civic_inject::wire::Job;
use civic_inject::wire::archive::{END, Entry, Kind, Time};
use tempfile::TempDir;

use crate::guest::{End, Guest, Heard};

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn pack(path: &Path) -> Heard {
    Guest::start("").copy(Job::Pack(&c_path(path)), b"")
}

fn unpack(path: &Path, rename: bool, archive: &[u8]) -> Heard {
    Guest::start("").copy(Job::Unpack { path: &c_path(path), rename }, archive)
}

impl Heard {
    /// Asserts that it failed, and gives its last line.
    #[track_caller]
    fn assert_complained(&self) -> &str {
        let said = std::str::from_utf8(&self.stderr).unwrap();
        assert!(
            matches!(&self.end, Some(End::Exited(exit)) if *exit == civic_inject::wire::Exit::Code(1)),
            "{:?}, {said}",
            self.end
        );
        said.lines().last().unwrap()
    }

    #[track_caller]
    fn assert_copied(&self, stderr: &str) {
        self.assert_code(0);
        assert_eq!(String::from_utf8_lossy(&self.stderr), stderr);
    }
}

/// All that a copy is to have of a file.
#[derive(Debug, PartialEq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    content: Vec<u8>,
}

/// A folder's files, by their paths in it.
fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_dir() {
            left.extend(path.read_dir().unwrap().map(|file| file.unwrap().path()));
            Vec::new()
        } else if meta.is_symlink() {
            path.read_link().unwrap().as_os_str().as_bytes().to_vec()
        } else {
            std::fs::read(&path).unwrap()
        };
        let seen = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            content,
        };
        found.insert(path.strip_prefix(root).unwrap().to_owned(), seen);
    }
    found
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let at = nix::sys::time::TimeSpec::new(seconds, nanoseconds);
    let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &at, &at, flags).unwrap();
}

/// A folder `tree` with all kinds of files.
fn tree() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    let deep: PathBuf = std::iter::repeat_n("twenty-bytes-a-level", 40).collect();
    let deep = root.join(deep);
    std::fs::create_dir_all(&deep).unwrap();
    let files: [(PathBuf, Vec<u8>); 9] = [
        (root.join("empty"), Vec::new()),
        (root.join("one"), b"x".to_vec()),
        (root.join("a block"), vec![7; 512]),
        (root.join("a chunk"), (0..65536_u32).map(|n| (n % 251) as u8).collect()),
        (root.join("large"), (0..1_000_001_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()),
        (root.join("n".repeat(255)), b"long".to_vec()),
        (root.join("h".repeat(94)), b"just short enough".to_vec()),
        (root.join(OsStr::from_bytes(b"odd \xff\x01\n bytes")), b"odd".to_vec()),
        (deep.join("deep"), b"deep".to_vec()),
    ];
    for (n, (path, content)) in files.iter().enumerate() {
        std::fs::write(path, content).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600 + n as u32)).unwrap();
        set_mtime(path, 1_000_000_000 + n as i64, if n % 2 == 0 { 0 } else { 123_456_789 });
    }
    std::fs::set_permissions(root.join("one"), PermissionsExt::from_mode(0o4755)).unwrap();
    set_mtime(&root.join("empty"), -2, 500_000_000);
    std::os::unix::fs::chown(root.join("one"), Some(1234), Some(3_000_000)).unwrap();
    std::fs::set_permissions(root.join("one"), PermissionsExt::from_mode(0o4755)).unwrap();
    symlink("nowhere", root.join("link")).unwrap();
    symlink("l".repeat(300), root.join("long link")).unwrap();
    set_mtime(&root.join("link"), 77, 0);
    std::fs::create_dir(root.join("closed")).unwrap();
    std::fs::set_permissions(root.join("closed"), PermissionsExt::from_mode(0o1500)).unwrap();
    for folder in ["closed", "twenty-bytes-a-level", ""] {
        set_mtime(&root.join(folder), 1_200_000_000, 5);
    }
    // The others have the times at which they were made.
    dir
}

fn gnu_tar(arguments: &[&str], folder: &Path, input: &[u8]) -> Vec<u8> {
    let mut tar = Command::new("tar");
    tar.args(arguments).arg("-C").arg(folder).stdin(Stdio::piped()).stdout(Stdio::piped()).env("LC_ALL", "C");
    let extract = arguments.contains(&"-x");
    tar.arg("-f-").args((!extract).then_some("tree"));
    let mut tar = tar.spawn().unwrap();
    let mut stdin = tar.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || std::io::Write::write_all(&mut stdin, input).unwrap());
        let out = tar.wait_with_output().unwrap();
        assert!(out.status.success());
        out.stdout
    })
}

#[test]
fn what_it_packs_is_what_others_unpack() {
    let tree = tree();
    let heard = pack(&tree.path().join("tree"));
    heard.assert_copied("");
    let expected = look(tree.path().join("tree").as_path());

    let gnu = tempfile::tempdir().unwrap();
    gnu_tar(&["-x", "-p", "--same-owner"], gnu.path(), &heard.stdout);
    assert!(look(&gnu.path().join("tree")) == expected);

    let mut archive = tar::Archive::new(&heard.stdout[..]);
    let mut count = 0;
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().into_owned();
        let seen = &expected[path.strip_prefix("tree").unwrap()];
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if let Some(link) = entry.link_name_bytes() {
            content = link.into_owned();
        }
        assert!(content == seen.content, "{}", path.display());
        let header = entry.header();
        let owner = (header.uid().unwrap() as u32, header.gid().unwrap() as u32);
        assert_eq!((header.mode().unwrap(), owner), (seen.mode & 0o7777, seen.owner), "{}", path.display());
        count += 1;
    }
    assert_eq!(count, expected.len());
}

#[test]
fn it_unpacks_what_others_and_it_itself_pack() {
    let tree = tree();
    let expected = look(tree.path().join("tree").as_path());
    let whole = |seen: &BTreeMap<PathBuf, Seen>| {
        let seen = seen.iter().map(|(path, seen)| {
            (path.clone(), Seen { mtime: (seen.mtime.0.max(0), 0), content: seen.content.clone(), ..*seen })
        });
        seen.collect::<BTreeMap<_, _>>()
    };
    let own = pack(&tree.path().join("tree")).stdout;
    let pax = gnu_tar(&["-c", "--format=pax"], tree.path(), b"");
    let gnu = gnu_tar(&["-c", "--format=gnu"], tree.path(), b"");
    let mut crates = tar::Builder::new(Vec::new());
    crates.follow_symlinks(false);
    // The only name and the only time that this cannot write.
    set_mtime(&tree.path().join("tree/empty"), 5, 0);
    std::fs::rename(tree.path().join("tree").join(OsStr::from_bytes(b"odd \xff\x01\n bytes")), tree.path().join("odd"))
        .unwrap();
    crates.append_dir_all("tree", tree.path().join("tree")).unwrap();
    for (name, archive, exact) in
        [("own", own, true), ("pax", pax, true), ("gnu", gnu, false), ("crate", crates.into_inner().unwrap(), false)]
    {
        let to = tempfile::tempdir().unwrap();
        let heard = unpack(to.path(), false, &archive);
        heard.assert_copied("");
        let mut found = look(&to.path().join("tree"));
        let mut expected_here = if exact { look_clone(&expected) } else { whole(&expected) };
        if !exact {
            found = whole(&found);
        }
        if name == "crate" {
            expected_here.remove(Path::new(OsStr::from_bytes(b"odd \xff\x01\n bytes")));
            // It has folders' times at which their files were moved, above.
            expected_here.values_mut().chain(found.values_mut()).for_each(|seen| seen.mtime = (0, 0));
        }
        assert_eq!(found.keys().collect::<Vec<_>>(), expected_here.keys().collect::<Vec<_>>(), "{name}");
        for (path, seen) in &found {
            assert!(
                *seen == expected_here[path],
                "{name}: {}: {:?}",
                path.display(),
                (seen.mode, seen.owner, seen.mtime)
            );
        }
        let files = found.values().filter(|seen| seen.mode & 0o170_000 != 0o040_000).count();
        let bytes: usize =
            found.values().filter(|seen| seen.mode & 0o170_000 == 0o100_000).map(|seen| seen.content.len()).sum();
        assert_eq!(heard.stdout(), format!("{files} {bytes}\n"));
    }
}

fn look_clone(seen: &BTreeMap<PathBuf, Seen>) -> BTreeMap<PathBuf, Seen> {
    seen.iter().map(|(path, seen)| (path.clone(), Seen { content: seen.content.clone(), ..*seen })).collect()
}

/// Names in an archive, without content.
fn names(archive: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(archive);
    let name =
        |entry: std::io::Result<tar::Entry<'_, _>>| String::from_utf8_lossy(&entry.unwrap().path_bytes()).into_owned();
    let mut names: Vec<_> = archive.entries().unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn names_begin_with_the_last_part() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    std::fs::write(dir.path().join("a/file"), "x").unwrap();
    symlink("a", dir.path().join("link")).unwrap();
    let check = |path: &str, expected: &[&str]| {
        let heard = pack(&dir.path().join(path));
        heard.assert_copied("");
        assert_eq!(names(&heard.stdout), expected, "{path}");
    };
    check("a", &["a/", "a/file"]);
    check("a/", &["a/", "a/file"]);
    check("a/.", &["./", "./file"]);
    check("a/file", &["file"]);
    check("link", &["link"]);
    check("link/", &["link/", "link/file"]);
    check("link/file", &["file"]);
}

#[test]
fn what_is_no_file_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let heard = pack(&dir.path().join("."));
    heard.assert_code(0);
    assert_eq!(names(&heard.stdout), ["./", "./file"]);
    let mut said: Vec<_> = std::str::from_utf8(&heard.stderr).unwrap().lines().collect();
    said.sort();
    assert_eq!(said, ["./fifo: left out: no file, folder or link", "./socket: left out: no file, folder or link"]);
    drop(socket);
    let asked = dir.path().join("fifo");
    let told = format!("{}: left out: no file, folder or link", asked.display());
    assert_eq!(pack(&asked).assert_complained(), told);

    let to = tempfile::tempdir().unwrap();
    let archive =
        Crafted::new().kind(Kind::Other(b'3'), "null").kind(Kind::Other(b'6'), "fifo").file("file", b"x").end();
    let heard = unpack(to.path(), false, &archive);
    heard.assert_copied("null: left out: no file, folder or link\nfifo: left out: no file, folder or link\n");
    assert_eq!(look(to.path()).len(), 2);
}

#[test]
fn what_is_not_there_is_said() {
    let heard = pack(Path::new("/no/such\nfile"));
    assert_eq!(heard.assert_complained(), "/no/such\u{fffd}file: no such file or folder");
    assert_eq!(heard.stdout, b"");
    let archive = Crafted::new().file("file", b"x").end();
    let complaint = |path: &str, rename| unpack(Path::new(path), rename, &archive).assert_complained().to_owned();
    assert_eq!(
        complaint("/no/such/folder", true),
        "/no/such/folder: the folder that it would be in: no such file or folder"
    );
    assert_eq!(complaint("/no-such-folder", false), "/no-such-folder: no such file or folder");
    assert_eq!(complaint("/no-such-folder/", true), "file: is to be where no folder is");
    assert_eq!(complaint("/dev/null/x", true), "/dev/null/x: the folder that it would be in: not a folder");
}

#[test]
fn what_the_kernel_makes_up_has_its_length() {
    let heard = pack(Path::new("/proc/version"));
    heard.assert_copied("");
    let mut archive = tar::Archive::new(&heard.stdout[..]);
    let mut content = String::new();
    archive.entries().unwrap().next().unwrap().unwrap().read_to_string(&mut content).unwrap();
    assert_eq!(content, std::fs::read_to_string("/proc/version").unwrap());
}

#[test]
fn trees_have_a_greatest_depth() {
    let dir = tempfile::tempdir().unwrap();
    let deep = |depth: usize| -> PathBuf { std::iter::repeat_n("d", depth).collect() };
    std::fs::create_dir_all(dir.path().join(deep(254))).unwrap();
    let heard = pack(&dir.path().join("d"));
    heard.assert_copied("");
    let to = tempfile::tempdir().unwrap();
    unpack(to.path(), false, &heard.stdout).assert_copied("");
    assert!(to.path().join(deep(254)).is_dir());
    std::fs::create_dir_all(dir.path().join(deep(300))).unwrap();
    let heard = pack(&dir.path().join("d"));
    assert!(heard.assert_complained().ends_with("/d: folders lie too deep within each other"));
    let archive = Crafted::new().file(deep(300).to_str().unwrap(), b"x").end();
    let to = tempfile::tempdir().unwrap();
    let heard = unpack(to.path(), false, &archive);
    assert!(heard.assert_complained().ends_with("/d: folders lie too deep within each other"));
}

#[test]
fn files_that_change_meanwhile_leave_the_archive_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (shrinks, grows) = (dir.path().join("shrinks"), dir.path().join("grows"));
    const SIZE: usize = 8 << 20;
    for path in [&shrinks, &grows] {
        std::fs::write(path, vec![b'x'; SIZE]).unwrap();
    }
    for (path, size, said) in [
        (&shrinks, 100_u64, "shrinks: became shorter while it was read: filled up with zeroes\n"),
        (&grows, 2 * SIZE as u64, "grows: became longer while it was read: cut off\n"),
    ] {
        let mut guest = Guest::start("");
        let mut heard = Heard::default();
        guest.send(civic_inject::wire::ToGuest::Launch(civic_inject::wire::Launch::new(Job::Pack(&c_path(path)))));
        // It has told the size, and nothing more is taken: it has not read all.
        guest.hear_until(&mut heard, |heard| !heard.stdout.is_empty());
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(size).unwrap();
        let heard = guest.hear_all(heard);
        heard.assert_copied(said);
        let mut archive = tar::Archive::new(&heard.stdout[..]);
        let mut content = Vec::new();
        archive.entries().unwrap().next().unwrap().unwrap().read_to_end(&mut content).unwrap();
        assert_eq!(content.len(), SIZE);
        assert_eq!(heard.stdout.len(), SIZE + 512 + 1024 + 1024, "its headers, and the end");
    }
}

#[test]
fn a_full_disk_is_said_with_the_name_and_leaves_nothing_half_made() {
    let mut archive = Crafted::new().folder("d");
    for n in 0..20 {
        archive = archive.file(&format!("d/file{n}"), &vec![n; 100_000]);
    }
    let setup = "mkdir full; mount -t tmpfs -o size=1m none full";
    let mut guest = Guest::new(&crate::guest::Setting {
        before: setup,
        after: "ls -A full/d > list; cat full/d/* | wc -c > size",
        group: None,
    });
    let full = c_path(&guest.dir.path().join("full"));
    let heard = guest.copy(Job::Unpack { path: &full, rename: false }, &archive.end());
    let said = heard.assert_complained();
    assert!(said.starts_with("d/file") && said.ends_with(": no space left on the device"), "{said}");
    guest.wait_for_end();
    let list = std::fs::read_to_string(guest.dir.path().join("list")).unwrap();
    let size = std::fs::read_to_string(guest.dir.path().join("size")).unwrap();
    assert!(list.lines().count() < 11 && list.lines().all(|name| name.starts_with("file")), "{list}");
    assert_eq!(size.trim().parse::<usize>().unwrap(), 100_000 * list.lines().count());
}

#[test]
fn a_destination_is_one_as_for_cp() {
    let file = Crafted::new().file("file", b"new").end();
    let folder = Crafted::new().folder("folder").file("folder/x", b"new").end();
    let contents = Crafted::new().folder(".").file("./x", b"new").end();
    let check = |archive: &[u8], to: &str, expected: Result<&str, &str>| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("there")).unwrap();
        std::fs::write(dir.path().join("old"), "old").unwrap();
        symlink("there", dir.path().join("link")).unwrap();
        let heard = unpack(&dir.path().join(to), true, archive);
        match expected {
            Ok(path) => {
                heard.assert_copied("");
                let found = std::fs::read_to_string(dir.path().join(path));
                assert_eq!(found.ok().as_deref(), Some("new"), "{to}: {path}: {:?}", look(dir.path()).keys());
            }
            Err(why) => assert_eq!(heard.assert_complained(), why, "{to}"),
        }
    };
    check(&file, "there", Ok("there/file"));
    check(&file, "there/", Ok("there/file"));
    check(&file, "link", Ok("there/file"));
    check(&file, "old", Ok("old"));
    check(&file, "new", Ok("new"));
    check(&file, "new/", Err("file: is to be where no folder is"));
    check(&folder, "there", Ok("there/folder/x"));
    check(&folder, "new", Ok("new/x"));
    check(&folder, "new/", Ok("new/x"));
    check(&folder, "old", Err("folder: leads through a file or a symbolic link"));
    check(&contents, "there", Ok("there/x"));
    check(&contents, "link/", Ok("there/x"));
    check(&contents, "new", Ok("new/x"));
}

#[test]
fn what_is_there_is_replaced_and_its_folders_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("d")).unwrap();
    std::fs::set_permissions(path("d"), PermissionsExt::from_mode(0o711)).unwrap();
    std::fs::write(path("d/file"), "old").unwrap();
    std::fs::write(path("outside"), "untouched").unwrap();
    symlink("../outside", path("d/link")).unwrap();
    std::fs::hard_link(path("outside"), path("d/hard")).unwrap();
    let archive = Crafted::new()
        .folder("d")
        .file("d/file", b"new")
        .file("d/link", b"new")
        .file("d/hard", b"new")
        .entry(Kind::HardLink, "d/second", "d/file", b"")
        .entry(Kind::HardLink, "d/file", "d/file", b"")
        .entry(Kind::SymLink, "d/file2", "file", b"")
        .end();
    let heard = unpack(dir.path(), false, &archive);
    heard.assert_copied("");
    assert_eq!(heard.stdout(), "6 9\n");
    for name in ["d/file", "d/link", "d/hard", "d/second", "d/file2"] {
        assert_eq!(std::fs::read_to_string(path(name)).unwrap(), "new", "{name}");
    }
    assert_eq!(std::fs::read_to_string(path("outside")).unwrap(), "untouched");
    assert!(!path("d/link").is_symlink());
    assert_eq!(path("d/file").metadata().unwrap().nlink(), 2);
    assert_eq!(path("d").metadata().unwrap().mode() & 0o7777, 0o711);
    assert_eq!(path("d").read_dir().unwrap().count(), 5);
    // And a folder is nothing that a file replaces.
    let archive = Crafted::new().file("d", b"new").end();
    assert_eq!(unpack(dir.path(), false, &archive).assert_complained(), "d: a folder");
}

#[test]
fn hostile_archives_write_nothing_elsewhere() {
    const OUT: &str = "leads out of the folder";
    const THROUGH: &str = "leads through a file or a symbolic link";
    let check = |archive: Crafted, why: &str| {
        for rename in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let to = dir.path().join("to");
            std::fs::create_dir(&to).unwrap();
            std::fs::write(dir.path().join("secret"), "secret").unwrap();
            let before = look(dir.path()).remove(Path::new("secret"));
            let heard = unpack(&to, rename, &archive.clone().end());
            let said = heard.assert_complained();
            assert!(said.ends_with(why), "{said}");
            let mut after = look(dir.path());
            assert_eq!(after.remove(Path::new("secret")), before);
            assert!(after.keys().all(|path| path.starts_with("to") || path.as_os_str().is_empty()), "{after:?}");
            assert!(after.values().all(|seen| seen.content != b"harm"), "{after:?}");
        }
    };
    let new = Crafted::new;
    check(new().file("../secret", b"harm"), OUT);
    check(new().file("a/../../secret", b"harm"), OUT);
    check(new().file("..", b"harm"), OUT);
    check(new().file("/tmp/harm", b"harm"), OUT);
    check(new().file("/", b"harm"), OUT);
    check(new().folder("../d"), OUT);
    check(new().entry(Kind::SymLink, "up", "..", b"").file("up/secret", b"harm"), THROUGH);
    check(new().entry(Kind::SymLink, "up", "..", b"").folder("up/d"), THROUGH);
    check(new().entry(Kind::SymLink, "up", "..", b"").folder("up"), THROUGH);
    check(new().entry(Kind::SymLink, "same", ".", b"").file("same/x", b"harm"), THROUGH);
    check(new().entry(Kind::HardLink, "x", "../secret", b""), OUT);
    check(new().entry(Kind::HardLink, "x", "/etc/passwd", b""), OUT);
    check(new().entry(Kind::SymLink, "up", "..", b"").entry(Kind::HardLink, "x", "up/secret", b""), THROUGH);
    check(new().file("", b"harm"), ": a folder");
    check(new().file(".", b"harm"), ".: a folder");
    check(new().file(&"x".repeat(256), b"harm"), "the name is too long");
}

#[test]
fn archives_that_end_or_lie_are_said() {
    let check = |archive: &[u8], why: &str| {
        let to = tempfile::tempdir().unwrap();
        let heard = unpack(to.path(), false, archive);
        assert_eq!(heard.assert_complained(), why);
        let left: Vec<_> = to.path().read_dir().unwrap().map(|file| file.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "first" || name == "second" && archive.len() >= 3584), "{left:?}");
    };
    let whole = Crafted::new().file("first", b"first").file("second", &[1; 2000]).end();
    check(b"", "the archive: ends too early");
    check(&whole[..100], "the archive: ends too early");
    check(&whole[..1024], "the archive: ends too early");
    check(&whole[..1024 + 512 + 1000], "second: ends too early");
    check(&whole[..1024 + 512 + 2000], "second: ends too early");
    check(&whole[..1024 + 512 + 2048], "the archive: ends too early");
    check(b"#!/bin/sh\n".repeat(100).as_slice(), "the archive: is no tar archive, or a damaged one");
    // More than anybody sends.
    let mut huge = Crafted::new();
    huge.head(Kind::File, "huge", "", u64::MAX);
    check(&huge.bytes, "huge: ends too early");
}

/// An archive that is made entry by entry.
#[derive(Clone)]
struct Crafted {
    bytes: Vec<u8>,
}

impl Crafted {
    fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    fn head(&mut self, kind: Kind, name: &str, link: &str, size: u64) {
        let entry = Entry {
            kind,
            name: name.as_bytes(),
            link: link.as_bytes(),
            size,
            mode: if kind == Kind::Folder { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: Time { seconds: 1_000_000_000, nanoseconds: 0 },
        };
        self.bytes.extend(entry.encoded());
    }

    fn entry(mut self, kind: Kind, name: &str, link: &str, content: &[u8]) -> Self {
        self.head(kind, name, link, content.len() as u64);
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn kind(self, kind: Kind, name: &str) -> Self {
        self.entry(kind, name, "", b"")
    }

    fn folder(self, name: &str) -> Self {
        self.kind(Kind::Folder, name)
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(Kind::File, name, "", content)
    }

    fn end(mut self) -> Vec<u8> {
        self.bytes.extend(END);
        self.bytes
    }
}
