//! What a jail is. Nothing is done here.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{Refusal, refused};

/// Processes and threads that a jailed program may have, if nothing else is said: far more than a VM with every device needs.
pub const THREADS: u64 = 4096;

/// One program's jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jail {
    /// Its user, and group of the same number.
    pub user: u32,
    /// The VM's own directory, which becomes the user's. None for a page server.
    pub dir: Option<PathBuf>,
    /// Files and folders of the host that are there under their own names.
    pub shown: Vec<Shown>,
    /// Folders that are empty inside, the user's, and gone with the jail: what is put there takes space where the host has that folder.
    pub scratch: Vec<PathBuf>,
    /// Devices.
    pub devices: Vec<PathBuf>,
    /// Its network.
    pub net: Net,
    /// What it may use of the host.
    pub limits: Limits,
    /// What is started, with its arguments.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<std::ffi::OsString>,
}

/// Something of the host's that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Where, inside as outside.
    pub path: PathBuf,
    /// Whether it may be written.
    pub write: bool,
}

/// A jail's network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Net {
    /// A new one, in which there is nothing.
    #[default]
    None,
    /// The host's, where its taps are.
    Host,
    /// The one that this file stands for, such as those of `ip netns`.
    At(PathBuf),
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "host" => Ok(Self::Host),
            path if path.starts_with('/') => Ok(Self::At(path.into())),
            other => Err(format!("'{other}' is none of: none, host, the absolute path of a network namespace")),
        }
    }
}

/// What a jail may use of the host; no limit where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, the guest's included.
    pub memory: Option<u64>,
    /// Hundredths of a processor.
    pub cpu_percent: Option<u32>,
    /// Processes and threads.
    pub threads: Option<u64>,
    /// Bytes a second that its images' devices read, and as many that they write.
    pub io_bps: Option<u64>,
    /// The same, in requests.
    pub io_iops: Option<u64>,
}

impl Limits {
    /// Whether a control group is needed.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// Numbers of users that jails may have, `first-last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Users {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

impl Default for Users {
    /// Behind those of `adduser`, before those that subordinate ids usually begin at 524288 or later.
    fn default() -> Self {
        Self { first: 200_000, last: 265_535 }
    }
}

impl FromStr for Users {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u32>().map_err(|_| format!("'{text}' is no user's number"));
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let users = Self { first: number(first)?, last: number(last)? };
        // The last two stand for "none" in system calls, and for whom there is no number here.
        if users.first == 0 || users.first > users.last || users.last > u32::MAX - 2 || users.contains(65534) {
            return Err(format!(
                "'{text}' is no range of users: write FIRST-LAST, without 0 (root) and 65534 (nobody)"
            ));
        }
        Ok(users)
    }
}

impl std::fmt::Display for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Users {
    fn contains(self, user: u32) -> bool {
        (self.first..=self.last).contains(&user)
    }
}

/// Where nothing of the host may be shown: the jail has its own there.
const OWN: [&str; 3] = ["/proc", "/dev", "/sys"];

impl Jail {
    /// Checks what can be known to be wrong without looking at the host.
    ///
    /// # Errors
    /// For paths that cannot be in a jail.
    pub fn check(&self) -> Result<(), Refusal> {
        let shown = self.shown.iter().map(|shown| &shown.path);
        for path in shown.chain(&self.scratch).chain(self.dir.as_ref()).chain([&self.program]) {
            let plain = path.is_absolute()
                && path.components().all(|part| !matches!(part, std::path::Component::ParentDir))
                && path != Path::new("/");
            if !plain {
                let what = format!("{} cannot be in a jail", path.display());
                return Err(refused(what, "give an absolute path without '..', below /"));
            }
            if OWN.iter().any(|own| path.starts_with(own)) {
                let what = format!("{} of the host cannot be in a jail", path.display());
                return Err(refused(what, "put a block device's node elsewhere with mknod, and name that"));
            }
        }
        match self.devices.iter().find(|device| !device.starts_with("/dev/")) {
            Some(device) => Err(refused(format!("{} is no device", device.display()), "name one in /dev")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn jail() -> Jail {
        Jail {
            user: 200_000,
            dir: Some("/run/civic/web".into()),
            shown: vec![],
            scratch: vec![],
            devices: vec![],
            net: Net::None,
            limits: Limits::default(),
            program: "/usr/bin/civic-vmm".into(),
            args: vec![],
        }
    }

    #[test]
    fn users_are_a_range_without_root_and_nobody() {
        assert_eq!("200-300".parse(), Ok(Users { first: 200, last: 300 }));
        assert_eq!("7".parse(), Ok(Users { first: 7, last: 7 }));
        assert_eq!(Users::default().to_string().parse(), Ok(Users::default()));
        for wrong in ["", "0-9", "9-8", "1-65534", "1-4294967295", "a-b", "1-2-3"] {
            assert!(wrong.parse::<Users>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn networks() {
        assert_eq!("none".parse(), Ok(Net::None));
        assert_eq!("host".parse(), Ok(Net::Host));
        assert_eq!("/run/netns/a".parse(), Ok(Net::At("/run/netns/a".into())));
        assert!("a".parse::<Net>().is_err());
    }

    #[test]
    fn the_hosts_own_folders_stay_out() {
        jail().check().unwrap();
        for path in ["/", "relative", "/a/../etc", "/proc/1", "/dev/sda", "/sys"] {
            let jail = Jail { shown: vec![Shown { path: path.into(), write: false }], ..jail() };
            let refused = jail.check().unwrap_err();
            assert!(refused.message.contains(path) && refused.hint.is_some(), "{refused:?}");
        }
        assert!(Jail { devices: vec!["/etc/passwd".into()], ..jail() }.check().is_err());
    }
}
