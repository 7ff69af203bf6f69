//! Archives of files, as the loader reads them: whatever one is, all of it is read or refused, and what is read can be written again.
//!
//! An input lacks sums: nothing would find one. Blocks get theirs where a header is due.

use civic_inject::wire::archive::{BLOCK, Broken, END, Entry, Kind, MAX_NAME, Reader, Source, Time, padding, parts};

/// Bytes for extended headers: little, so that small inputs reach the end of it.
const ROOM: usize = 2048;

/// An input, with the sums of headers put right.
struct Input<'a> {
    rest: &'a [u8],
    /// Bytes of content until the next header; nothing is put right if nobody knows.
    content: Option<u64>,
}

impl Source for Input<'_> {
    type Error = ();

    fn fill(&mut self, into: &mut [u8]) -> Result<(), ()> {
        let (taken, rest) = self.rest.split_at_checked(into.len()).ok_or(())?;
        into.copy_from_slice(taken);
        self.rest = rest;
        let Some(content) = self.content else { return Ok(()) };
        self.content = Some(content.saturating_sub(into.len() as u64));
        if content == 0 && into.len() == BLOCK && into.iter().any(|byte| *byte != 0) {
            into[148..156].fill(b' ');
            let sum: u32 = into.iter().map(|byte| u32::from(*byte)).sum();
            into[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
            into[154] = 0;
        }
        Ok(())
    }
}

/// Reads one archive.
pub fn run(bytes: &[u8]) {
    let mut input = Input { rest: bytes, content: Some(0) };
    let (mut reader, mut room) = (Reader::new(), vec![0; ROOM]);
    loop {
        match reader.next(&mut input, &mut room) {
            Ok(Some(entry)) => {
                check(&entry);
                let mut left = entry.size.saturating_add(padding(entry.size) as u64);
                input.content = Some(left);
                while left > 0 {
                    let count = left.min(ROOM as u64);
                    if input.fill(&mut room[..count as usize]).is_err() {
                        return;
                    }
                    left -= count;
                }
            }
            Ok(None) | Err(Broken::Source(())) => return,
            Err(Broken::Archive(why)) => return assert!(!why.text().is_empty()),
        }
    }
}

/// What was read is what is read again, if it is written.
fn check(entry: &Entry<'_>) {
    assert!(entry.name.len() <= MAX_NAME && entry.link.len() <= MAX_NAME && entry.mode <= 0o7777);
    if let Some(parts) = parts(entry.name) {
        parts.for_each(|part| assert!(!matches!(part, b"" | b"." | b"..") && !part.contains(&b'/')));
    }
    // Records may have zeroes in them, headers not; and a folder without a name would be the root.
    let names = [entry.name, entry.link];
    if names.concat().contains(&0) || matches!(entry.kind, Kind::Other(_)) || matches!(entry.name, b"" | b"/") {
        return;
    }
    let written = [&entry.encoded()[..], &END].concat();
    let mut again = Input { rest: &written, content: None };
    let mut reader = Reader::new();
    assert_eq!(reader.next(&mut again, &mut [0; 5 * ROOM]), Ok(Some(*entry)));
}

/// An archive of all kinds of files, and GNU's long names.
pub fn seeds() -> Vec<Vec<u8>> {
    let mtime = Time { seconds: -2, nanoseconds: 5 };
    let file =
        Entry { kind: Kind::File, name: b"file", link: b"", size: 5, mode: 0o4755, uid: 3_000_000, gid: 0, mtime };
    let long = [b'n'; 150];
    let mut archive = Vec::new();
    for entry in [
        file,
        Entry { kind: Kind::Folder, name: &long, size: 0, ..file },
        Entry { kind: Kind::SymLink, name: b"a/../b", link: &long, size: 0, ..file },
        Entry { kind: Kind::HardLink, link: b"file", size: 0, ..file },
        Entry { kind: Kind::Other(b'L'), size: 150, mtime: Time::default(), uid: 0, ..file },
    ] {
        archive.extend(entry.encoded());
        archive.extend(&long[..entry.size as usize]);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    archive.extend(Entry { size: 1 << 40, ..file }.encoded());
    let empty = [&archive[..512], &END].concat();
    vec![archive, empty]
}
