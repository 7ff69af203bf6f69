//! What clients send: requests over connections of the server as it is, with a machine behind it that is nothing but its state; and
//! configurations.
//!
//! Whatever comes, each answer is HTTP, one that is no success says why as all do, and the next client is served.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use civic_api::{ErrorBody, ErrorCode, SaveReport, VmConfig, VmInfo, VmState};
use civic_devices::console_hub::ConsoleHub;
use civic_vmm::control::{Answer, Command, Control, Request, View};
use civic_vmm::fork::family::Sharing;
use civic_vmm::programs::Session;
use civic_vmm::server::{ServerHandle, openapi, spawn};

use crate::host::{hub, scratch};

/// Longer than the server lets a client be slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a server is silent that has nothing to say.
const PAUSE: Duration = Duration::from_millis(2);

/// Sends one input to the server: everything, and then nothing more.
pub fn run(bytes: &[u8]) {
    let said = ask(bytes);
    check(&said);
    let said = answered(b"GET /v1/info HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert!(said.starts_with(b"HTTP/1.1 200 "), "the next client gets {}", String::from_utf8_lossy(&said));
}

/// What the server answers to a request that ends the connection.
fn answered(request: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(server()).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
    stream.write_all(request).expect("the server reads");
    let mut said = Vec::new();
    assert!(!listen(&mut stream, &mut said), "no end of an answer");
    said
}

/// What the server answers to `bytes`.
fn ask(bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(server()).expect("the server listens");
    stream.set_write_timeout(Some(PATIENCE)).expect("it is not zero");
    // The server may close before it has read all.
    let _ = stream.write_all(bytes);
    // First what it has to say to this much, for it breaks off what it is at when there comes no more.
    let (mut said, mut more) = (Vec::new(), true);
    for patience in [PAUSE, PATIENCE] {
        stream.set_read_timeout(Some(patience)).expect("it is not zero");
        more = more && listen(&mut stream, &mut said);
        let _ = stream.shutdown(Shutdown::Write);
    }
    assert!(!more, "no end of an answer");
    said
}

/// Reads until the connection ends or becomes a console, which never does; true if it only fell silent.
fn listen(stream: &mut UnixStream, said: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 4096];
    while !upgraded(said) {
        match stream.read(&mut chunk) {
            Ok(len) if len > 0 => said.extend(&chunk[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    false
}

fn upgraded(said: &[u8]) -> bool {
    said.windows(13).any(|part| part == b"HTTP/1.1 101 ")
}

/// Each answer that is no success has a body that says why, but for what was not HTTP.
fn check(mut said: &[u8]) {
    while !said.is_empty() && !upgraded(said) {
        // What is under way when the client has said its last is broken off.
        let Some(head) = said.windows(4).position(|part| part == b"\r\n\r\n") else { return };
        let (head, rest) = (std::str::from_utf8(&said[..head]).expect("a head is text"), &said[head + 4..]);
        let status = head.strip_prefix("HTTP/1.1 ").or_else(|| head.strip_prefix("HTTP/1.0 "));
        let status: u16 = status.and_then(|line| line.get(..3)?.parse().ok()).expect("an answer has a status");
        if status == 100 {
            // Go on: the answer follows.
            said = rest;
            continue;
        }
        assert!((200..600).contains(&status), "{head}");
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let len: usize = field("content-length").map_or(0, |len| len.parse().expect("a length is a number"));
        // The answer to HEAD says how long it would be.
        let Some(body) = rest.get(..len) else { return };
        let errors = status >= 400 && field("content-type") == Some("application/json");
        if errors && serde_json::from_slice::<ErrorBody>(body).is_err() {
            // Again HEAD: what follows is another answer, or nothing.
            assert!(rest.is_empty() || rest.starts_with(b"HTTP/1."), "{head}\n{}", String::from_utf8_lossy(body));
            said = rest;
            continue;
        }
        assert!(status < 400 || errors || len == 0, "{head} says not why");
        said = &rest[len..];
    }
}

/// The socket of a server that lives as long as the process.
fn server() -> &'static PathBuf {
    static SERVER: OnceLock<(PathBuf, ServerHandle)> = OnceLock::new();
    let start = || {
        let path = scratch("api");
        let listener = UnixListener::bind(&path).expect("a new socket can be bound");
        let machine = Arc::new(Machine(Mutex::new(VmState::Created)));
        let supervisor = Arc::clone(&machine);
        let control = Control::new(move |request| supervisor.obey(request), machine);
        (path, spawn(listener, control, None).expect("the host has a thread"))
    };
    &SERVER.get_or_init(start).0
}

/// A machine that is nothing but its state.
struct Machine(Mutex<VmState>);

impl Machine {
    fn obey(&self, request: Request) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Each command is granted now and then.
        let next = match *state {
            VmState::Created => VmState::Running,
            VmState::Running => VmState::Paused,
            _ => VmState::Created,
        };
        let answer = match next {
            VmState::Created => Err(ErrorBody::new(ErrorCode::WrongState, "not now")),
            _ => Ok(match request.command {
                Command::Save(save) => Answer::Saved(SaveReport {
                    directory: save.directory,
                    memory_bytes_written: 0,
                    state_bytes: 0,
                    pause_ms: 0,
                    total_ms: 0,
                }),
                _ => Answer::Done,
            }),
        };
        *state = next;
        let _ = request.reply.send(answer);
    }
}

impl View for Machine {
    fn sharing(&self) -> Option<Sharing> {
        None
    }

    fn info(&self) -> VmInfo {
        let info = r#"{"name":"fuzz","state":"created","pid":1,"version":"0.1.0","cpus":1,"memory_bytes":1073741824,
            "kernel":"/boot/vmlinuz","boots":1,"run_ms":0,"devices":[],"vcpus":[],"consoles":["serial"]}"#;
        let info: VmInfo = serde_json::from_str(info).expect("it has all that has no default");
        VmInfo { state: *self.0.lock().unwrap_or_else(PoisonError::into_inner), ..info }
    }

    fn ask_balloon(&self) {}

    fn program(&self, _: u64) -> Option<Arc<Session>> {
        None
    }

    fn console(&self, port: &str) -> Option<Arc<ConsoleHub>> {
        (port == "serial").then(hub)
    }
}

/// Every route with every method, with and without a body; several requests at once; what is not HTTP.
pub fn seeds() -> Vec<Vec<u8>> {
    let document = serde_json::to_value(openapi()).expect("the document is JSON");
    let mut seeds = Vec::new();
    for path in document["paths"].as_object().into_iter().flat_map(|paths| paths.keys()) {
        seeds.push(format!(
            "GET {path} HTTP/1.1\r\nhost: vm\r\n\r\nPOST {path} HTTP/1.1\r\ncontent-length: 2\r\n\r\n{{}}"
        ));
    }
    let upgrade = "connection: Upgrade\r\nupgrade: civic-console";
    seeds.push(format!("GET /v1/console?port=serial HTTP/1.1\r\n{upgrade}\r\n\r\nhello"));
    seeds.push(
        "POST /v1/start HTTP/1.1\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
            .into(),
    );
    let save = r#"{"directory":"/tmp/saved","then":"resume"}"#;
    seeds.push(format!("POST /v1/save HTTP/1.1\r\ncontent-length: {}\r\n\r\n{save}", save.len()));
    seeds.push("HEAD /v1/info HTTP/1.0\r\n\r\n".into());
    seeds.push("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into());
    seeds.into_iter().map(String::into_bytes).collect()
}

/// Reads one configuration; what is taken can be written and read again.
pub fn run_config(bytes: &[u8]) {
    let config: VmConfig = match serde_json::from_slice(bytes) {
        Ok(config) => config,
        Err(error) => return drop(error.to_string()),
    };
    let written = serde_json::to_vec(&config);
    if let Err(error) = config.validate() {
        return drop(error.to_string());
    }
    let written = written.expect("a configuration is JSON");
    assert_eq!(serde_json::from_slice::<VmConfig>(&written).expect("what was written"), config);
    assert!(!config.effective_cmdline().contains('\0'));
}

/// Configurations with everything, and with nothing.
pub fn seeds_config() -> Vec<Vec<u8>> {
    let least = r#"{"name":"a","kernel":"/k","memory_bytes":16777216,"cpus":1}"#;
    let most = r#"{"name":"a.b-c_0","kernel":"/k","initrd":"/i","cmdline":"quiet","memory_bytes":1073741824,"cpus":2,
        "disks":[{"id":"root","path":"/d","read_only":true}],"nets":[{"id":"eth0","tap":"tap0","mac":"02:00:00:00:00:01"}],
        "vsock":{"path":"/v","cid":3},"balloon":{"bytes":4096},"overcommit":true,"any_kvm":true}"#;
    vec![least.into(), most.into(), b"{}".to_vec()]
}
