//! Vsock throughput, both ways. The guest's end is `resources/bench/vsock.pl`; the host's is here.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, VsockAddr, connect, shutdown, socket};

use super::guest::{BOOT, Guest};
use super::machine::Vsock;
use super::net::Way;

const PORT: u32 = 5000;
const BLOCK: usize = 256 << 10;

/// Starts the guest's end.
pub fn serve(guest: &mut Guest) -> Result<()> {
    guest.run(&format!("debian perl /tmp/vsock.pl {PORT}"), BOOT).map(drop)
}

/// A stream to the guest's port.
fn open(to: &Vsock) -> Result<File> {
    match to {
        Vsock::Unix(path) => {
            let mut stream = UnixStream::connect(path).with_context(|| format!("cannot reach {}", path.display()))?;
            stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
            let mut line = Vec::new();
            while !line.ends_with(b"\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).context("the monitor refuses the connection")?;
                line.push(byte[0]);
            }
            ensure!(line.starts_with(b"OK "), "the monitor says {:?}", String::from_utf8_lossy(&line));
            Ok(OwnedFd::from(stream).into())
        }
        Vsock::Vhost(cid) => {
            let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            connect(fd.as_raw_fd(), &VsockAddr::new(*cid, PORT)).context("cannot connect by vsock")?;
            Ok(fd.into())
        }
    }
}

/// Who is at the guest's end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest's end itself.
    Own,
    /// A program behind a pipe.
    Piped,
}

/// MiB per second, over about so many seconds. What the guest receives counts when it has read it all.
pub fn measure(to: &Vsock, way: Way, end: End, seconds: u32) -> Result<f64> {
    let mut stream = open(to)?;
    let mut block = vec![b'x'; BLOCK];
    let mut bytes = 0;
    stream.write_all(match (way, end) {
        (Way::Tx, End::Own) => b"s",
        (Way::Rx, End::Own) => b"r",
        (Way::Tx, End::Piped) => b"S",
        (Way::Rx, End::Piped) => b"R",
    })?;
    let start = Instant::now();
    let limit = Duration::from_secs(seconds.into());
    while start.elapsed() < limit {
        let moved = match way {
            Way::Tx => stream.read(&mut block)?,
            Way::Rx => stream.write(&block)?,
        };
        ensure!(moved > 0, "the guest hung up");
        bytes += moved;
    }
    if way == Way::Rx {
        shutdown(stream.as_raw_fd(), Shutdown::Write)?;
        ensure!(stream.read(&mut block)? == 0, "the guest answers what asks for no answer");
    }
    Ok(bytes as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A monitor's socket with a guest behind it that reads to the end.
    fn guest(name: &str, answer: &'static [u8]) -> Vsock {
        let path = std::env::temp_dir().join(format!("xtask-vsock-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let socket = path.clone();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"CONNECT 5000\n");
            stream.write_all(answer).unwrap();
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
            std::fs::remove_file(socket).unwrap();
        });
        Vsock::Unix(path)
    }

    #[test]
    fn sending_ends_when_all_is_read() {
        assert!(measure(&guest("ok", b"OK 1073741824\n"), Way::Rx, End::Own, 1).unwrap() > 0.0);
        assert!(measure(&guest("no", b"no such port\n"), Way::Rx, End::Own, 1).is_err());
        assert!(measure(&Vsock::Unix("/nowhere".into()), Way::Rx, End::Own, 1).is_err());
    }
}
