//! The HTTP client of one VM's monitor: HTTP/1.1 over its unix socket, a connection per request.
//!
//! Needs a tokio runtime with I/O and time enabled. Everything but [`Client::console`]'s stream ends by itself: a monitor
//! that does not answer within [`REPLY_TIMEOUT`] is an error.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::{
    BalloonConfig, BalloonInfo, ErrorBody, ForkReport, ForkRequest, GuestFiles, GuestKernel, NewDevice, PluggedDevice,
    ProgramRequest, SaveReport, SaveRequest, StartedProgram, VmInfo, routes,
};

/// How long a monitor may take to answer. Longer than the monitor's own limits, whose errors say more.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(45);
/// Largest answer read, in bytes.
const MAX_REPLY_BYTES: usize = 16 << 20;

/// A console's or program's bytes, both ways. Shut down its writing half to end the input and go on reading.
pub type ConsoleStream = TokioIo<Upgraded>;

/// Why a request got no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("no monitor answers on {}", socket.display())]
    NotRunning {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The monitor answered with an error.
    #[error("{0}")]
    Refused(ErrorBody),
    /// The monitor did not answer in time.
    #[error("the monitor did not answer within {} s", REPLY_TIMEOUT.as_secs())]
    TimedOut,
    /// The connection broke, as it does when the monitor ends.
    #[error("the connection to the monitor broke")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not one of ours.
    #[error("the monitor's answer makes no sense: {0}")]
    Protocol(String),
}

impl ClientError {
    /// The monitor's own error, if it is one.
    pub fn refusal(&self) -> Option<&ErrorBody> {
        match self {
            Self::Refused(body) => Some(body),
            _ => None,
        }
    }
}

/// A VM's monitor.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The monitor that listens on `socket`. Connects only when asked something.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The VM as it is now.
    pub async fn info(&self) -> Result<VmInfo, ClientError> {
        let body = self.fetch(Method::GET, routes::INFO).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// What the VM's guest runs, found in its memory. Takes as long as reading some 64 MiB of it.
    pub async fn guest(&self, files: &GuestFiles) -> Result<GuestKernel, ClientError> {
        if !files.is_empty() {
            return self.post_patiently(routes::GUEST, files).await;
        }
        let body = self.fetch(Method::GET, routes::GUEST).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Lets a created VM run.
    pub async fn start(&self) -> Result<(), ClientError> {
        self.command(routes::START).await
    }

    /// Holds a running VM; returns when no vCPU runs.
    pub async fn pause(&self) -> Result<(), ClientError> {
        self.command(routes::PAUSE).await
    }

    /// Lets a paused VM go on.
    pub async fn resume(&self) -> Result<(), ClientError> {
        self.command(routes::RESUME).await
    }

    /// Presses the power button and returns at once.
    pub async fn stop(&self) -> Result<(), ClientError> {
        self.command(routes::STOP).await
    }

    /// Ends the VM now.
    pub async fn kill(&self) -> Result<(), ClientError> {
        self.command(routes::KILL).await
    }

    /// Forks the VM. Takes as long as its memory is large; a monitor that ends breaks the connection.
    pub async fn fork(&self, request: &ForkRequest) -> Result<ForkReport, ClientError> {
        self.post_patiently(routes::FORK, request).await
    }

    /// Saves the VM. Takes as long as writing its memory does; a monitor that ends breaks the connection.
    pub async fn save(&self, request: &SaveRequest) -> Result<SaveReport, ClientError> {
        self.post_patiently(routes::SAVE, request).await
    }

    /// Plugs in a device, and waits for the guest as long as `wait`.
    pub async fn plug(&self, device: &NewDevice, wait: Duration) -> Result<PluggedDevice, ClientError> {
        let (route, body) = device.request().map_err(|error| ClientError::Protocol(error.to_string()))?;
        self.post_patiently(&format!("{route}?wait_ms={}", wait.as_millis()), &body).await
    }

    /// Removes a device: returns when it is closed. The guest has as long as `wait` to agree; by `force` it is not asked.
    pub async fn unplug(&self, id: &str, wait: Duration, force: bool) -> Result<(), ClientError> {
        if !is_word(id) {
            return Err(ClientError::Protocol(format!("'{id}' is no id of a device")));
        }
        let route = routes::DEVICE.replace("{id}", id);
        let request = Request::delete(format!("{route}?wait_ms={}&force={force}", wait.as_millis()));
        let response = self.send(request).await?;
        let status = response.status();
        let body = read(response).await?;
        if status.is_success() { Ok(()) } else { Err(refusal(status, &body)) }
    }

    /// Posts what takes as long as it takes.
    async fn post_patiently<T: DeserializeOwned>(
        &self,
        route: &str,
        request: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Protocol(error.to_string()))?;
        let request = Request::post(route).header(CONTENT_TYPE, "application/json");
        let response = self.send_body(request, body.into()).await?;
        let status = response.status();
        let body = read(response).await?;
        if !status.is_success() {
            return Err(refusal(status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// The VM's balloon as it is now.
    pub async fn balloon(&self) -> Result<BalloonInfo, ClientError> {
        let body = self.fetch(Method::GET, routes::BALLOON).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Tells the balloon how much to take; returns when the guest has been asked, not when it has given.
    pub async fn set_balloon(&self, balloon: &BalloonConfig) -> Result<(), ClientError> {
        let body = serde_json::to_vec(balloon).map_err(|error| ClientError::Protocol(error.to_string()))?;
        let request = Request::put(routes::BALLOON).header(CONTENT_TYPE, "application/json");
        in_time(async {
            let response = self.send_body(request, body.into()).await?;
            let status = response.status();
            let body = read(response).await?;
            if status.is_success() { Ok(()) } else { Err(refusal(status, &body)) }
        })
        .await
    }

    /// OpenMetrics (Prometheus) text.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        text(self.fetch(Method::GET, routes::METRICS).await?)
    }

    /// The monitor's OpenAPI document, JSON.
    pub async fn openapi(&self) -> Result<String, ClientError> {
        text(self.fetch(Method::GET, routes::OPENAPI).await?)
    }

    /// Attaches to a console port. The stream starts with what the port printed last.
    pub async fn console(&self, port: &str) -> Result<ConsoleStream, ClientError> {
        if !is_word(port) {
            return Err(ClientError::Protocol(format!("'{port}' is no name of a console port")));
        }
        self.upgraded(&format!("{}?port={port}", routes::CONSOLE), routes::CONSOLE_PROTOCOL).await
    }

    /// Has a program started in the VM, which is a fork. Takes as long as the request says.
    pub async fn start_program(&self, request: &ProgramRequest) -> Result<StartedProgram, ClientError> {
        self.post_patiently(routes::PROGRAMS, request).await
    }

    /// Attaches to a program: the stream has frames of `civic-loader`'s protocol.
    pub async fn program(&self, id: u64) -> Result<ConsoleStream, ClientError> {
        self.upgraded(&routes::PROGRAM.replace("{id}", &id.to_string()), routes::PROGRAM_PROTOCOL).await
    }

    async fn upgraded(&self, route: &str, protocol: &str) -> Result<ConsoleStream, ClientError> {
        let request = Request::get(route).header(CONNECTION, "upgrade").header(UPGRADE, protocol);
        in_time(async {
            let response = self.send(request).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let status = response.status();
                return Err(refusal(status, &read(response).await?));
            }
            Ok(TokioIo::new(hyper::upgrade::on(response).await.map_err(broken)?))
        })
        .await
    }

    async fn command(&self, route: &str) -> Result<(), ClientError> {
        self.fetch(Method::POST, route).await.map(drop)
    }

    async fn fetch(&self, method: Method, route: &str) -> Result<Bytes, ClientError> {
        in_time(async {
            let response = self.send(Request::builder().method(method).uri(route)).await?;
            let status = response.status();
            let body = read(response).await?;
            if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
        })
        .await
    }

    async fn send(&self, request: hyper::http::request::Builder) -> Result<Response<Incoming>, ClientError> {
        self.send_body(request, Bytes::new()).await
    }

    async fn send_body(
        &self,
        request: hyper::http::request::Builder,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = connect(&self.socket).await.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning { socket: self.socket.clone(), source }
            }
            _ => ClientError::Broken(source.into()),
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Ends when the response has been read, or with the upgraded stream.
        tokio::spawn(connection.with_upgrades());
        let request = request
            .header(HOST, "civic")
            .body(Full::new(body))
            .map_err(|error| ClientError::Protocol(error.to_string()))?;
        sender.send_request(request).await.map_err(broken)
    }
}

fn broken(error: hyper::Error) -> ClientError {
    ClientError::Broken(error.into())
}

/// Whether it can be part of a URI as it is.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

async fn in_time<T>(work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    tokio::time::timeout(REPLY_TIMEOUT, work).await.unwrap_or(Err(ClientError::TimedOut))
}

async fn read(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), MAX_REPLY_BYTES);
    Ok(body.collect().await.map_err(ClientError::Broken)?.to_bytes())
}

fn refusal(status: StatusCode, body: &[u8]) -> ClientError {
    match serde_json::from_slice(body) {
        Ok(body) => ClientError::Refused(body),
        Err(_) => ClientError::Protocol(format!("HTTP status {status}")),
    }
}

fn text(body: Bytes) -> Result<String, ClientError> {
    String::from_utf8(body.into()).map_err(|error| ClientError::Protocol(error.to_string()))
}

/// Connects to the socket that is at `path` itself. A link there is not followed: who a VM's folder belongs to might have it lead to another
/// VM's, which this process may use and that user may not.
async fn connect(path: &Path) -> io::Result<UnixStream> {
    let found = std::fs::File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    UnixStream::connect(format!("/proc/self/fd/{}", found.as_raw_fd())).await
}
