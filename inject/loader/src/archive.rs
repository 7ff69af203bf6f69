//! Archives of files, as a stream: ustar, and extended headers for what it has no place for.
//!
//! ```text
//!   [header x, records]  header  content, zeroes to the block's end   …   two blocks of zeroes
//! ```
//!
//! Written as POSIX.1-2017 has it (pax: "ustar Interchange Format", "pax Header Block", "pax Extended Header"). Read as that, and as GNU tar
//! writes it if it is told nothing: long names as the content of entries `L` and `K` before the file's own, large numbers in base 256.
//! Global extended headers are passed over; what is stored with holes (GNU's sparse files) is refused.
//!
//! Nobody knows who made an archive: every function here is total. Whether a name leads where it should is the caller's to ask: [`parts`].

#[cfg(test)]
mod tests;

/// What all of an archive is made of.
pub const BLOCK: usize = 512;

/// Bytes of a name, or of what a link leads to, at most: a path of Linux's without the zero at its end.
pub const MAX_NAME: usize = 4095;

/// Bytes that [`Entry::encode`] writes at most.
pub const MAX_HEADERS: usize = 10 << 10;

/// What ends an archive.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// The greatest numbers of a header's fields.
const MAX_ID: u32 = 0o777_7777;
const MAX_LONG: u64 = 0o777_7777_7777;
/// Bytes of the name in a header.
const NAME: usize = 100;

/// A file's kind, as far as archives of files are about such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One with content.
    File,
    /// Another name of one that came before.
    HardLink,
    /// One that leads to another name.
    SymLink,
    /// A folder.
    Folder,
    /// A device, a FIFO or what nobody knows; its type in the archive.
    Other(u8),
}

/// A moment, since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// And less than one.
    pub nanoseconds: u32,
}

/// What an archive says of a file, before its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its kind.
    pub kind: Kind,
    /// Its name, without slashes at its end.
    pub name: &'a [u8],
    /// Where it leads, if it is a link.
    pub link: &'a [u8],
    /// Bytes of content that follow, and then zeroes up to a whole block.
    pub size: u64,
    /// Its permissions, with the bits for set-user-ID, set-group-ID and sticky.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When its content was changed last.
    pub mtime: Time,
}

/// The zeroes that follow so much content.
pub fn padding(size: u64) -> usize {
    (size.wrapping_neg() % BLOCK as u64) as usize
}

/// What a name leads through, the file itself last: nothing for the folder that it begins in.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    first: Option<&'a [u8]>,
    rest: &'a [u8],
}

/// The parts of a name; `None` if it leads out of where it begins.
pub fn parts(name: &[u8]) -> Option<Parts<'_>> {
    let up = name.split(|byte| *byte == b'/').any(|part| part == b"..");
    (!up && !name.starts_with(b"/") && !name.contains(&0)).then_some(Parts { first: None, rest: name })
}

impl<'a> Parts<'a> {
    /// With `first` in the place of the first one. That is the folder itself for names that begin with a dot alone.
    pub fn renamed(mut self, first: &'a [u8]) -> Self {
        if self.rest != b"." && !self.rest.starts_with(b"./") {
            self.next();
        }
        Self { first: Some(first), ..self }
    }
}

impl<'a> Iterator for Parts<'a> {
    type Item = &'a [u8];

    #[inline(never)]
    fn next(&mut self) -> Option<&'a [u8]> {
        let mut part = self.first.take();
        while part.is_none_or(|part| matches!(part, b"" | b".")) {
            if self.rest.is_empty() {
                return None;
            }
            let end = self.rest.iter().position(|byte| *byte == b'/').unwrap_or(self.rest.len());
            part = Some(&self.rest[..end]);
            self.rest = self.rest.get(end + 1..).unwrap_or_default();
        }
        part
    }
}

/// What the names of an archive of what is at `path` begin with: its last part, or `.` if that is no name.
pub fn last_part(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    match path[..end].rsplit(|byte| *byte == b'/').next() {
        // Nothing may lead up.
        None | Some(b"" | b"..") => b".",
        Some(part) => part,
    }
}

impl Entry<'_> {
    /// Writes its headers to the beginning of `out`; gives their length. `None` if they have no room, as they have in [`MAX_HEADERS`] if its
    /// name and link are no longer than [`MAX_NAME`].
    pub fn encode(&self, out: &mut [u8]) -> Option<usize> {
        let mut records = Records { bytes: out.get_mut(BLOCK..)?, len: 0 };
        self.records(&mut records)?;
        let len = records.len;
        let mut at = 0;
        if len > 0 {
            records.bytes.get_mut(len..)?.get_mut(..padding(len as u64))?.fill(0);
            at = BLOCK + len + padding(len as u64);
            let extended = Entry { name: b"extended", size: len as u64, ..EXTENDED };
            extended.fill(out.first_chunk_mut()?, b'x');
        }
        self.fill(
            out.get_mut(at..)?.first_chunk_mut()?,
            match self.kind {
                Kind::File => b'0',
                Kind::HardLink => b'1',
                Kind::SymLink => b'2',
                Kind::Folder => b'5',
                Kind::Other(flag) => flag,
            },
        );
        Some(at + BLOCK)
    }

    /// The same on its own; empty if its name or link is too long.
    #[cfg(any(feature = "alloc", test))]
    pub fn encoded(&self) -> alloc::vec::Vec<u8> {
        let mut bytes = alloc::vec![0; MAX_HEADERS];
        let len = self.encode(&mut bytes);
        bytes.truncate(len.unwrap_or_default());
        bytes
    }

    /// A slash, if it is a folder.
    fn slash(&self) -> &'static [u8] {
        if self.kind == Kind::Folder { b"/" } else { b"" }
    }

    /// What has no place in its header.
    fn records(&self, out: &mut Records<'_>) -> Option<()> {
        if self.name.len() + self.slash().len() > NAME {
            out.add(b"path", [self.name, self.slash()])?;
        }
        if self.link.len() > NAME {
            out.add(b"linkpath", [self.link, b""])?;
        }
        let numbers: [(&[u8], u64, u64); 3] = [
            (b"size", self.size, MAX_LONG),
            (b"uid", self.uid.into(), MAX_ID.into()),
            (b"gid", self.gid.into(), MAX_ID.into()),
        ];
        for (key, number, most) in numbers {
            if number > most {
                out.add(key, [Decimal::new(number).text(), b""])?;
            }
        }
        if self.mtime.nanoseconds != 0 || !(0..=MAX_LONG as i64).contains(&self.mtime.seconds) {
            self.mtime.record(out)?;
        }
        Some(())
    }

    fn fill(&self, block: &mut [u8; BLOCK], flag: u8) {
        block.fill(0);
        let mut name = self.name.iter().chain(self.slash());
        block[..NAME].iter_mut().zip(&mut name).for_each(|(to, from)| *to = *from);
        block[157..257].iter_mut().zip(self.link).for_each(|(to, from)| *to = *from);
        let fields = [
            (100, 8, u64::from(self.mode & 0o7777)),
            (108, 8, self.uid.into()),
            (116, 8, self.gid.into()),
            (124, 12, self.size),
            (136, 12, self.mtime.seconds.max(0).cast_unsigned()),
        ];
        for (at, len, number) in fields {
            octal(&mut block[at..at + len], number);
        }
        block[156] = flag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum = checksum(block);
        octal(&mut block[148..155], sum);
        block[155] = b' ';
    }
}

/// All else of an extended header.
const EXTENDED: Entry<'static> = Entry {
    kind: Kind::Other(b'x'),
    name: b"",
    link: b"",
    size: 0,
    mode: 0o644,
    uid: 0,
    gid: 0,
    mtime: Time { seconds: 0, nanoseconds: 0 },
};

impl Time {
    #[inline(never)]
    fn record(self, out: &mut Records<'_>) -> Option<()> {
        // What is written has its sign before it, and no other.
        let (sign, nanoseconds, carried): (&[u8], _, _) = match (self.seconds < 0, self.nanoseconds) {
            (false, nanoseconds) => (b"", nanoseconds, 0),
            (true, 0) => (b"-", 0, 0),
            (true, nanoseconds) => (b"-", 1_000_000_000_u32.saturating_sub(nanoseconds), 1),
        };
        let seconds = Decimal::new(self.seconds.unsigned_abs() - carried);
        let mut value = [0; 32];
        let mut len = 0;
        // A nine is cut away that keeps the zeroes at the beginning.
        let fraction = Decimal::new(u64::from(nanoseconds % 1_000_000_000) + 9_000_000_000);
        let parts = [sign, seconds.text(), b".", &fraction.text()[1..]];
        for byte in parts[..if nanoseconds == 0 { 2 } else { 4 }].iter().copied().flatten() {
            value[len] = *byte;
            len += 1;
        }
        out.add(b"mtime", [&value[..len], b""])
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |text| (true, text));
        let point = text.iter().position(|byte| *byte == b'.').unwrap_or(text.len());
        let seconds = decimal(&text[..point])?;
        let fraction = text.get(point + 1..).unwrap_or_default();
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let digits = fraction.iter().map(|digit| u32::from(digit - b'0')).chain(core::iter::repeat(0));
        let nanoseconds = digits.take(9).fold(0, |sum, digit| sum * 10 + digit);
        let before = 0_i64.checked_sub_unsigned(seconds);
        Some(match (negative, nanoseconds) {
            (false, nanoseconds) => Self { seconds: i64::try_from(seconds).ok()?, nanoseconds },
            (true, 0) => Self { seconds: before?, nanoseconds },
            (true, _) => Self { seconds: before?.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds },
        })
    }
}

/// Records that are being written.
struct Records<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl Records<'_> {
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        self.bytes.get_mut(self.len..)?.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.len += bytes.len();
        Some(())
    }

    /// Writes `LENGTH KEY=VALUE` and a line feed; the length is the whole record's, its own digits too.
    fn add(&mut self, key: &[u8], value: [&[u8]; 2]) -> Option<()> {
        let rest = key.len() + value[0].len() + value[1].len() + 3;
        let mut len = Decimal::new(rest as u64);
        // The length's own digits may give it one more.
        for _ in 0..2 {
            len = Decimal::new((rest + len.text().len()) as u64);
        }
        [len.text(), b" ", key, b"=", value[0], value[1], b"\n"].into_iter().try_for_each(|part| self.put(part))
    }
}

/// The records of an extended header: keys and values. `None` in place of one that is none; it is the last.
fn records(mut bytes: &[u8]) -> impl Iterator<Item = Option<(&[u8], &[u8])>> {
    core::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let found = first_record(bytes);
        bytes = found.map_or(&[][..], |(_, rest)| rest);
        Some(found.map(|(record, _)| record))
    })
}

type Record<'a> = (&'a [u8], &'a [u8]);

fn first_record(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some(((&record[..equals], &record[equals + 1..]), rest))
}

#[inline(never)]
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |sum, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit <= 9)?;
        sum.checked_mul(10)?.checked_add(digit.into())
    })
}

/// A number's digits.
pub struct Decimal {
    digits: [u8; 20],
    start: usize,
}

impl Decimal {
    /// Of `number`.
    #[inline(never)]
    pub fn new(mut number: u64) -> Self {
        let mut this = Self { digits: [b'0'; 20], start: 19 };
        for (at, digit) in this.digits.iter_mut().enumerate().rev() {
            *digit += (number % 10) as u8;
            this.start = at;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        this
    }

    /// Them.
    pub fn text(&self) -> &[u8] {
        &self.digits[self.start..]
    }
}

/// Fills a field but for its last byte, a zero. What has no place in it is in a record, and in its place are zeroes.
fn octal(field: &mut [u8], number: u64) {
    let digits = field.len() - 1;
    let mut rest = if number >> (3 * digits) == 0 { number } else { 0 };
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
}

/// A field's number: octal digits, or base 256 if its first bit is set.
fn number(field: &[u8]) -> Option<i64> {
    if let Some((first @ 0x80.., rest)) = field.split_first() {
        // The sign is below that bit.
        let first = i64::from(((first << 1).cast_signed()) >> 1);
        return rest.iter().try_fold(first, |sum, byte| Some(sum.checked_mul(256)? | i64::from(*byte)));
    }
    let text = field.trim_ascii_start();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(text.len());
    text[..end].iter().try_fold(0_i64, |sum, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit <= 7)?;
        sum.checked_mul(8)?.checked_add(digit.into())
    })
}

/// The sum of a header's bytes, those of the sum itself as spaces.
fn checksum(block: &[u8; BLOCK]) -> u64 {
    let byte = |(at, byte): (usize, &u8)| u64::from(if (148..156).contains(&at) { b' ' } else { *byte });
    block.iter().enumerate().map(byte).sum()
}

/// A field's text: up to its first zero.
fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

/// Where archives come from.
pub trait Source {
    /// Why no more comes.
    type Error;

    /// Fills all of `into`.
    ///
    /// # Errors
    /// When there is not so much.
    fn fill(&mut self, into: &mut [u8]) -> Result<(), Self::Error>;
}

/// Why there is no next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken<E> {
    /// The source has no more.
    Source(E),
    /// It is no archive, or none that can be read here.
    Archive(Fault),
}

/// What an archive has that none has that can be read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A header with a wrong sum.
    Checksum,
    /// A header or a record with a number that is none, or too large.
    Number,
    /// An extended header that is not made of records.
    Record,
    /// A name that is too long, or an extended header.
    Length,
    /// A file that is stored with holes.
    Sparse,
}

impl Fault {
    /// It in words, after what has it.
    pub fn text(self) -> &'static str {
        match self {
            Self::Checksum => "is no tar archive, or a damaged one",
            Self::Number => "has a header with an invalid number",
            Self::Record => "has an extended header that is none",
            Self::Length => "has a name or an extended header that is too long",
            Self::Sparse => "has a file that is stored with holes",
        }
    }
}

/// Reads archives' entries. It has the names that they borrow.
pub struct Reader {
    name: Text,
    link: Text,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

/// What was said of a file before its header, besides names.
#[derive(Default)]
struct Extended {
    named: bool,
    linked: bool,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
}

impl Reader {
    /// One for any archive.
    pub const fn new() -> Self {
        Self { name: Text::new(), link: Text::new() }
    }

    /// The next entry; `None` at the archive's end. All of the one before was taken, its padding too. `room` is for extended headers:
    /// a longer one is refused.
    ///
    /// # Errors
    /// When the source has no more, or what it has is no archive. There is no next entry then.
    pub fn next<S: Source>(&mut self, source: &mut S, room: &mut [u8]) -> Result<Option<Entry<'_>>, Broken<S::Error>> {
        let mut extended = Extended::default();
        loop {
            let mut block = [0; BLOCK];
            source.fill(&mut block).map_err(Broken::Source)?;
            if block == [0; BLOCK] {
                return Ok(None);
            }
            let (flag, size) = flag_and_size(&block).map_err(Broken::Archive)?;
            if !matches!(flag, b'g' | b'x' | b'L' | b'K') {
                return self.entry(&block, flag, size, &extended).map(Some).map_err(Broken::Archive);
            }
            let len = usize::try_from(size).ok().filter(|len| *len <= room.len());
            let content = &mut room[..len.ok_or(Broken::Archive(Fault::Length))?];
            source.fill(content).map_err(Broken::Source)?;
            source.fill(&mut [0; BLOCK][..padding(size)]).map_err(Broken::Source)?;
            self.extend(&mut extended, flag, content).map_err(Broken::Archive)?;
        }
    }

    /// Notes what an extended header says.
    #[inline(never)]
    fn extend(&mut self, extended: &mut Extended, flag: u8, content: &[u8]) -> Result<(), Fault> {
        let number = |value| decimal(value).ok_or(Fault::Number);
        match flag {
            b'L' => extended.named = self.name.set(&[text(content)])?,
            b'K' => extended.linked = self.link.set(&[text(content)])?,
            b'x' => {
                for record in records(content) {
                    let (key, value) = record.ok_or(Fault::Record)?;
                    match key {
                        b"path" => extended.named = self.name.set(&[value])?,
                        b"linkpath" => extended.linked = self.link.set(&[value])?,
                        b"size" => extended.size = Some(number(value)?),
                        b"uid" => extended.uid = Some(number(value)?),
                        b"gid" => extended.gid = Some(number(value)?),
                        b"mtime" => extended.mtime = Some(Time::parse(value).ok_or(Fault::Number)?),
                        // The content is not the file's then.
                        _ if key.starts_with(b"GNU.sparse.") => return Err(Fault::Sparse),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn entry(&mut self, block: &[u8; BLOCK], flag: u8, size: u64, extended: &Extended) -> Result<Entry<'_>, Fault> {
        let id = |field: &[u8], extended: Option<u64>| {
            let id = extended.or_else(|| u64::try_from(number(field)?).ok());
            // The greatest stands for nobody.
            id.and_then(|id| u32::try_from(id).ok()).filter(|id| *id < u32::MAX).ok_or(Fault::Number)
        };
        if !extended.named {
            // GNU's own format has other things where ustar's names begin.
            let prefix = if block[257..263] == *b"ustar\0" { text(&block[345..500]) } else { b"" };
            let slash: &[u8] = if prefix.is_empty() { b"" } else { b"/" };
            self.name.set(&[prefix, slash, text(&block[..NAME])])?;
        }
        if !extended.linked {
            self.link.set(&[text(&block[157..257])])?;
        }
        let name = self.name.get();
        let kind = match flag {
            // Before they had a type of their own, folders were told by their slash.
            b'0' | b'7' | 0 if name.ends_with(b"/") => Kind::Folder,
            b'0' | b'7' | 0 => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::SymLink,
            b'5' => Kind::Folder,
            b'S' => return Err(Fault::Sparse),
            flag => Kind::Other(flag),
        };
        let seconds = number(&block[136..148]);
        let mtime = extended.mtime.or_else(|| Some(Time { seconds: seconds?, nanoseconds: 0 }));
        let end = name.iter().rposition(|byte| *byte != b'/').map_or(name.len().min(1), |last| last + 1);
        if end.max(self.link.len) > MAX_NAME {
            return Err(Fault::Length);
        }
        Ok(Entry {
            kind,
            name: &name[..end],
            link: self.link.get(),
            size: match kind {
                Kind::File | Kind::Other(_) => extended.size.unwrap_or(size),
                // They have no content, though some say here how much a link's file has, or a folder may have.
                Kind::HardLink | Kind::SymLink | Kind::Folder => 0,
            },
            mode: number(&block[100..108]).ok_or(Fault::Number)? as u32 & 0o7777,
            uid: id(&block[108..116], extended.uid)?,
            gid: id(&block[116..124], extended.gid)?,
            mtime: mtime.ok_or(Fault::Number)?,
        })
    }
}

/// What a header is about, and how much follows it.
fn flag_and_size(block: &[u8; BLOCK]) -> Result<(u8, u64), Fault> {
    if number(&block[148..156]) != Some(checksum(block).cast_signed()) {
        return Err(Fault::Checksum);
    }
    let size = number(&block[124..136]).and_then(|size| u64::try_from(size).ok());
    Ok((block[156], size.ok_or(Fault::Number)?))
}

/// A name. A folder's slash has a place besides.
struct Text {
    bytes: [u8; MAX_NAME + 1],
    len: usize,
}

impl Text {
    const fn new() -> Self {
        Self { bytes: [0; MAX_NAME + 1], len: 0 }
    }

    /// Becomes `parts`, one after the other; always true.
    #[inline(never)]
    fn set(&mut self, parts: &[&[u8]]) -> Result<bool, Fault> {
        self.len = 0;
        for part in parts {
            self.bytes
                .get_mut(self.len..)
                .and_then(|rest| rest.get_mut(..part.len()))
                .ok_or(Fault::Length)?
                .copy_from_slice(part);
            self.len += part.len();
        }
        Ok(true)
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
