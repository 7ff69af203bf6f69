//! Whether a store has what its programs need to start: what `#!` lines name, the interpreters of ELF files, and shared libraries, looked for as
//! ld.so(8) does, in the store's `ld.so.conf`.
//!
//! Packages have scripts that want more than the package depends on: where dpkg's lists know of a program, and of nothing by the name of what it lacks,
//! it was left out by choice. Something that the lists do know of was lost.
//!
//! Not looked at are libraries that a program opens by itself, nor programs of other machines.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use anyhow::Result;
use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_STRSZ, DT_STRTAB, EM_X86_64, FileHeader64, PT_LOAD};
use object::read::StringTable;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, elf};
use serde::Serialize;

use super::FOLDERS;
use super::tree::{Inode, Tree};

/// What is in these folders is started by nobody who has the store as his root, such as examples and scripts of packages.
const NO_PROGRAMS: [&str; 4] = ["/etc", "/usr/share", "/usr/src", "/var"];
/// Where ld.so of Debian looks at last.
const LIBRARIES: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib", "/usr/lib", "/lib64", "/usr/lib64"];
const LIB: &str = "lib/x86_64-linux-gnu";
/// Where programs are found by their names.
const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// An interpreter that has its C library in itself, and looks for others in other folders.
const MUSL: &str = "/ld-musl-";

/// Something that is not in the store.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// Its path or, of a library, its name.
    pub what: String,
    /// The programs that need it.
    pub needed_by: Vec<String>,
    /// All of them are of packages which do without.
    pub optional: bool,
}

impl Missing {
    /// For people.
    pub fn told(&self) -> String {
        const SHOWN: usize = 3;
        let some = self.needed_by.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = self.needed_by.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        crate::table::printable(&format!("it has no {}, needed by {some}{more}", self.what))
    }
}

/// What the programs in `tree` need and is not there.
pub fn missing(tree: &Tree) -> Result<Vec<Missing>> {
    let mounted = FOLDERS.map(|name| format!("/{name}"));
    let but: Vec<_> = NO_PROGRAMS.into_iter().chain(mounted.iter().map(String::as_str)).collect();
    let programs = tree.executables(&but);
    let packages = Packages::read(tree)?;
    let mut found = Found { tree, folders: configured(tree)?, read: HashMap::new() };
    found.read(programs.iter().map(|(_, inode)| *inode))?;
    loop {
        let (mut unread, mut missing) = (BTreeSet::new(), BTreeMap::<_, Vec<_>>::new());
        for (path, inode) in &programs {
            for what in found.needs(path, *inode, &mut unread) {
                missing.entry(what).or_default().push((path.clone(), *inode));
            }
        }
        // Each time what was found last has been read, and may need more.
        if unread.is_empty() {
            let told = missing.into_iter().map(|(what, programs)| {
                let optional = programs.iter().all(|(_, inode)| packages.have(*inode)) && !packages.know(&what);
                Missing { what, needed_by: programs.into_iter().map(|(path, _)| path).collect(), optional }
            });
            return Ok(told.collect());
        }
        found.read(unread.into_iter())?;
    }
}

/// What `ld.so.conf` names.
fn configured(tree: &Tree) -> Result<Vec<String>> {
    let files = ["/etc/ld.so.conf".to_owned()].into_iter().chain(within(tree, "/etc/ld.so.conf.d", ".conf"));
    let texts = texts(tree, files)?;
    let lines = texts.iter().flat_map(|text| text.lines());
    let folders = lines.filter_map(|line| line.split('#').next()).map(str::trim).filter(|line| line.starts_with('/'));
    Ok(folders.map(str::to_owned).collect())
}

/// The paths of files in a folder whose names end so.
fn within(tree: &Tree, folder: &str, end: &str) -> impl Iterator<Item = String> {
    tree.names(folder).filter(move |name| name.ends_with(end)).map(move |name| format!("{folder}/{name}"))
}

/// What is in those of these files that are there.
fn texts(tree: &Tree, paths: impl Iterator<Item = String>) -> Result<Vec<String>> {
    let inodes: Vec<_> = paths.filter_map(|path| tree.file(&path)).collect();
    let mut texts = HashMap::new();
    tree.contents(&inodes, |inode, bytes| drop(texts.insert(inode, String::from_utf8_lossy(&bytes).into_owned())))?;
    Ok(inodes.iter().filter_map(|inode| texts.remove(inode)).collect())
}

/// What dpkg has installed.
struct Packages {
    files: HashSet<Inode>,
    /// Paths, and the last names of paths.
    names: HashSet<String>,
}

impl Packages {
    fn read(tree: &Tree) -> Result<Self> {
        let lists = texts(tree, within(tree, "/var/lib/dpkg/info", ".list"))?;
        let paths = || lists.iter().flat_map(|list| list.lines());
        let last = paths().filter_map(|path| path.rsplit('/').next());
        Ok(Self {
            files: paths().filter_map(|path| tree.file(path)).collect(),
            names: paths().chain(last).map(str::to_owned).collect(),
        })
    }

    fn have(&self, file: Inode) -> bool {
        self.files.contains(&file)
    }

    fn know(&self, what: &str) -> bool {
        self.names.contains(what)
    }
}

/// What has been read of a tree.
struct Found<'a> {
    tree: &'a Tree,
    folders: Vec<String>,
    read: HashMap<Inode, Option<Program>>,
}

impl Found<'_> {
    fn read(&mut self, inodes: impl Iterator<Item = Inode>) -> Result<()> {
        let new: Vec<_> = inodes.filter(|inode| !self.read.contains_key(inode)).collect();
        // Those that cannot be read are not asked for again.
        self.read.extend(new.iter().map(|inode| (*inode, None)));
        self.tree.contents(&new, |inode, bytes| drop(self.read.insert(inode, Program::parse(&bytes))))
    }

    /// What the program at `path` needs and is not there, as far as what it needs has been read; what has not goes to `unread`.
    fn needs(&self, path: &str, inode: Inode, unread: &mut BTreeSet<Inode>) -> Vec<String> {
        match self.read.get(&inode) {
            Some(Some(Program::Script { interpreter, by_name })) => {
                let there = match by_name {
                    false => self.tree.executable(interpreter).is_some(),
                    true => PATH.iter().any(|dir| self.tree.executable(&format!("{dir}/{interpreter}")).is_some()),
                };
                if there { Vec::new() } else { vec![interpreter.clone()] }
            }
            // Without an interpreter it is a library, or needs none.
            Some(Some(Program::Elf(Elf { interpreter: Some(interpreter), .. }))) => {
                let mut missing = Vec::new();
                if self.tree.executable(interpreter).is_none() {
                    missing.push(interpreter.clone());
                } else if !interpreter.contains(MUSL) {
                    missing = self.libraries(path, inode, unread);
                }
                missing
            }
            _ => Vec::new(),
        }
    }

    /// The libraries that are missing, looked for in the order in which ld.so does: each name once, whoever needs it first.
    fn libraries(&self, path: &str, inode: Inode, unread: &mut BTreeSet<Inode>) -> Vec<String> {
        let (mut missing, mut known) = (Vec::new(), HashSet::new());
        // Each with the DT_RPATH of those that it was loaded for.
        let mut loaded = VecDeque::from([(path.to_owned(), inode, Vec::new())]);
        while let Some((path, inode, inherited)) = loaded.pop_front() {
            let elf = match self.read.get(&inode) {
                Some(Some(Program::Elf(elf))) => elf,
                Some(_) => continue,
                None => {
                    unread.insert(inode);
                    continue;
                }
            };
            let rpath = expanded(&elf.rpath, &path).chain(inherited).collect::<Vec<_>>();
            let own = match &elf.runpath[..] {
                [] => rpath.clone(),
                runpath => expanded(runpath, &path).collect(),
            };
            for name in &elf.needed {
                if !known.insert(name.clone()) {
                    continue;
                }
                let folders = own.iter().chain(&self.folders).map(String::as_str).chain(LIBRARIES);
                let mut paths = folders.map(|dir| format!("{dir}/{name}"));
                let there = match name.contains('/') {
                    true => Some(name.clone()).filter(|path| self.tree.file(path).is_some()),
                    false => paths.find(|path| self.tree.file(path).is_some()),
                };
                match there.and_then(|path| Some((self.tree.file(&path)?, path))) {
                    Some((inode, path)) => loaded.push_back((path, inode, rpath.clone())),
                    None => missing.push(name.clone()),
                }
            }
        }
        missing
    }
}

/// Folders of a DT_RPATH or DT_RUNPATH of the object at `path`.
fn expanded(folders: &[String], path: &str) -> impl Iterator<Item = String> {
    let origin = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    folders.iter().map(move |folder| {
        let folder = folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin);
        folder.replace("${LIB}", LIB).replace("$LIB", LIB)
    })
}

/// What an executable or a library says that it needs.
#[derive(Debug, PartialEq, Eq)]
enum Program {
    Script {
        interpreter: String,
        /// It is looked for in `PATH`.
        by_name: bool,
    },
    Elf(Elf),
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Elf {
    interpreter: Option<String>,
    needed: Vec<String>,
    rpath: Vec<String>,
    runpath: Vec<String>,
}

impl Program {
    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(&elf::ELFMAG) {
            return Elf::parse(bytes).map(Self::Elf);
        }
        let line = bytes.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
        let line = std::str::from_utf8(line).ok()?;
        let mut words = line.split_whitespace();
        let interpreter = words.next().filter(|path| path.starts_with('/'))?;
        let named = words.find(|word| !word.starts_with('-') && !word.contains('='));
        Some(match named.filter(|_| interpreter.ends_with("/env")) {
            Some(name) => Self::Script { interpreter: name.to_owned(), by_name: !name.contains('/') },
            None => Self::Script { interpreter: interpreter.to_owned(), by_name: false },
        })
    }
}

impl Elf {
    /// Of x86-64.
    fn parse(data: &[u8]) -> Option<Self> {
        let header = FileHeader64::<Endianness>::parse(data).ok()?;
        let endian = header.endian().ok()?;
        if header.e_machine(endian) != EM_X86_64 {
            return None;
        }
        let segments = header.program_headers(endian, data).ok()?;
        let (mut found, mut entries) = (Self::default(), Vec::new());
        for segment in segments {
            if let Some(path) = segment.interpreter(endian, data).ok()? {
                found.interpreter = Some(String::from_utf8_lossy(path).into_owned());
            }
            if let Some(dynamic) = segment.dynamic(endian, data).ok()? {
                entries.extend(dynamic.iter().map(|entry| (entry.tag(endian), entry.d_val(endian))));
            }
        }
        let of = |tag| entries.iter().filter(move |entry| entry.0 == tag).map(|entry| entry.1);
        // Strings are told by where they are in memory.
        let strings = of(DT_STRTAB).next().and_then(|address| {
            let segment = segments.iter().find(|segment| {
                let begin = segment.p_vaddr(endian);
                segment.p_type(endian) == PT_LOAD
                    && address.checked_sub(begin).is_some_and(|offset| offset < segment.p_filesz(endian))
            })?;
            let begin = segment.p_offset(endian).checked_add(address - segment.p_vaddr(endian))?;
            let end = begin.checked_add(of(DT_STRSZ).next()?)?;
            Some(StringTable::new(data, begin, end))
        });
        let text = |offset: u64| {
            let bytes = strings?.get(u32::try_from(offset).ok()?).ok()?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        let folders = |tag| {
            let lists = of(tag).filter_map(text).collect::<Vec<_>>();
            lists.iter().flat_map(|list| list.split(':')).filter(|f| !f.is_empty()).map(str::to_owned).collect()
        };
        found.needed = of(DT_NEEDED).filter_map(text).collect();
        (found.rpath, found.runpath) = (folders(DT_RPATH), folders(DT_RUNPATH));
        Some(found)
    }
}

#[cfg(test)]
mod tests;
