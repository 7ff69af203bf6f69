//! Round trips on this host, and archives that a hostile guest would send.

use std::os::unix::fs::{PermissionsExt, symlink};

use civic_loader::archive::{END, Entry as Described, Kind, Time};

use super::*;

fn packed(from: &Path, name: &str, keep_owners: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(from, name.as_bytes(), keep_owners, &mut bytes, &|text| panic!("{text}")).unwrap();
    bytes
}

fn unpacked(archive: &[u8], to: &Path, origin: &str) -> Result<Copied> {
    unpack(archive, &Destination::new(to, origin.as_bytes())?, false, &|_| ())
}

/// An archive that is made entry by entry.
#[derive(Clone, Default)]
struct Crafted(Vec<u8>);

impl Crafted {
    fn entry(mut self, kind: Kind, name: &str, link: &str, content: &[u8]) -> Self {
        self.head(kind, name, link, content.len() as u64);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn head(&mut self, kind: Kind, name: &str, link: &str, size: u64) {
        let mtime = Time { seconds: 1_000_000_000, nanoseconds: 5 };
        let (name, link) = (name.as_bytes(), link.as_bytes());
        let described = Described { kind, name, link, size, mode: 0o4755, uid: 5, gid: 6, mtime };
        self.0.extend(described.encoded());
    }

    fn folder(self, name: &str) -> Self {
        self.entry(Kind::Folder, name, "", b"")
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(Kind::File, name, "", content)
    }

    fn link(self, name: &str, to: &str) -> Self {
        self.entry(Kind::SymLink, name, to, b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend(END);
        self.0
    }
}

#[test]
fn what_is_packed_is_what_is_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    let long = "long ".repeat(40);
    std::fs::create_dir_all(from.join("closed").join(&long)).unwrap();
    let odd = from.join("closed").join(OsStr::from_bytes(b"odd \xff\n"));
    std::fs::write(&odd, "odd").unwrap();
    std::fs::write(from.join("closed").join(&long).join(&long), vec![3; 100_000]).unwrap();
    std::fs::write(from.join("empty"), "").unwrap();
    symlink("t".repeat(200), from.join("link")).unwrap();
    std::fs::set_permissions(&odd, PermissionsExt::from_mode(0o6751)).unwrap();
    std::fs::set_permissions(from.join("closed"), PermissionsExt::from_mode(0o500)).unwrap();

    let to = dir.path().join("to");
    let copied = unpacked(&packed(&from, "from", false), &to, "from").unwrap();
    assert_eq!(copied, Copied { files: 4, bytes: 100_003 });
    assert_eq!(count(&packed(&from, "from", true)[..]).unwrap(), copied);
    let meta = |path: &Path| {
        let meta = path.symlink_metadata().unwrap();
        (meta.mode(), meta.len(), (meta.mtime(), meta.mtime_nsec()))
    };
    for path in ["", "empty", "closed", &format!("closed/{long}"), &format!("closed/{long}/{long}")] {
        assert_eq!(meta(&to.join(path)), meta(&from.join(path)), "{path}");
    }
    assert_eq!(to.join("link").read_link().unwrap(), from.join("link").read_link().unwrap());
    let odd = odd.strip_prefix(&from).unwrap();
    assert_eq!(std::fs::read(to.join(odd)).unwrap(), b"odd");
    assert_eq!(meta(&to.join(odd)).0 & 0o7777, 0o751, "what changes who a program runs as is not kept");
}

#[test]
fn owners_go_along_if_they_are_to() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let owner = file.metadata().unwrap().uid();
    let uid =
        |archive: &[u8]| Archive::new(archive).entries().unwrap().next().unwrap().unwrap().header().uid().unwrap();
    assert_eq!(uid(&packed(&file, "file", false)), 0);
    assert_eq!(uid(&packed(&file, "file", true)), u64::from(owner));
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root gives files away");
        return;
    }
    let archive = Crafted::default().folder("d").file("d/file", b"x").link("d/link", "file").end();
    let to = Destination::new(&dir.path().join("to"), b"d").unwrap();
    unpack(&archive[..], &to, true, &|_| ()).unwrap();
    for name in ["", "file", "link"] {
        let meta = dir.path().join("to").join(name).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (5, 6), "{name}");
        assert!(meta.is_symlink() || meta.mode() & 0o7777 == 0o4755, "{name}");
    }
}

#[test]
fn a_destination_is_one_as_for_cp() {
    let file = Crafted::default().file("file", b"new").end();
    let folder = Crafted::default().folder("folder").file("folder/x", b"new").end();
    let contents = Crafted::default().folder(".").file("./x", b"new").end();
    let check = |archive: &[u8], origin: &str, to: &str, expected: Result<&str, &str>| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("there")).unwrap();
        std::fs::write(dir.path().join("old"), "old").unwrap();
        symlink("there", dir.path().join("link")).unwrap();
        let told = unpacked(archive, &dir.path().join(to), origin);
        match expected {
            Ok(path) => {
                told.unwrap_or_else(|error| panic!("{to}: {error:#}"));
                assert_eq!(std::fs::read_to_string(dir.path().join(path)).unwrap(), "new", "{to}");
            }
            Err(why) => {
                let told = format!("{:#}", told.unwrap_err());
                assert!(told.contains(why), "{to}: {told}");
            }
        }
    };
    check(&file, "file", "there", Ok("there/file"));
    check(&file, "file", "link/", Ok("there/file"));
    check(&file, "file", "old", Ok("old"));
    check(&file, "file", "new", Ok("new"));
    check(&file, "file", "new/", Err("is to be where no folder is"));
    check(&file, "file", "no/such", Err("the folder '"));
    check(&file, "file", "old/x", Err("is to be in what is no folder"));
    check(&folder, "folder", "there", Ok("there/folder/x"));
    check(&folder, "folder", "new/", Ok("new/x"));
    check(&folder, "folder", "old", Err("leads through a file"));
    check(&contents, ".", "there", Ok("there/x"));
    check(&contents, ".", "new", Ok("new/x"));
    check(&file, "other", "there", Err("'file' was not asked for"));
    check(&folder, "fold", "there", Err("was not asked for"));
    check(&file, ".", "there", Err("was not asked for"));
}

#[test]
fn hostile_archives_write_nothing_elsewhere() {
    let check = |archive: Crafted, why: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("to")).unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        std::fs::write(dir.path().join("to/mine"), "mine").unwrap();
        let told = format!("{:#}", unpacked(&archive.end(), &dir.path().join("to"), "d").unwrap_err());
        assert!(told.contains(why), "{told}");
        let mut found: Vec<_> = dir.path().read_dir().unwrap().map(|file| file.unwrap().file_name()).collect();
        found.sort();
        assert_eq!(found, ["secret", "to"]);
        assert_eq!(std::fs::read_to_string(dir.path().join("secret")).unwrap(), "secret");
        assert_eq!(std::fs::read_to_string(dir.path().join("to/mine")).unwrap(), "mine");
        // Nothing but what was asked for, and nothing half made in it.
        let found: Vec<_> = dir.path().join("to").read_dir().unwrap().map(|file| file.unwrap().file_name()).collect();
        assert!(found.iter().all(|name| name == "mine" || name == "d"), "{found:?}");
        for file in dir.path().join("to/d").read_dir().into_iter().flatten() {
            assert!(!file.unwrap().file_name().to_string_lossy().starts_with(".civic"));
        }
    };
    let d = || Crafted::default().folder("d");
    check(d().file("../secret", b"harm"), "was not asked for");
    check(d().file("/etc/harm", b"harm"), "was not asked for");
    check(d().file("mine", b"harm"), "was not asked for");
    check(d().file("d/../mine", b"harm"), "leads out of where it is to be");
    check(d().file("d/../../secret", b"harm"), "leads out of where it is to be");
    check(d().folder("d/.."), "leads out of where it is to be");
    check(d().link("d/up", "../..").file("d/up/secret", b"harm"), "leads through a file or a symbolic link");
    check(d().link("d/up", "../..").folder("d/up"), "leads through a file or a symbolic link");
    check(d().link("d/up", "../..").folder("d/up/x"), "leads through a file or a symbolic link");
    check(Crafted::default().link("d", "..").file("d/secret", b"harm"), "leads through a file or a symbolic link");
    check(d().entry(Kind::HardLink, "d/x", "../secret", b""), "is a second name of a file");
    check(d().entry(Kind::HardLink, "d/x", "d/x", b""), "is a second name of a file");
    check(d().file("d/absent/x", b"harm"), "No such file");
    check(d().file("d", b"harm"), "directory");
    check(d().file("d/x/y", b"").file("d/zero\0", b"harm"), "No such file");
}

#[test]
fn what_is_no_file_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let archive = Crafted::default()
        .folder("d")
        .entry(Kind::Other(b'3'), "d/null", "", b"")
        .entry(Kind::Other(b'6'), "d/fifo", "", b"")
        .file("d/file", b"x")
        .end();
    let told = std::cell::RefCell::new(Vec::new());
    let to = Destination::new(dir.path(), b"d").unwrap();
    let copied = unpack(&archive[..], &to, false, &|text| told.borrow_mut().push(text)).unwrap();
    assert_eq!(copied, Copied { files: 1, bytes: 1 });
    let why = "is left out: it is no file, folder or symbolic link";
    assert_eq!(*told.borrow(), [format!("'d/null' {why}"), format!("'d/fifo' {why}")]);
    assert_eq!(dir.path().join("d").read_dir().unwrap().count(), 1);
}

#[test]
fn archives_that_end_or_lie_are_told() {
    let whole = Crafted::default().folder("d").file("d/first", b"first").file("d/second", &[1; 2000]).end();
    let check = |archive: &[u8], why: &str| {
        let dir = tempfile::tempdir().unwrap();
        let told = format!("{:#}", unpacked(archive, dir.path(), "d").unwrap_err());
        assert!(told.contains(why), "{told}");
        assert!(count(archive).is_err(), "{why}");
        assert!(!dir.path().join("d/second").exists());
        let left = dir.path().join("d").read_dir().into_iter().flatten().count();
        assert!(left <= 1, "nothing half made is left");
    };
    // Each has an extended header, for its time.
    let (one, two) = (1536, 1536 + 2048);
    assert_eq!(whole.len(), two + 1536 + 2048 + 1024);
    check(&[], "ends too early");
    check(&whole[..one], "ends too early");
    check(&whole[..two], "ends too early");
    check(&whole[..two + 1024], "no archive");
    check(&whole[..two + 1536 + 1000], "ends too early");
    check(&[b'x'; 2048], "no archive");
    let mut huge = Crafted::default().folder("d");
    huge.head(Kind::File, "d/huge", "", u64::MAX / 2);
    check(&huge.0, "ends too early");
    // A name of a gigabyte, and no end to it.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 30);
    header.set_cksum();
    let endless = header.as_bytes().chain(io::repeat(b'x'));
    let dir = tempfile::tempdir().unwrap();
    let to = Destination::new(dir.path(), b"d").unwrap();
    let told = format!("{:#}", unpack(endless, &to, false, &|_| ()).unwrap_err());
    assert!(told.contains("a name is too long"), "{told}");
    // Nothing that a guest says fills the disk with zeroes that it need not send.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.as_gnu_mut().unwrap().name[..6].copy_from_slice(b"d/hole");
    let gnu = header.as_gnu_mut().unwrap();
    gnu.set_real_size(1 << 40);
    gnu.sparse[0].set_offset(1 << 40);
    gnu.sparse[0].set_length(0);
    header.set_size(0);
    header.set_cksum();
    let sparse = [header.as_bytes(), &END[..]].concat();
    let told = format!("{:#}", unpacked(&sparse, dir.path(), "d").unwrap_err());
    assert!(told.contains("stored with holes") || told.contains("no archive"), "{told}");
    assert!(!dir.path().join("d").exists());
}

#[test]
fn times_are_read_as_they_are_written() {
    let check = |text: &str, expected| assert_eq!(time(text), expected, "{text}");
    check("1", Some(TimeSpec::new(1, 0)));
    check("1.5", Some(TimeSpec::new(1, 500_000_000)));
    check("1.0000000019", Some(TimeSpec::new(1, 1)));
    check("-1.5", Some(TimeSpec::new(-2, 500_000_000)));
    check("-3", Some(TimeSpec::new(-3, 0)));
    for wrong in ["", "x", "1.x", "--1", "1.ä", "1.-5"] {
        check(wrong, None);
    }
}

#[test]
fn names_are_shown_in_one_line() {
    assert_eq!(shown(b"a\x1b[31m\nb\xff"), "a\u{fffd}[31m\u{fffd}b\u{fffd}");
}
