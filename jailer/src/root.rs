//! What a jail's file system consists of: a small tmpfs with the names that are needed, and the host's files mounted there. A plan: nothing is
//! done here, and what the host has is asked of a function.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::jail::Jail;

/// Where the kernel says how it uses huge pages: the monitor asks.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage";

/// What something on the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Of what kind.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Whose.
    pub user: u32,
    /// Its group.
    pub group: u32,
}

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A block device of this number.
    Block(u64),
    /// A character device of this number.
    Character(u64),
    /// A socket or FIFO: nothing to show.
    Other,
}

/// One thing to do; in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a folder.
    Folder(PathBuf),
    /// Make an empty file, for something to be mounted on.
    File(PathBuf),
    /// Make a device of the jail's user.
    Node {
        /// Where.
        at: PathBuf,
        /// Which; a block device's or a character device's number.
        kind: Kind,
        /// Whether it may be written.
        write: bool,
    },
    /// Mount something of the host's.
    Mount {
        /// What.
        from: PathBuf,
        /// Where.
        at: PathBuf,
        /// Whether it may be written.
        write: bool,
        /// Whether it is to be executed.
        run: bool,
        /// What is this user's and group's on the host is the jail's user's here.
        owner: Option<(u32, u32)>,
    },
    /// Mount the processes' file system.
    Proc(PathBuf),
}

/// Plans the file system of `jail`: with these `libraries` of its program, and `scratch` (in the same order as the jail's) made for it.
/// `look` says what there is on the host. What is not there is left out: who misses it says so better.
pub fn plan(
    jail: &Jail,
    libraries: &[PathBuf],
    scratch: &[PathBuf],
    look: impl Fn(&Path) -> Option<Seen>,
) -> Vec<Step> {
    let mut mounts = Vec::new();
    let mut show = |path: &Path, write: bool, run: bool| {
        let Some(seen) = look(path) else { return };
        match seen.kind {
            Kind::Block(_) | Kind::Character(_) => {
                mounts.push(Step::Node { at: path.to_owned(), kind: seen.kind, write });
            }
            Kind::File | Kind::Folder => {
                let owner = (!allows(&seen, jail.user, write)).then_some((seen.user, seen.group));
                mounts.push(Step::Mount { from: path.to_owned(), at: path.to_owned(), write, run, owner });
            }
            Kind::Other => (),
        }
    };
    for library in libraries {
        show(library, false, true);
    }
    show(&jail.program, false, true);
    show(Path::new(HUGE_PAGES), false, false);
    for shown in &jail.shown {
        show(&shown.path, shown.write, false);
    }
    for device in &jail.devices {
        show(device, true, false);
    }
    if let Some(dir) = &jail.dir {
        show(dir, true, false);
    }
    for (at, from) in jail.scratch.iter().zip(scratch) {
        mounts.push(Step::Mount { from: from.clone(), at: at.clone(), write: true, run: false, owner: None });
    }
    mounts.push(Step::Proc("/proc".into()));
    // What is within something else comes after it; of two in one place, the later one counts.
    mounts.sort_by_key(|step| place(step).components().count());
    let mut kept: Vec<Step> = Vec::new();
    for step in mounts {
        kept.retain(|earlier| place(earlier) != place(&step));
        kept.push(step);
    }
    with_places(kept, &look)
}

fn place(step: &Step) -> &Path {
    match step {
        Step::Folder(path) | Step::File(path) | Step::Proc(path) => path,
        Step::Node { at, .. } | Step::Mount { at, .. } => at,
    }
}

/// Puts before each step what it needs to be there already.
fn with_places(steps: Vec<Step>, look: &impl Fn(&Path) -> Option<Seen>) -> Vec<Step> {
    let mut made: BTreeSet<PathBuf> = BTreeSet::from(["/".into()]);
    let mut mounted: Vec<PathBuf> = Vec::new();
    let mut all = Vec::new();
    for step in steps {
        let at = place(&step).to_owned();
        // Within a folder of the host's, names are there.
        if !mounted.iter().any(|outer| at.starts_with(outer)) {
            let parents: Vec<_> = at.ancestors().skip(1).map(Path::to_owned).collect();
            for parent in parents.into_iter().rev() {
                if made.insert(parent.clone()) {
                    all.push(Step::Folder(parent));
                }
            }
            let folder = match &step {
                Step::Proc(_) => Some(true),
                Step::Mount { from, .. } => Some(look(from).is_none_or(|seen| seen.kind == Kind::Folder)),
                _ => None,
            };
            match folder {
                Some(true) if made.insert(at.clone()) => all.push(Step::Folder(at.clone())),
                Some(false) => all.push(Step::File(at.clone())),
                _ => (),
            }
        }
        if matches!(step, Step::Mount { .. } | Step::Proc(_)) {
            mounted.push(at);
        }
        all.push(step);
    }
    all
}

/// Whether this user, in the group of the same number alone, may read it, and write it if asked, and for a folder search it.
fn allows(seen: &Seen, user: u32, write: bool) -> bool {
    let shift = match (seen.user == user, seen.group == user) {
        (true, _) => 6,
        (_, true) => 3,
        _ => 0,
    };
    let search = u32::from(seen.kind == Kind::Folder);
    let needed = 4 | if write { 2 } else { 0 } | search;
    seen.mode >> shift & needed == needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::Shown;
    use crate::jail::tests::jail;

    fn seen(kind: Kind, mode: u32) -> Option<Seen> {
        Some(Seen { kind, mode, user: 0, group: 0 })
    }

    fn host(path: &Path) -> Option<Seen> {
        match path.to_str()? {
            "/run/civic/web" => Some(Seen { kind: Kind::Folder, mode: 0o700, user: 200_000, group: 200_000 }),
            "/images" | HUGE_PAGES => seen(Kind::Folder, 0o755),
            "/images/root.img" => seen(Kind::File, 0o600),
            "/boot/vmlinuz" | "/usr/bin/civic-vmm" | "/lib64/ld.so" => seen(Kind::File, 0o755),
            "/vol" => seen(Kind::Block(0x803), 0o660),
            "/dev/kvm" => seen(Kind::Character(0xae8), 0o600),
            _ => None,
        }
    }

    fn planned(jail: &Jail) -> Vec<Step> {
        plan(jail, &["/lib64/ld.so".into()], &[], host)
    }

    fn mounted(steps: &[Step], path: &str) -> (usize, bool, Option<(u32, u32)>) {
        let found = steps.iter().enumerate().find_map(|(n, step)| match step {
            Step::Mount { at, write, owner, .. } if at == Path::new(path) => Some((n, *write, *owner)),
            _ => None,
        });
        found.unwrap_or_else(|| panic!("{path} is not mounted: {steps:?}"))
    }

    #[test]
    fn every_place_is_there_before_it_is_needed_and_once() {
        let shown = ["/images/root.img", "/boot/vmlinuz", "/images", "/absent"]
            .map(|path| Shown { path: path.into(), write: true });
        let steps = planned(&Jail { shown: shown.to_vec(), ..jail() });
        let mut there = BTreeSet::from([PathBuf::from("/")]);
        for step in &steps {
            let within = there.iter().any(|outer| outer == Path::new("/images") && place(step).starts_with(outer));
            let parent = place(step).parent().unwrap();
            match step {
                Step::Folder(path) | Step::File(path) => {
                    assert!(there.contains(parent) && there.insert(path.clone()), "{path:?}")
                }
                _ => assert!(within || there.contains(place(step)) || matches!(step, Step::Node { .. }), "{step:?}"),
            }
        }
        assert!(mounted(&steps, "/images").0 < mounted(&steps, "/images/root.img").0);
        assert!(!steps.iter().any(|step| place(step).starts_with("/absent")));
    }

    #[test]
    fn only_what_the_user_could_not_use_changes_hands() {
        let shown = vec![
            Shown { path: "/images/root.img".into(), write: true },
            Shown { path: "/boot/vmlinuz".into(), write: false },
        ];
        let steps = planned(&Jail { shown, ..jail() });
        assert!(mounted(&steps, "/images/root.img").1);
        assert_eq!(mounted(&steps, "/images/root.img").2, Some((0, 0)));
        assert_eq!((mounted(&steps, "/boot/vmlinuz").1, mounted(&steps, "/boot/vmlinuz").2), (false, None));
        assert_eq!((mounted(&steps, "/run/civic/web").1, mounted(&steps, "/run/civic/web").2), (true, None));
        assert!(!mounted(&steps, HUGE_PAGES).1);
    }

    #[test]
    fn devices_become_nodes() {
        let jail = Jail {
            devices: vec!["/dev/kvm".into(), "/dev/userfaultfd".into()],
            shown: vec![Shown { path: "/vol".into(), write: false }],
            ..jail()
        };
        let steps = planned(&jail);
        let node = |at: &str, kind, write| Step::Node { at: at.into(), kind, write };
        assert!(steps.contains(&node("/dev/kvm", Kind::Character(0xae8), true)));
        assert!(steps.contains(&node("/vol", Kind::Block(0x803), false)));
        assert!(!steps.iter().any(|step| place(step) == Path::new("/dev/userfaultfd")));
    }

    #[test]
    fn a_scratch_folder_takes_the_place_of_the_hosts() {
        let jail = Jail { scratch: vec!["/var/tmp".into()], ..jail() };
        let steps = plan(&jail, &[], &["/var/tmp/.civic-jail-1".into()], host);
        let (n, write, owner) = mounted(&steps, "/var/tmp");
        assert_eq!((write, owner), (true, None));
        assert!(matches!(&steps[n], Step::Mount { from, .. } if from == Path::new("/var/tmp/.civic-jail-1")));
        assert!(steps.contains(&Step::Folder("/var/tmp".into())));
    }

    #[test]
    fn permissions_are_read_as_the_kernel_does() {
        let check = |kind, mode, user, write| allows(&Seen { kind, mode, user, group: 0 }, 200_000, write);
        assert!(check(Kind::File, 0o644, 0, false) && !check(Kind::File, 0o644, 0, true));
        assert!(check(Kind::File, 0o600, 200_000, true) && !check(Kind::File, 0o066, 200_000, true));
        assert!(!check(Kind::Folder, 0o644, 0, false) && check(Kind::Folder, 0o755, 0, false));
    }
}
