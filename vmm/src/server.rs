//! The HTTP API of the monitor, on a unix socket, in one thread of its own with a tokio runtime of one thread.
//!
//! ```text
//!  client ── HTTP/1.1 ──► API thread ── Control::command ──► supervisor
//!     ▲                      │ └─────── View::info ────────► atomics, short locks
//!     └── console bytes ── ConsoleHub (the upgraded socket is handed to the hub's thread)
//! ```
//!
//! Invariants:
//! * no vCPU and no device ever waits for this thread;
//! * what a client sends is limited in size ([`MAX_BODY_BYTES`], [`MAX_HEAD_BYTES`]), in time ([`HEAD_TIMEOUT`],
//!   [`BODY_TIMEOUT`], [`CONNECTION_TIME`]) and in number ([`MAX_CONNECTIONS`]), so that one that is slow, stuck or hostile
//!   keeps no other out for long;
//! * nothing a client sends panics. A bug that does ends its connection only;
//! * every answer that is not a success has an `ErrorBody`, save what is not even HTTP: that gets hyper's bare 400 or 431.
//!
//! Whoever can connect may do everything: the socket's directory must be closed to other users. Where there is an audit log, what is not
//! written there is not done.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use civic_api::{ErrorBody, ErrorCode};
use civic_confine::Kind;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::audit::{Audit, Peer};
use crate::control::Control;

pub use civic_api::routes::MAX_BODY_BYTES;
pub use routes::openapi;

mod devices;
mod metrics;
mod programs;
mod routes;

/// Most connections served at a time, consoles aside; the next is answered `busy`.
const MAX_CONNECTIONS: usize = 64;
/// Largest request line and headers together, in bytes. hyper takes no less than 8 KiB.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long a client may take for the request line and headers, and stay idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may take for a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the supervisor may take for a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a guest may take to tell its memory's statistics; then what it told before is shown.
const STATISTICS_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a connection may last; then it is closed after the request it is at.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
/// How long requests under way may go on once the server stops or a connection's time is over.
const GRACE: Duration = Duration::from_secs(2);

/// Keeps a connection beyond its time, while it waits for what takes long and will end.
#[derive(Clone, Default)]
struct Patience(Arc<AtomicUsize>);

/// [`Patience`] as long as it lives.
struct Held(Arc<AtomicUsize>);

impl Patience {
    fn hold(&self) -> Held {
        self.0.fetch_add(1, Ordering::Relaxed);
        Held(Arc::clone(&self.0))
    }

    fn held(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A running server. Dropping it stops it without waiting.
pub struct ServerHandle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Takes no more connections, lets requests under way be answered (for at most two seconds) and waits for the thread.
    pub fn stop(mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("api: the server's thread panicked");
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Serves `control` on `listener` from now on. Fails when the host refuses a thread or a runtime.
pub fn spawn(
    listener: std::os::unix::net::UnixListener,
    control: Control,
    audit: Option<Arc<Audit>>,
) -> io::Result<ServerHandle> {
    spawn_with(listener, control, Limits::default(), audit)
}

/// What tests shorten.
#[derive(Clone, Copy)]
struct Limits {
    head: Duration,
    body: Duration,
    command: Duration,
    statistics: Duration,
    connection: Duration,
    connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: HEAD_TIMEOUT,
            body: BODY_TIMEOUT,
            command: COMMAND_TIMEOUT,
            statistics: STATISTICS_TIMEOUT,
            connection: CONNECTION_TIME,
            connections: MAX_CONNECTIONS,
        }
    }
}

fn spawn_with(
    listener: std::os::unix::net::UnixListener,
    control: Control,
    limits: Limits,
    audit: Option<Arc<Audit>>,
) -> io::Result<ServerHandle> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let listener = {
        let _guard = runtime.enter();
        UnixListener::from_std(listener)?
    };
    let (stop, stopped) = watch::channel(false);
    let router = routes::router(control, limits, audit);
    let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
        civic_confine::thread(Kind::Api);
        runtime.block_on(accept(listener, router, limits, stopped));
        // Nobody waits for what is left: a connection that did not end in its grace.
        runtime.shutdown_background();
    })?;
    Ok(ServerHandle { stop, thread: Some(thread) })
}

/// Accepts until `stopped`, then waits for the connections to end.
async fn accept(listener: UnixListener, router: Router, limits: Limits, mut stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        let stream = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: those of ended connections come back.
                    tracing::warn!(%error, "api: cannot accept a connection");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            refuse(&stream, limits);
            continue;
        };
        let connection = serve(stream, router.clone(), limits, stopped.clone());
        tokio::spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener);
    let all = limits.connections as u32;
    let _ = timeout(GRACE + Duration::from_millis(500), places.acquire_many(all)).await;
}

/// Serves one connection to its end.
async fn serve(stream: UnixStream, router: Router, limits: Limits, mut stopped: watch::Receiver<bool>) {
    let patience = Patience::default();
    // One whose name nobody knows is told of as such.
    let peer = stream.peer_cred().ok().map(|peer| Peer {
        uid: peer.uid(),
        gid: peer.gid(),
        pid: peer.pid().filter(|pid| *pid != 0),
    });
    let router = router.layer(axum::Extension(patience.clone())).layer(axum::Extension(peer));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        _ = async {
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => {}
                () = sleep(limits.connection) => {}
            }
        } => {
            connection.as_mut().graceful_shutdown();
            match timeout(GRACE, connection.as_mut()).await {
                Err(_) if patience.held() => connection.await,
                ended => ended.unwrap_or(Ok(())),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "api: a connection broke");
    }
}

/// Answers a connection there is no place for, if that needs no waiting.
fn refuse(stream: &UnixStream, limits: Limits) {
    let message = format!("{} connections are open", limits.connections);
    let error = ErrorBody::new(ErrorCode::Busy, message).with_hint("close some, or try again in a minute");
    let body = serde_json::to_string(&error).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.try_write(answer.as_bytes());
}

#[cfg(test)]
mod tests;
