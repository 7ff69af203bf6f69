//! A client of the guest's web server: one request after the other, in a share of the time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::PATIENCE;
use crate::bench::net::Tap;

const PORT: u16 = 80;
/// For each moment that a request takes, so many without any: a quarter of what one client can ask for, as of the benches of forks.
const REST: u32 = 3;

/// At work; told to end when dropped.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Load {
    /// Begins; returns when the server has answered once.
    pub fn start(tap: &Tap) -> Result<Self> {
        let server = SocketAddr::new(tap.guest.parse()?, PORT);
        let deadline = Instant::now() + PATIENCE;
        while let Err(e) = ask(server) {
            ensure!(Instant::now() < deadline, "the guest's nginx does not serve: {e:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                ask(server)?;
                std::thread::sleep(begun.elapsed() * REST);
            }
            Ok(())
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends after the request that is on its way; fails if any was not answered.
    pub fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it is ended once")?;
        thread.join().map_err(|_| anyhow!("the client panicked"))?.context("a request was lost")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(server: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE).context("cannot connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").context("cannot send")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("the answer broke off")?;
    let first = String::from_utf8_lossy(&answer);
    ensure!(first.split(' ').nth(1) == Some("200"), "nginx answered {first:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_answer_is_a_good_one() {
        let check = |answer: &'static str| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let server = listener.local_addr().unwrap();
            let serving = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.read_exact(&mut [0; 18]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let done = ask(server).is_ok();
            serving.join().unwrap();
            done
        };
        assert!(check("HTTP/1.1 200 OK\r\n\r\nhello"));
        assert!(!check("HTTP/1.1 500 Internal Server Error\r\n\r\n"));
        assert!(!check(""));
    }
}
