//! What to run, and how.
//!
//! The fields are written in the order in which they stand here. What may be absent has a byte before it, 0 or 1; strings and lists
//! have their length before them.

use core::ffi::CStr;
use core::net::Ipv4Addr;
use core::str;

use crate::bytes::Reader;
use crate::{Full, Malformed, Sink, WindowSize};

/// Strings of a list, at most: the loader has a place for so many.
pub const MAX_STRINGS: usize = 4096;

/// Bytes of a virtio block device's serial number, at most.
pub const MAX_SERIAL: usize = 20;

/// A network card's address.
pub type Mac = [u8; 6];

/// What to run, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// What is to be done.
    pub job: Job<'a>,
    /// Its environment, all of it.
    pub env: Strings<'a>,
    /// Its working directory, in its root; `/` if absent.
    pub cwd: Option<&'a CStr>,
    /// A terminal of this size for its input and outputs; pipes if absent.
    pub tty: Option<WindowSize>,
    /// What of the guest is to stand still.
    pub freeze: Freeze,
    /// Whether the guest's processes go on when the program has ended.
    pub thaw_at_end: bool,
    /// Whether what the program leaves behind ends with it and the store is unmounted, before its end is told.
    pub tidy_up: bool,
    /// What it sees as `/`.
    pub root: Root<'a>,
    /// Its user.
    pub uid: u32,
    /// Its group; it has no others.
    pub gid: u32,
    /// Its priority among real-time processes (`SCHED_FIFO`, 1 to 99), if it is one.
    pub realtime: Option<u8>,
    /// Its niceness, -20 to 19, if it is not to be what the kernel chose.
    pub nice: Option<i8>,
    /// A card to set up.
    pub network: Option<Network>,
    /// Cards to take down: those that came with the fork.
    pub down: &'a [Mac],
    /// How long to look for the store and for the card, in milliseconds.
    pub timeout_ms: u32,
}

/// What is to be done: everything but running is the loader's own, and goes by the program's name otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job<'a> {
    /// Run a program, with arguments. One without a slash is looked for in PATH of the environment. There is at least one string.
    Run(Strings<'a>),
    /// Write what is at a path, with all that is in it, to the output: as an [archive](crate::archive) whose names begin with the path's
    /// last part, or with `.` if that is no name.
    Pack(&'a CStr),
    /// Make what an archive has that comes as input, in the folder at the path. Says at the end how many files and bytes it has made, as two
    /// numbers in a line.
    Unpack {
        /// The folder.
        path: &'a CStr,
        /// Whether the path need not be there: then, or if it is a file, it is what the first part of the archive's names stands for.
        rename: bool,
    },
}

/// What of the guest is to stand still while the program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Freeze {
    /// Nothing.
    #[default]
    None = 0,
    /// All processes but the first, by SIGSTOP.
    Stop = 1,
    /// All control groups but the root's, by their freezer; as [`Freeze::Stop`] where that cannot be.
    Cgroup = 2,
}

/// What the program sees as `/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root<'a> {
    /// What the guest's first process sees as that.
    Guest,
    /// A file system on a disk, with the guest's root at `/guest`.
    Store(Store<'a>),
}

/// The file system that a program is started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store<'a> {
    /// Where it is.
    pub disk: Disk<'a>,
    /// Whether to mount it so.
    pub read_only: bool,
}

/// A block device of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk<'a> {
    /// A virtio block device by its serial number, 1 to [`MAX_SERIAL`] bytes.
    Serial(&'a str),
    /// One by its name in `/dev`, for disks without a serial number.
    Name(&'a str),
}

/// A card and its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Which card.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// How many bits of the address are the network's, up to 32.
    pub prefix: u8,
    /// Where all other networks are, if anywhere.
    pub gateway: Option<Ipv4Addr>,
    /// Its greatest packet in bytes, if not what it has.
    pub mtu: Option<u16>,
}

/// A list of strings: one after the other, each with a zero at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strings<'a>(&'a [u8]);

impl<'a> Strings<'a> {
    /// From what [`pack`] made.
    ///
    /// # Errors
    /// When the last has no zero at its end, or there are more than [`MAX_STRINGS`].
    pub fn new(packed: &'a [u8]) -> Result<Self, Malformed> {
        let ended = packed.last().is_none_or(|last| *last == 0);
        let count = packed.iter().filter(|byte| **byte == 0).count();
        if ended && count <= MAX_STRINGS { Ok(Self(packed)) } else { Err(Malformed::Field("list of strings")) }
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &'a CStr> + use<'a> {
        self.0.split_inclusive(|byte| *byte == 0).filter_map(|string| CStr::from_bytes_with_nul(string).ok())
    }

    fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        out.put(&u32::try_from(self.0.len()).map_err(|_| Full)?.to_le_bytes())?;
        out.put(self.0)
    }

    fn read(from: &mut Reader<'a>, field: &'static str) -> Result<Self, Malformed> {
        let len = from.u32(field)? as usize;
        Self::new(from.take(len, field)?).map_err(|_| Malformed::Field(field))
    }
}

/// Strings for [`Strings::new`]; `None` if one of them has a zero in it.
#[cfg(any(feature = "alloc", test))]
pub fn pack<S: AsRef<[u8]>>(strings: impl IntoIterator<Item = S>) -> Option<alloc::vec::Vec<u8>> {
    let mut packed = alloc::vec::Vec::new();
    for string in strings {
        if string.as_ref().contains(&0) {
            return None;
        }
        packed.extend_from_slice(string.as_ref());
        packed.push(0);
    }
    Some(packed)
}

impl<'a> Launch<'a> {
    /// `job` in the guest's root, with nothing else changed.
    pub fn new(job: Job<'a>) -> Self {
        Self {
            job,
            env: Strings::default(),
            cwd: None,
            tty: None,
            freeze: Freeze::None,
            thaw_at_end: false,
            tidy_up: false,
            root: Root::Guest,
            uid: 0,
            gid: 0,
            realtime: None,
            nice: None,
            network: None,
            down: &[],
            timeout_ms: 10_000,
        }
    }

    pub(crate) fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        self.job.put(out)?;
        self.env.put(out)?;
        option(out, self.cwd, |out, cwd| bytes(out, cwd.to_bytes_with_nul()))?;
        option(out, self.tty, |out, size| size.put(out))?;
        out.put(&[self.freeze as u8, u8::from(self.thaw_at_end), u8::from(self.tidy_up)])?;
        self.root.put(out)?;
        out.put(&self.uid.to_le_bytes())?;
        out.put(&self.gid.to_le_bytes())?;
        option(out, self.realtime, |out, priority| out.put(&[priority]))?;
        option(out, self.nice, |out, nice| out.put(&nice.to_le_bytes()))?;
        option(out, self.network, |out, network| network.put(out))?;
        bytes(out, self.down.as_flattened())?;
        out.put(&self.timeout_ms.to_le_bytes())
    }

    pub(crate) fn read(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let this = Self {
            job: Job::read(from)?,
            env: Strings::read(from, "environment")?,
            cwd: from.option("working directory", |from| read_path(from, "working directory"))?,
            tty: from.option("terminal", WindowSize::read)?,
            freeze: match from.u8("way to freeze")? {
                0 => Freeze::None,
                1 => Freeze::Stop,
                2 => Freeze::Cgroup,
                _ => return Err(Malformed::Field("way to freeze")),
            },
            thaw_at_end: from.bool("choice to thaw")?,
            tidy_up: from.bool("choice to tidy up")?,
            root: Root::read(from)?,
            uid: from.u32("user")?,
            gid: from.u32("group")?,
            realtime: from.option("real-time priority", |from| from.u8("real-time priority"))?,
            nice: from.option("niceness", |from| Ok(i8::from_le_bytes(from.array("niceness")?)))?,
            network: from.option("network", Network::read)?,
            down: match read_bytes(from, "list of cards")?.as_chunks() {
                (macs, []) => macs,
                _ => return Err(Malformed::Field("list of cards")),
            },
            timeout_ms: from.u32("timeout")?,
        };
        if this.realtime.is_some_and(|priority| !(1..=99).contains(&priority)) {
            return Err(Malformed::Field("real-time priority"));
        }
        if this.nice.is_some_and(|nice| !(-20..=19).contains(&nice)) {
            return Err(Malformed::Field("niceness"));
        }
        Ok(this)
    }
}

impl<'a> Job<'a> {
    fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        match self {
            Self::Run(argv) => {
                out.put(&[0])?;
                argv.put(out)
            }
            Self::Pack(path) => {
                out.put(&[1])?;
                bytes(out, path.to_bytes_with_nul())
            }
            Self::Unpack { path, rename } => {
                out.put(&[2, u8::from(*rename)])?;
                bytes(out, path.to_bytes_with_nul())
            }
        }
    }

    fn read(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        match from.u8("job")? {
            0 => match Strings::read(from, "list of arguments")? {
                Strings([]) => Err(Malformed::Field("list of arguments")),
                argv => Ok(Self::Run(argv)),
            },
            1 => read_path(from, "path").map(Self::Pack),
            2 => {
                let rename = from.bool("choice to rename")?;
                Ok(Self::Unpack { path: read_path(from, "path")?, rename })
            }
            _ => Err(Malformed::Field("job")),
        }
    }
}

impl<'a> Root<'a> {
    fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        let Self::Store(store) = self else {
            return out.put(&[0]);
        };
        let (kind, name) = match store.disk {
            Disk::Serial(serial) => (1, serial),
            Disk::Name(name) => (2, name),
        };
        out.put(&[kind, u8::from(store.read_only)])?;
        bytes(out, name.as_bytes())
    }

    fn read(from: &mut Reader<'a>) -> Result<Self, Malformed> {
        let kind = from.u8("root")?;
        if kind == 0 {
            return Ok(Self::Guest);
        }
        let read_only = from.bool("root")?;
        let name = str::from_utf8(read_bytes(from, "store")?).map_err(|_| Malformed::Field("store"))?;
        let disk = match kind {
            1 if (1..=MAX_SERIAL).contains(&name.len()) => Disk::Serial(name),
            2 if (1..=64).contains(&name.len()) && !name.contains(['/', '\0']) && !name.starts_with('.') => {
                Disk::Name(name)
            }
            _ => return Err(Malformed::Field("store")),
        };
        Ok(Self::Store(Store { disk, read_only }))
    }
}

impl Network {
    fn put(&self, out: &mut impl Sink) -> Result<(), Full> {
        out.put(&self.mac)?;
        out.put(&self.address.octets())?;
        out.put(&[self.prefix])?;
        option(out, self.gateway, |out, gateway| out.put(&gateway.octets()))?;
        option(out, self.mtu, |out, mtu| out.put(&mtu.to_le_bytes()))
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let this = Self {
            mac: from.array("network card")?,
            address: Ipv4Addr::from_octets(from.array("address")?),
            prefix: from.u8("prefix")?,
            gateway: from.option("gateway", |from| Ok(Ipv4Addr::from_octets(from.array("gateway")?)))?,
            mtu: from.option("MTU", |from| from.u16("MTU"))?,
        };
        if this.prefix <= 32 { Ok(this) } else { Err(Malformed::Field("prefix")) }
    }
}

/// As [`Reader::option`] reads it.
fn option<S: Sink, T>(
    out: &mut S,
    value: Option<T>,
    put: impl FnOnce(&mut S, T) -> Result<(), Full>,
) -> Result<(), Full> {
    out.put(&[u8::from(value.is_some())])?;
    value.map_or(Ok(()), |value| put(out, value))
}

fn bytes(out: &mut impl Sink, bytes: &[u8]) -> Result<(), Full> {
    out.put(&u16::try_from(bytes.len()).map_err(|_| Full)?.to_le_bytes())?;
    out.put(bytes)
}

fn read_bytes<'a>(from: &mut Reader<'a>, field: &'static str) -> Result<&'a [u8], Malformed> {
    let len = from.u16(field)?.into();
    from.take(len, field)
}

fn read_path<'a>(from: &mut Reader<'a>, field: &'static str) -> Result<&'a CStr, Malformed> {
    CStr::from_bytes_with_nul(read_bytes(from, field)?).map_err(|_| Malformed::Field(field))
}
