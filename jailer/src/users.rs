//! Users of jails: numbers that nobody else has while a jail lives. A number is taken by a lock on a file named after it, which goes
//! with the process that holds it.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::jail::Users;
use crate::{Refusal, refusal, refused};

/// A number that is ours as long as this is held.
#[derive(Debug)]
pub struct Taken {
    /// The user, and the group of the same number.
    pub user: u32,
    _lock: Flock<File>,
}

/// Takes the first number of `users` that no other jail of this host has; `dir` is where the locks are.
///
/// # Errors
/// When all are taken, or the locks cannot be made.
pub fn take(users: Users, dir: &Path) -> Result<Taken, Refusal> {
    let unusable = |e: std::io::Error| refusal(format!("cannot use {}", dir.display()), e, "run as root");
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable)?;
    for user in users.first..=users.last {
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(dir.join(user.to_string())).map_err(unusable)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Taken { user, _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => (),
            Err((_, e)) => return Err(unusable(e.into())),
        }
    }
    Err(refused(format!("all users {users} have jails"), "end some VMs, or give a wider range of users"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_jails_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let users = Users { first: 300_000, last: 300_001 };
        let first = take(users, dir.path()).unwrap();
        let second = take(users, dir.path()).unwrap();
        assert_eq!((first.user, second.user), (300_000, 300_001));
        let refused = take(users, dir.path()).unwrap_err();
        assert!(refused.message.contains("300000-300001"), "{refused:?}");
        drop(first);
        assert_eq!(take(users, dir.path()).unwrap().user, 300_000);
    }
}
