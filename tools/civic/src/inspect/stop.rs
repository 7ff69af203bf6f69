//! Signals that end an inspection: the first ends its programs, the second does not wait for them any more.

use std::io;

use nix::libc::c_int;
use tokio::sync::watch;

use crate::console::Signals;

/// Whether it is to end; for whoever asks.
#[derive(Clone)]
pub struct Stop(watch::Receiver<Heard>);

/// The first signal, and how many there were.
#[derive(Clone, Copy, Default)]
struct Heard {
    first: Option<c_int>,
    count: u32,
}

impl Stop {
    /// Catches signals from now on.
    pub fn catch() -> io::Result<Self> {
        let mut signals = Signals::catch()?;
        let (sender, receiver) = watch::channel(Heard::default());
        tokio::spawn(async move {
            loop {
                let signal = signals.next().await;
                sender.send_modify(|heard| {
                    heard.first.get_or_insert(signal);
                    heard.count += 1;
                });
            }
        });
        Ok(Self(receiver))
    }

    /// The first signal, if there was one.
    pub fn signal(&self) -> Option<c_int> {
        self.0.borrow().first
    }

    /// Waits for the first signal.
    pub async fn first(&mut self) -> c_int {
        self.after(1).await
    }

    /// Waits for the second; gives the first.
    pub async fn second(&mut self) -> c_int {
        self.after(2).await
    }

    async fn after(&mut self, count: u32) -> c_int {
        match self.0.wait_for(|heard| heard.count >= count).await.ok().and_then(|heard| heard.first) {
            Some(signal) => signal,
            // Who hears them has gone: there will be none.
            None => std::future::pending().await,
        }
    }
}
