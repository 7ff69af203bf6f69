//! The files of a store's image, by debugfs, without mounting it.
//!
//! What is in an image may have been written by a guest. Files are asked for by the numbers of their inodes, so no name gets into a command; each inode
//! is looked at once; and how much of it is read has a bound.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;

use super::cannot_start;

/// An inode's number.
pub type Inode = u32;

const ROOT: Inode = 2;
/// Larger files are no programs.
const LARGEST: u64 = 256 << 20;
/// What is copied out at a time.
const BATCH: u64 = 256 << 20;
/// Links that are followed from one path, as Linux does.
const MOST_LINKS: u32 = 40;
/// Targets of links that are shorter are in the inode, and debugfs tells them.
const LONG_LINK: u64 = 60;
const TYPE: u32 = 0o170_000;
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Node {
    mode: u32,
    size: u64,
}

impl Node {
    fn is(self, what: u32) -> bool {
        self.mode & TYPE == what
    }
}

/// All names in an image.
#[derive(Default)]
pub struct Tree {
    image: PathBuf,
    nodes: HashMap<Inode, Node>,
    folders: HashMap<Inode, BTreeMap<String, Inode>>,
    links: HashMap<Inode, String>,
}

impl Tree {
    /// Reads them.
    pub fn read(image: &Path) -> Result<Self> {
        let mut tree = Self { image: image.to_owned(), ..Self::default() };
        let mut level = vec![ROOT];
        while !level.is_empty() {
            let mut next = Vec::new();
            for (folder, line) in answers(&tree.ask(level.iter().map(|inode| format!("ls -p <{inode}>")))?, "ls -p") {
                let Some((inode, node, name)) = entry(line) else { continue };
                if name == "." || name == ".." {
                    continue;
                }
                let new = tree.nodes.insert(inode, node).is_none();
                if node.is(FOLDER) && new && inode != ROOT {
                    next.push(inode);
                }
                tree.folders.entry(folder).or_default().insert(name.to_owned(), inode);
            }
            level = next;
        }
        tree.read_links()?;
        Ok(tree)
    }

    fn read_links(&mut self) -> Result<()> {
        let links = |long: bool| {
            let links = self.nodes.iter().filter(move |(_, node)| node.is(LINK) && (node.size >= LONG_LINK) == long);
            links.map(|(inode, _)| *inode).collect::<Vec<_>>()
        };
        let (short, long) = (links(false), links(true));
        let told = self.ask(short.iter().map(|inode| format!("stat <{inode}>")))?;
        let targets = answers(&told, "stat").filter_map(|(inode, line)| {
            let target = line.strip_prefix("Fast link dest: \"")?.strip_suffix('"')?;
            Some((inode, target.to_owned()))
        });
        self.links = targets.collect();
        let mut others = HashMap::new();
        self.contents(&long, |inode, bytes| drop(others.insert(inode, String::from_utf8_lossy(&bytes).into_owned())))?;
        self.links.extend(others);
        Ok(())
    }

    /// The file or folder at an absolute path; links are followed inside the image.
    pub fn find(&self, path: &str) -> Option<Inode> {
        let mut left: Vec<&str> = path.split('/').rev().collect();
        let (mut at, mut followed) = (vec![ROOT], 0);
        while let Some(name) = left.pop() {
            let here = *at.last()?;
            match name {
                "" | "." => continue,
                ".." if at.len() > 1 => drop(at.pop()),
                ".." => {}
                name => {
                    let inode = *self.folders.get(&here)?.get(name)?;
                    match self.links.get(&inode) {
                        None => at.push(inode),
                        Some(_) if followed == MOST_LINKS => return None,
                        Some(target) => {
                            followed += 1;
                            if target.starts_with('/') {
                                at.truncate(1);
                            }
                            left.extend(target.split('/').rev());
                        }
                    }
                }
            }
        }
        at.last().copied()
    }

    /// The regular file at an absolute path.
    pub fn file(&self, path: &str) -> Option<Inode> {
        self.find(path).filter(|inode| self.nodes.get(inode).is_some_and(|node| node.is(FILE)))
    }

    /// The same, if it can be executed.
    pub fn executable(&self, path: &str) -> Option<Inode> {
        self.file(path).filter(|inode| self.nodes.get(inode).is_some_and(|node| node.mode & 0o111 != 0))
    }

    /// The paths of files that can be executed, but for what is in these folders.
    pub fn executables(&self, but: &[&str]) -> Vec<(String, Inode)> {
        let (mut found, mut seen) = (Vec::new(), HashSet::from([ROOT]));
        let mut folders = vec![(String::new(), ROOT)];
        while let Some((path, folder)) = folders.pop() {
            for (name, inode) in self.folders.get(&folder).into_iter().flatten() {
                let path = format!("{path}/{name}");
                let Some(node) = self.nodes.get(inode) else { continue };
                if node.is(FOLDER) && !but.contains(&path.as_str()) && seen.insert(*inode) {
                    folders.push((path, *inode));
                } else if node.is(FILE) && node.mode & 0o111 != 0 {
                    found.push((path, *inode));
                }
            }
        }
        found.sort();
        found
    }

    /// The names in the folder at a path.
    pub fn names(&self, path: &str) -> impl Iterator<Item = &str> {
        let folder = self.find(path).and_then(|inode| self.folders.get(&inode));
        folder.into_iter().flat_map(|names| names.keys().map(String::as_str))
    }

    /// Has `take` given what is in these files. What is too large is left out.
    pub fn contents(&self, inodes: &[Inode], mut take: impl FnMut(Inode, Vec<u8>)) -> Result<()> {
        let size = |inode: &Inode| self.nodes.get(inode).map_or(0, |node| node.size);
        let wanted: Vec<_> = inodes.iter().copied().filter(|inode| size(inode) <= LARGEST).collect();
        let mut rest = &wanted[..];
        while !rest.is_empty() {
            let mut total = 0;
            let within = rest.iter().take_while(|inode| {
                total += size(inode);
                total <= BATCH
            });
            let (batch, others) = rest.split_at(within.count().max(1));
            let work = tempfile::tempdir()?;
            self.ask_in(work.path(), batch.iter().map(|inode| format!("dump <{inode}> {inode}")))?;
            for inode in batch {
                // What debugfs cannot read is not there; e2fsck has told of it.
                if let Ok(bytes) = fs::read(work.path().join(inode.to_string())) {
                    take(*inode, bytes);
                }
            }
            rest = others;
        }
        Ok(())
    }

    fn ask(&self, requests: impl Iterator<Item = String>) -> Result<String> {
        self.ask_in(tempfile::tempdir()?.path(), requests)
    }

    /// What debugfs answers to requests, each after a line with the request.
    fn ask_in(&self, work: &Path, requests: impl Iterator<Item = String>) -> Result<String> {
        let mut text = String::new();
        requests.for_each(|request| {
            let _ = writeln!(text, "{request}");
        });
        let file = work.join("requests");
        fs::write(&file, text)?;
        let mut command = Command::new("debugfs");
        command.arg("-f").arg(&file).arg(&self.image).current_dir(work).stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
        let output = command.output().map_err(|error| cannot_start("debugfs", "e2fsprogs", &error))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Lines of answers, and what was asked for.
fn answers<'a>(text: &'a str, request: &str) -> impl Iterator<Item = (Inode, &'a str)> {
    let prefix = format!("debugfs: {request} <");
    let mut about = None;
    text.lines().filter_map(move |line| match line.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix('>')) {
        Some(inode) => {
            about = inode.parse().ok();
            None
        }
        None => Some((about?, line)),
    })
}

/// `/INODE/MODE/UID/GID/NAME/SIZE/`
fn entry(line: &str) -> Option<(Inode, Node, &str)> {
    let mut fields = line.strip_prefix('/')?.split('/');
    let inode = fields.next()?.parse().ok()?;
    let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
    let name = fields.nth(2)?;
    // Folders have none.
    let size = fields.next()?.parse().unwrap_or(0);
    Some((inode, Node { mode, size }, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_debugfs_lists() {
        let told = "debugfs: ls -p <2>\n/2/040755/0/0/.//\n/11/100755/0/0/a b/17/\n\ndebugfs: ls -p <12>\n/13/120777/0/0/l/7/\n";
        let all: Vec<_> = answers(told, "ls -p").filter_map(|(of, line)| Some((of, entry(line)?))).collect();
        let node = |mode, size| Node { mode, size };
        let expected = [
            (2, (2, node(0o040_755, 0), ".")),
            (2, (11, node(0o100_755, 17), "a b")),
            (12, (13, node(0o120_777, 7), "l")),
        ];
        assert_eq!(all, expected);
        assert_eq!(entry("11  (12) .. "), None);
    }

    #[test]
    fn links_lead_no_further_than_the_image() {
        let node = |mode| Node { mode, size: 1 };
        let folder = |names: &[(&str, Inode)]| names.iter().map(|(name, inode)| ((*name).to_owned(), *inode)).collect();
        let tree = Tree {
            nodes: HashMap::from([
                (3, node(0o040_755)),
                (4, node(0o100_644)),
                (5, node(0o120_777)),
                (6, node(0o120_777)),
            ]),
            folders: HashMap::from([
                (ROOT, folder(&[("usr", 3), ("lib", 5)])),
                (3, folder(&[("file", 4), ("up", 6), ("again", 7)])),
            ]),
            links: HashMap::from([
                (5, "usr".to_owned()),
                (6, "../../../lib/./file".to_owned()),
                (7, "/usr/again".to_owned()),
            ]),
            ..Tree::default()
        };
        assert_eq!(tree.file("/lib/file"), Some(4));
        assert_eq!(tree.file("/lib/up"), Some(4));
        assert_eq!(tree.file("/lib"), None);
        assert_eq!(tree.executable("/lib/file"), None);
        assert_eq!((tree.find("/lib/again"), tree.find("/lib/file/more")), (None, None));
    }
}
