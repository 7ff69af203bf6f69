//! The first word of a process that connects to a source: its page server, or a child that wants to be forked from it.
//!
//! Who is jailed does not connect by itself, and cannot be named from another jail. Its jailer connects for it and introduces it, before it
//! can say anything: `civic-jail 1 PID pager` or `civic-jail 1 PID child NAME`, with a pidfd of it and its leash. What it then says of
//! itself must be that.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::source::Process;
use crate::wire::{Wire, WireError, decode};

/// The protocols' version: processes of two versions of Civic do not fork from each other.
pub const VERSION: u32 = 4;

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of whoever connects.
    pub version: u32,
    /// As what.
    pub role: Role,
}

/// What somebody connects as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// As the page server. If there is one already, the connection is closed.
    PageServer,
    /// As a child of this name.
    Child(String),
}

/// Who has connected.
#[derive(Debug)]
pub struct Visitor {
    /// What it says.
    pub hello: Hello,
    /// Its process.
    pub process: Process,
}

impl Visitor {
    /// Hears who is at the other end of `wire`.
    ///
    /// # Errors
    /// When it says nothing within `limit`, or something else than who it is.
    pub fn hear(wire: &Wire, limit: Duration) -> Result<Self, WireError> {
        let (bytes, fds) = wire.receive_bytes(limit)?;
        let Some((pid, role)) = introduced(&bytes) else {
            let hello = decode(&bytes)?;
            return Ok(Self { hello, process: Process::of(wire).map_err(WireError::System)? });
        };
        let [pidfd, leash]: [OwnedFd; 2] =
            fds.try_into().map_err(|_| WireError::Nonsense("an introduction without its descriptors".into()))?;
        let (hello, _) = wire.receive::<Hello>(limit)?;
        if hello.role != role {
            return Err(WireError::Nonsense(format!(
                "it was introduced as {role:?} and says that it is {:?}",
                hello.role
            )));
        }
        Ok(Self { hello, process: Process::jailed(pid, pidfd, leash) })
    }
}

/// What a jailer says of somebody.
fn introduced(bytes: &[u8]) -> Option<(u32, Role)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let words: Vec<_> = text.split(' ').collect();
    let ["civic-jail", "1", pid, role @ ..] = &words[..] else { return None };
    let role = match role {
        ["pager"] => Role::PageServer,
        ["child", name] => Role::Child((*name).to_owned()),
        _ => return None,
    };
    Some((pid.parse().ok()?, role))
}

/// Where a source listens, in its directory.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("fork.sock")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// Sends an introduction as a jailer does, with as many descriptors.
    fn introduce(wire: &Wire, text: &str, fds: usize) {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let fds = vec![read.as_fd(); fds];
        wire.send_bytes(text.as_bytes(), &fds).unwrap();
    }

    fn hello(role: Role) -> Hello {
        Hello { version: VERSION, role }
    }

    #[test]
    fn who_is_jailed_is_who_its_jailer_says() {
        let (jailed, source) = Wire::pair().unwrap();
        introduce(&jailed, "civic-jail 1 42 child web-1", 2);
        jailed.send(&hello(Role::Child("web-1".into())), &[]).unwrap();
        let visitor = Visitor::hear(&source, SOON).unwrap();
        assert_eq!((visitor.hello.role, visitor.process.id()), (Role::Child("web-1".into()), 42));
    }

    #[test]
    fn nobody_is_somebody_else() {
        for (introduction, role, fds) in [
            ("civic-jail 1 42 child web-1", Role::Child("web-2".into()), 2),
            ("civic-jail 1 42 child web-1", Role::PageServer, 2),
            ("civic-jail 1 42 pager", Role::Child("web-1".into()), 2),
            ("civic-jail 1 42 pager", Role::PageServer, 1),
            ("civic-jail 1 42 pager", Role::PageServer, 3),
            ("civic-jail 2 42 pager", Role::PageServer, 2),
            ("civic-jail 1 x pager", Role::PageServer, 2),
        ] {
            let (jailed, source) = Wire::pair().unwrap();
            introduce(&jailed, introduction, fds);
            jailed.send(&hello(role), &[]).unwrap();
            let refused = Visitor::hear(&source, SOON);
            assert!(matches!(refused, Err(WireError::Nonsense(_))), "{introduction}: {refused:?}");
        }
    }

    #[test]
    fn who_is_not_jailed_is_known_by_the_connection() {
        let (here, there) = Wire::pair().unwrap();
        here.send(&hello(Role::PageServer), &[]).unwrap();
        assert_eq!(Visitor::hear(&there, SOON).unwrap().process.id(), std::process::id());
    }
}
