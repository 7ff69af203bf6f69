//! A child in a process of its own, of another user if this is root's; and a store on a file system that fills up.
#![allow(unsafe_code)]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use super::*;
use crate::testing::Random;

const CLUSTERS: u64 = 64;
/// What tells a test that it is the child.
const ROLE: &str = "CIVIC_DISK_TEST_ROLE";

fn send(socket: &UnixStream, parts: &FrozenParts) {
    let FrozenStateV1::Preserved { len, cluster } = parts.state else { unreachable!() };
    let message = [len, u64::from(cluster)].map(u64::to_le_bytes).concat();
    let fds: Vec<_> = parts.fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&message)], &control, MsgFlags::empty(), None).unwrap();
}

fn receive(socket: &UnixStream) -> FrozenParts {
    let mut message = [0; 16];
    let mut iov = [IoSliceMut::new(&mut message)];
    let mut space = nix::cmsg_space!([i32; 3]);
    let got = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let fds = got.cmsgs().unwrap().flat_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds,
        _ => Vec::new(),
    });
    // SAFETY: the kernel has just made them for this process, and nobody else knows them.
    let fds = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    let (words, _) = message.as_chunks::<8>();
    let [len, cluster] = [words[0], words[1]].map(u64::from_le_bytes);
    FrozenParts { state: FrozenStateV1::Preserved { len, cluster: cluster as u32 }, fds }
}

fn stamp(cluster: u64) -> [u8; 8] {
    (cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1).to_le_bytes()
}

/// The child's part: reads all clusters again and again, until its parent says that it is enough.
fn child() {
    // SAFETY: standard input is a socket that the parent made, and nobody else here reads it.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let parts = receive(&socket);
    let root = nix::unistd::geteuid().is_root();
    if root {
        let nobody = nix::unistd::Uid::from_raw(65534);
        nix::unistd::setresuid(nobody, nobody, nobody).unwrap();
    }
    for fd in &parts.fds {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let again = File::options().write(true).open(path);
        // Not even so can another user write them. (The tables nobody can: see `words`.)
        assert!(!root || again.and_then(|mut file| file.write_all(&[1])).is_err());
    }
    let frozen = FrozenFile::open(parts).unwrap();
    socket.write_all(b"r").unwrap();
    socket.set_nonblocking(true).unwrap();
    loop {
        for cluster in 0..CLUSTERS {
            let mut bytes = vec![0; C as usize];
            frozen.read_at(&mut bytes, cluster * C).unwrap();
            assert!(bytes.as_chunks::<8>().0.iter().all(|word| *word == stamp(cluster)), "cluster {cluster}");
        }
        if socket.read(&mut [0]).is_ok() {
            break;
        }
    }
    socket.set_nonblocking(false).unwrap();
    socket.write_all(b"k").unwrap();
    // The generation ends.
    socket.read_exact(&mut [0]).unwrap();
    assert_eq!(lost(&frozen), Some(Lost::Ended));
}

#[test]
fn a_child_in_another_process_reads_while_the_source_writes() {
    if std::env::var_os(ROLE).is_some() {
        return child();
    }
    let source = Source::new(CLUSTERS * C, 1 << 30);
    for cluster in 0..CLUSTERS {
        source.write(&stamp(cluster).repeat(C as usize / 8), cluster * C);
    }
    let generation = source.freezer.freeze().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "--nocapture",
        "disk::tests::processes::a_child_in_another_process_reads_while_the_source_writes",
    ]);
    command.env(ROLE, "child").stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    send(&ours, &generation.parts().unwrap());
    ours.read_exact(&mut [0]).unwrap();
    let mut random = Random(3);
    for n in 0..3000_u64 {
        source.write(&n.to_le_bytes().repeat(512), random.below(CLUSTERS * C / 4096) * 4096);
    }
    ours.write_all(b"e").unwrap();
    let mut answer = [0];
    ours.read_exact(&mut answer).unwrap();
    drop(generation);
    ours.write_all(b"d").unwrap();
    assert!(child.wait().unwrap().success());
}

/// On a file system of 1 MiB.
fn fill_up(dir: &std::path::Path) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * C).unwrap();
    let told = Told::default();
    let options = FreezerOptions { store: dir.to_owned(), limit: u64::MAX, reflink: None };
    let freezer = Freezer::over_file(reopen_read_only(&file).unwrap(), options, tell(&told)).unwrap();
    let source = Source { file, freezer, told };
    source.fill(1, 0..64);
    let first = source.freezer.freeze().unwrap();
    source.fill(2, 0..10);
    let second = source.freezer.freeze().unwrap();
    assert_eq!(source.told(), []);
    // Nine more do not fit, unless the first generation's are given up.
    source.fill(3, 30..39);
    assert_eq!((source.told(), lost(&open(&first))), (vec![Lost::NoSpace], Some(Lost::NoSpace)));
    let mut byte = [0];
    for (cluster, expected) in [(0, 2), (9, 2), (30, 1), (38, 1), (50, 1)] {
        open(&second).read_at(&mut byte, cluster * C).unwrap();
        assert_eq!(byte[0], expected);
    }
    source.fill(4, 0..64);
    assert_eq!((source.told(), lost(&open(&second))), (vec![Lost::NoSpace; 2], Some(Lost::NoSpace)));
    assert!(source.content().iter().all(|byte| *byte == 4));
    drop((first, second));
    let third = source.freezer.freeze().unwrap();
    source.fill(5, 0..10);
    assert!(all(&open(&third)).iter().all(|byte| *byte == 4));
}

#[test]
fn a_full_file_system_costs_generations_and_no_write() {
    if let Some(dir) = std::env::var_os(ROLE) {
        return fill_up(dir.as_ref());
    }
    let dir = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=1m none "$0" && exec "$1" --exact --nocapture "$2""#;
    let mut command = Command::new("unshare");
    command
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap());
    command.arg("disk::tests::processes::a_full_file_system_costs_generations_and_no_write");
    let out = command.env(ROLE, dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}
