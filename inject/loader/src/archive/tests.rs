//! Round trips of entries, what others write, and bytes that are no archive.

use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;

/// Bytes that come to an end.
struct Bytes<'a>(&'a [u8]);

impl Source for Bytes<'_> {
    type Error = ();

    fn fill(&mut self, into: &mut [u8]) -> Result<(), ()> {
        let (taken, rest) = self.0.split_at_checked(into.len()).ok_or(())?;
        into.copy_from_slice(taken);
        self.0 = rest;
        Ok(())
    }
}

#[track_caller]
fn check(entry: Entry<'_>) {
    let mut bytes = alloc::vec![7; MAX_HEADERS];
    let len = entry.encode(&mut bytes).unwrap();
    assert!(len.is_multiple_of(BLOCK), "{len} bytes");
    (0..len).step_by(BLOCK).for_each(|len| assert_eq!(entry.encode(&mut bytes.clone()[..len]), None));
    bytes.truncate(len);
    bytes.extend(END);
    let (mut reader, mut room, mut source) = (Reader::new(), [0; MAX_HEADERS], Bytes(&bytes));
    assert_eq!(reader.next(&mut source, &mut room), Ok(Some(entry)));
    assert_eq!(reader.next(&mut source, &mut room), Ok(None));
}

/// The only header in an archive that somebody else has made.
fn header(change: impl FnOnce(&mut [u8; BLOCK])) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    FILE.fill(&mut block, b'0');
    change(&mut block);
    block[148..156].fill(b' ');
    let sum = checksum(&block);
    octal(&mut block[148..155], sum);
    block
}

fn read(bytes: &[u8], seen: impl FnOnce(Result<Option<Entry<'_>>, Broken<()>>)) {
    seen(Reader::new().next(&mut Bytes(bytes), &mut [0; 4096]));
}

const FILE: Entry<'static> = Entry { kind: Kind::File, name: b"file", mode: 0o4755, uid: 1000, gid: 100, ..EXTENDED };

fn name() -> impl Strategy<Value = Vec<u8>> {
    let lengths = prop_oneof![1..20usize, 95..105usize, 150..260usize, MAX_NAME - 2..=MAX_NAME];
    lengths
        .prop_flat_map(|len| prop::collection::vec(1..=u8::MAX, len))
        .prop_filter("it has no slash at its end", |name| !name.ends_with(b"/"))
}

proptest! {
    #[test]
    fn entries_survive(
        name in name(),
        link in prop_oneof![Just(Vec::new()), name()],
        kind in prop::sample::select(&[Kind::File, Kind::HardLink, Kind::SymLink, Kind::Folder, Kind::Other(b'6')][..]),
        size in prop_oneof![0..10_000_u64, MAX_LONG - 1..=MAX_LONG + 1, any::<u64>()],
        mode in 0..=0o7777_u32,
        ids in prop::array::uniform2(prop_oneof![0..70_000_u32, MAX_ID - 1..=MAX_ID + 1, 0..u32::MAX]),
        seconds in prop_oneof![-5..5_i64, 1_600_000_000..1_800_000_000_i64, any::<i64>()],
        nanoseconds in prop_oneof![Just(0), 0..1_000_000_000_u32],
    ) {
        let size = if kind == Kind::File { size } else { 0 };
        let [uid, gid] = ids;
        check(Entry { kind, name: &name, link: &link, size, mode, uid, gid, mtime: Time { seconds, nanoseconds } });
    }

    #[test]
    fn no_bytes_are_trusted(bytes in prop::collection::vec(any::<u8>(), 0..4 * BLOCK)) {
        read(&bytes, |result| assert_ne!(result.map(|entry| entry.map(|entry| entry.size)), Ok(Some(1))));
    }

    /// Headers whose sums are right, and what they are about at random.
    #[test]
    fn no_headers_are_trusted(
        written in prop::collection::vec((0..BLOCK, any::<u8>()), 0..40),
        flag in prop::sample::select(&b"0xgLKSV51"[..]),
        content in prop::collection::vec(prop_oneof![Just(b' '), Just(b'='), Just(b'\n'), b'0'..=b'9', any::<u8>()], 0..BLOCK),
    ) {
        let block = header(|block| {
            block[156] = flag;
            octal(&mut block[124..136], content.len() as u64);
            written.into_iter().for_each(|(at, byte)| block[at] = byte);
        });
        let mut bytes = [&block[..], &content].concat();
        bytes.resize(2 * BLOCK, 0);
        bytes.extend(header(|_| ()));
        bytes.extend(END);
        let mut source = Bytes(&bytes);
        let (mut reader, mut room) = (Reader::new(), [0; 600]);
        while let Ok(Some(entry)) = reader.next(&mut source, &mut room) {
            assert!(entry.name.len() <= MAX_NAME && entry.link.len() <= MAX_NAME && entry.mtime.nanoseconds < 1_000_000_000);
        }
    }

    #[test]
    fn parts_are_parts(name in prop::collection::vec(prop::sample::select(&b"/.a\0"[..]), 0..12)) {
        if let Some(parts) = parts(&name) {
            for part in parts {
                assert!(!part.is_empty() && part != b"." && part != b".." && !part.contains(&b'/') && !part.contains(&0));
            }
        }
    }

    #[test]
    fn records_are_cut_right(bytes in prop::collection::vec(prop_oneof![Just(b' '), Just(b'='), Just(b'\n'), b'0'..=b'9'], 0..60)) {
        let count = records(&bytes).count();
        assert!(count <= bytes.len());
    }
}

#[test]
fn numbers_are_read_as_others_write_them() {
    let check = |field: &[u8], expected| assert_eq!(number(field), expected, "{field:?}");
    check(b"0000644\0", Some(0o644));
    check(b"   644 \0", Some(0o644));
    check(b"\0\0\0\0\0\0\0\0", Some(0));
    check(b"77777777777\0", Some(MAX_LONG as i64));
    check(b"777777777777", Some(0o7777_7777_7777));
    check(b"0000698\0", None);
    check(b"-000001\0", None);
    check(b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(1 << 33));
    check(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX));
    check(b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None);
    check(b"\x80\x01\0\0\0\0\0\0\0\0\0\0", None);
    check(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2));
    check(b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff", None);
    check(b"\x80\0\0\0\0\x20\0\0", Some(1 << 21));
}

#[test]
fn lengths_count_themselves() {
    for value in 0..2000 {
        let mut records = Records { bytes: &mut [0; 3000], len: 0 };
        records.add(b"path", [&alloc::vec![b'x'; value], b""]).unwrap();
        let (record, rest) = first_record(&records.bytes[..records.len]).unwrap();
        assert_eq!((record.0, record.1.len(), rest), (&b"path"[..], value, &b""[..]));
    }
}

#[test]
fn times_are_read_as_others_write_them() {
    let check = |text: &[u8], expected: Option<(i64, u32)>| {
        assert_eq!(Time::parse(text), expected.map(|(seconds, nanoseconds)| Time { seconds, nanoseconds }), "{text:?}");
    };
    check(b"1", Some((1, 0)));
    check(b"1.5", Some((1, 500_000_000)));
    check(b"1.0000000019", Some((1, 1)));
    check(b"-1.5", Some((-2, 500_000_000)));
    check(b"-0.000000001", Some((-1, 999_999_999)));
    check(b"-3", Some((-3, 0)));
    check(b"1.", Some((1, 0)));
    for wrong in [&b""[..], b".5", b"-", b"1.x", b"1e3", b"9223372036854775808", b"+1", b"--1"] {
        check(wrong, None);
    }
}

#[test]
fn folders_have_a_slash_and_lose_it() {
    let folder = |name: &[u8], expected: &[u8], kind| {
        let block = header(|block| {
            block[..NAME].fill(0);
            block[..name.len()].copy_from_slice(name);
        });
        read(&block, |read| {
            let entry = read.unwrap().unwrap();
            assert_eq!((entry.name, entry.kind), (expected, kind));
        });
    };
    folder(b"old/", b"old", Kind::Folder);
    folder(b"old//", b"old", Kind::Folder);
    folder(b"./", b".", Kind::Folder);
    folder(b"//", b"/", Kind::Folder);
    folder(b"new", b"new", Kind::File);
    folder(b"", b"", Kind::File);
}

#[test]
fn what_cannot_be_is_said() {
    let check = |bytes: &[u8], expected| read(bytes, |read| assert_eq!(read, Err(expected)));
    check(b"", Broken::Source(()));
    check(&[b'x'; BLOCK], Broken::Archive(Fault::Checksum));
    check(&header(|block| block[124] = b'9'), Broken::Archive(Fault::Number));
    check(&header(|block| block[124..136].fill(0xff)), Broken::Archive(Fault::Number));
    check(&header(|block| block[108..116].fill(0xff)), Broken::Archive(Fault::Number));
    check(&header(|block| block[156] = b'S'), Broken::Archive(Fault::Sparse));
    let long = header(|block| {
        block[156] = b'x';
        octal(&mut block[124..136], 5000);
    });
    check(&long, Broken::Archive(Fault::Length));
    let extended = |content: &[u8], why| {
        let block = header(|block| {
            block[156] = b'x';
            octal(&mut block[124..136], content.len() as u64);
        });
        let mut bytes = [&block[..], content].concat();
        bytes.resize(2 * BLOCK, 0);
        check(&bytes, Broken::Archive(why));
    };
    extended(b"9 path=a\n x", Fault::Record);
    extended(b"99 path=a\n", Fault::Record);
    extended(b"11 size=-1\n", Fault::Number);
    extended(b"11 mtime=x\n", Fault::Number);
    extended(b"22 GNU.sparse.major=1\n", Fault::Sparse);
}

#[test]
fn names_that_lead_out_are_none() {
    let all = |name: &'static [u8]| parts(name).map(Vec::from_iter);
    assert_eq!(all(b"./a//b/."), Some(alloc::vec![&b"a"[..], b"b"]));
    assert_eq!(all(b"."), Some(Vec::new()));
    for wrong in [&b"/"[..], b"/a", b"..", b"a/..", b"../a", b"a/../b", b"a\0"] {
        assert_eq!(all(wrong), None);
    }
}

#[test]
fn what_names_begin_with() {
    let check = |path: &str, expected: &str| assert_eq!(last_part(path.as_bytes()), expected.as_bytes(), "{path}");
    for (path, expected) in [("/etc", "etc"), ("/etc/", "etc"), ("a", "a"), ("/a/b//", "b"), ("/.a", ".a")] {
        check(path, expected);
    }
    for path in ["/", "", "//", ".", "/a/.", "/a/./", "..", "/a/.."] {
        check(path, ".");
    }
}
