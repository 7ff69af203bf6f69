use super::*;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use civic_api::client::{Client, ClientError};
use civic_api::{
    AfterSave, BalloonConfig, BalloonInfo, DeviceInfo, GuestAnswer, SaveReport, SaveRequest, VcpuInfo, VmInfo, VmState,
};
use civic_devices::console_hub::{ConsoleHub, ConsoleInput};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::control::{Answer, Command, Request, View, no_balloon};
use crate::fork::family::Sharing;
use crate::programs::Session;

/// A machine that is nothing but its state, and a guest whose console echoes in upper case.
struct Fake {
    state: Mutex<VmState>,
    hub: Arc<ConsoleHub>,
    gone: AtomicBool,
    balloon: Mutex<Option<BalloonInfo>>,
    /// Whether the guest tells its statistics when asked.
    talks: AtomicBool,
    silent: Mutex<Vec<Request>>,
    hangs: AtomicBool,
}

struct Echo(std::sync::Weak<ConsoleHub>);

impl ConsoleInput for Echo {
    fn offer(&self, bytes: &[u8]) -> usize {
        let taken = &bytes[..bytes.len().min(5)];
        if let Some(hub) = self.0.upgrade() {
            hub.guest_output(&taken.to_ascii_uppercase());
            hub.input_ready();
        }
        taken.len()
    }
}

impl Fake {
    fn command(&self, request: Request) {
        use VmState::*;
        if self.gone.load(Ordering::Relaxed) {
            return;
        }
        if self.hangs.load(Ordering::Relaxed) {
            self.silent.lock().unwrap().push(request);
            return;
        }
        if let Command::SetBalloon(bytes) = request.command {
            let mut balloon = self.balloon.lock().unwrap();
            let set = balloon.as_mut().map(|balloon| balloon.target_bytes = bytes);
            return request.reply.send(set.map(|()| Answer::Done).ok_or_else(no_balloon)).unwrap();
        }
        let mut state = self.state.lock().unwrap();
        let next = match (&request.command, *state) {
            (Command::Start, Created) | (Command::Resume, Paused) => Ok(Running),
            (Command::Pause, Running) => Ok(Paused),
            (Command::Stop, Running | Stopping) => Ok(Stopping),
            (Command::Kill, _) => Ok(Stopped),
            (command, state) => {
                Err(ErrorBody::new(ErrorCode::WrongState, format!("{command:?} of a VM that is {state}")))
            }
        };
        let _ = request.reply.send(next.map(|next| {
            *state = next;
            Answer::Done
        }));
    }
}

impl View for Fake {
    fn sharing(&self) -> Option<Sharing> {
        None
    }

    fn info(&self) -> VmInfo {
        VmInfo {
            name: "web".into(),
            state: *self.state.lock().unwrap(),
            pid: 1,
            version: "0.1.0".into(),
            cpus: 2,
            memory_bytes: 1 << 30,
            kernel: PathBuf::from("/boot/vmlinuz"),
            audit: None,
            boots: 3,
            started_at_ms: None,
            run_ms: 1500,
            programs: Vec::new(),
            balloon: self.balloon.lock().unwrap().clone(),
            family: civic_api::Family::default(),
            saving: None,
            devices: vec![DeviceInfo {
                id: "disk0".into(),
                kind: "blk".into(),
                address: Some("0000:00:03.0".into()),
                settings: BTreeMap::from([("path".to_owned(), "/r.img".to_owned())]),
                counters: BTreeMap::from([("read_bytes".to_owned(), 512)]),
                driver: Some(true),
                guest: GuestAnswer::Unasked,
                leaving: false,
            }],
            vcpus: vec![VcpuInfo { index: 0, exits: BTreeMap::from([("hlt".to_owned(), 7)]) }],
            consoles: vec!["serial".into()],
            ended: None,
        }
    }

    fn ask_balloon(&self) {
        if let Some(balloon) = self.balloon.lock().unwrap().as_mut()
            && self.talks.load(Ordering::Relaxed)
        {
            balloon.reports += 1;
            balloon.statistics = BTreeMap::from([("free_bytes".to_owned(), balloon.reports)]);
        }
    }

    fn program(&self, _: u64) -> Option<Arc<Session>> {
        None
    }

    fn console(&self, port: &str) -> Option<Arc<ConsoleHub>> {
        (port == "serial").then(|| self.hub.clone())
    }
}

struct Setup {
    fake: Arc<Fake>,
    socket: PathBuf,
    server: Option<ServerHandle>,
    _dir: tempfile::TempDir,
}

impl Setup {
    fn client(&self) -> Client {
        Client::new(&self.socket)
    }

    /// Sends `request` as it is and reads to the end of the connection.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = StdStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The server may close before it has read all: that is the point of some tests.
        let _ = stream.write_all(request);
        read_all(&mut stream)
    }
}

fn read_all(stream: &mut StdStream) -> String {
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => answer.extend(&chunk[..n]),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}; so far: {}", String::from_utf8_lossy(&answer)),
        }
    }
    String::from_utf8(answer).unwrap()
}

fn setup(limits: Limits) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let hub = ConsoleHub::new("serial", 4096, None).unwrap();
    hub.connect_input(Arc::new(Echo(Arc::downgrade(&hub))));
    let fake = Arc::new(Fake {
        state: Mutex::new(VmState::Created),
        hub,
        gone: AtomicBool::new(false),
        talks: AtomicBool::new(true),
        balloon: Mutex::new(Some(BalloonInfo { target_bytes: 4096, ..BalloonInfo::default() })),
        silent: Mutex::default(),
        hangs: AtomicBool::new(false),
    });
    let supervisor = fake.clone();
    let control = Control::new(move |request| supervisor.command(request), fake.clone());
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let server = Some(spawn_with(listener, control, limits, None).unwrap());
    Setup { fake, socket, server, _dir: dir }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// The code in the body of an answer, after checking status and type.
fn error_code(answer: &str, status: &str) -> ErrorCode {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer:?}"));
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(head.contains("content-type: application/json"), "{answer}");
    serde_json::from_str::<ErrorBody>(body).unwrap().code
}

#[test]
fn commands_change_the_state() {
    let setup = setup(Limits::default());
    let client = setup.client();
    block_on(async {
        assert_eq!(client.info().await.unwrap(), setup.fake.info());
        let refused = client.pause().await.unwrap_err();
        assert_eq!(refused.refusal().unwrap().code, ErrorCode::WrongState);
        assert_eq!(refused.to_string(), "Pause of a VM that is created");
        for (command, state) in [
            (client.start().await, VmState::Running),
            (client.pause().await, VmState::Paused),
            (client.resume().await, VmState::Running),
            (client.stop().await, VmState::Stopping),
            (client.kill().await, VmState::Stopped),
        ] {
            command.unwrap_or_else(|error| panic!("to {state}: {error}"));
        }
        assert_eq!(client.info().await.unwrap().state, VmState::Stopped);
    });
}

#[test]
fn a_supervisor_that_is_gone_or_hangs_is_reported() {
    let setup = setup(Limits { command: Duration::from_millis(50), ..Limits::default() });
    let client = setup.client();
    setup.fake.hangs.store(true, Ordering::Relaxed);
    let error = block_on(client.start()).unwrap_err();
    assert_eq!(error.refusal().unwrap().code, ErrorCode::Timeout);
    setup.fake.gone.store(true, Ordering::Relaxed);
    let error = block_on(client.start()).unwrap_err();
    assert_eq!(error.refusal().unwrap().code, ErrorCode::Internal);
}

#[test]
fn what_is_no_request_gets_an_error_body() {
    let setup = setup(Limits::default());
    let answer = setup.raw(b"GET /v1/nonsense HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert_eq!(error_code(&answer, "404"), ErrorCode::NotFound);
    let answer = setup.raw(b"DELETE /v1/info HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert_eq!(error_code(&answer, "405"), ErrorCode::MethodNotAllowed);
    assert!(answer.contains("allow: GET"), "{answer}");
    for body in ["{", "[1]", "{\"force\":true}", "\u{0}"] {
        let head = format!("POST /v1/kill HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let answer = setup.raw(&[head.as_bytes(), body.as_bytes()].concat());
        assert_eq!(error_code(&answer, "400"), ErrorCode::InvalidRequest, "{body}");
    }
    let answer = setup.raw(b"POST /v1/start HTTP/1.1\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}");
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    let answer = setup.raw(b"GET /v1/console?port=tty HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert_eq!(error_code(&answer, "404"), ErrorCode::NotFound);
    let answer = setup.raw(b"GET /v1/console?prot=tty HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert_eq!(error_code(&answer, "400"), ErrorCode::InvalidRequest);
    let answer = setup.raw(b"GET /v1/console HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert_eq!(error_code(&answer, "400"), ErrorCode::InvalidRequest);
    // hyper's own answers, which have no body.
    assert!(setup.raw(b"\x16\x03\x01 hello\r\n\r\n").starts_with("HTTP/1.1 400 "));
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD_BYTES + 10));
    assert!(setup.raw(long.as_bytes()).starts_with("HTTP/1.1 4"));
    block_on(setup.client().info()).unwrap();
}

#[test]
fn a_large_body_is_refused() {
    let setup = setup(Limits::default());
    let at_limit = " ".repeat(MAX_BODY_BYTES - 2) + "{}";
    for (body, status) in [(at_limit.clone(), "204"), (at_limit + " ", "413")] {
        let head = format!("POST /v1/kill HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let answer = setup.raw(&[head.as_bytes(), body.as_bytes()].concat());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    let endless = "POST /v1/kill HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".to_owned()
        + &"1000\r\n"
            .to_owned()
            .chars()
            .chain("x".repeat(4096).chars())
            .chain("\r\n".chars())
            .collect::<String>()
            .repeat(17);
    assert_eq!(error_code(&setup.raw(endless.as_bytes()), "413"), ErrorCode::TooLarge);
}

#[test]
fn a_slow_client_is_cut_off_and_delays_nobody() {
    let short = Duration::from_millis(200);
    let setup = setup(Limits { head: short, body: short, ..Limits::default() });
    let mut slow_head = StdStream::connect(&setup.socket).unwrap();
    slow_head.write_all(b"GET /v1/in").unwrap();
    let mut slow_body = StdStream::connect(&setup.socket).unwrap();
    slow_body.write_all(b"POST /v1/start HTTP/1.1\r\ncontent-length: 10\r\n\r\n{").unwrap();
    let mut idle = StdStream::connect(&setup.socket).unwrap();
    block_on(setup.client().info()).unwrap();
    for stream in [&slow_head, &slow_body, &idle] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    assert!(!read_all(&mut slow_head).contains("200 OK"));
    assert_eq!(error_code(&read_all(&mut slow_body), "408"), ErrorCode::Timeout);
    assert_eq!(read_all(&mut idle), "");
    assert_eq!(setup.fake.info().state, VmState::Created);
}

#[test]
fn connections_are_limited_in_number_and_time() {
    let limits = Limits { connections: 2, connection: Duration::from_millis(300), ..Limits::default() };
    let setup = setup(limits);
    let mut stuck: Vec<_> = (0..2).map(|_| StdStream::connect(&setup.socket).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(50));
    let answer = setup.raw(b"");
    assert_eq!(error_code(&answer, "503"), ErrorCode::Busy);
    for stream in &mut stuck {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(read_all(stream), "");
    }
    std::thread::sleep(Duration::from_millis(50));
    block_on(setup.client().info()).unwrap();
}

#[test]
fn a_console_round_trip() {
    let setup = setup(Limits::default());
    setup.fake.hub.guest_output(b"login: ");
    block_on(async {
        let client = setup.client();
        let mut console = client.console("serial").await.unwrap();
        let sent = "root and more than the guest takes at once\n".repeat(1000);
        let (mut read, mut write) = tokio::io::split(&mut console);
        let expected = format!("login: {}", sent.to_ascii_uppercase());
        let mut got = vec![0; expected.len()];
        let (wrote, filled) = tokio::join!(write.write_all(sent.as_bytes()), read.read_exact(&mut got));
        wrote.unwrap();
        filled.unwrap();
        // More than the history, but this client was there all the time.
        assert!(got == expected.as_bytes(), "{}", String::from_utf8_lossy(&got));

        let error = client.console("hvc9").await.unwrap_err();
        assert_eq!(error.refusal().unwrap().code, ErrorCode::NotFound);
        assert!(matches!(client.console("a b").await, Err(ClientError::Protocol(_))));

        setup.fake.hub.guest_output(b"Power down.");
        let hub = setup.fake.hub.clone();
        tokio::task::spawn_blocking(move || hub.finish(Duration::from_secs(20))).await.unwrap();
        let mut rest = String::new();
        console.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "Power down.");
        let error = client.console("serial").await.map(drop).unwrap_err();
        assert_eq!(error.refusal().unwrap().code, ErrorCode::WrongState);
    });
}

#[test]
fn input_sent_along_with_the_upgrade_is_not_lost() {
    let setup = setup(Limits::default());
    let mut stream = StdStream::connect(&setup.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let head = b"GET /v1/console HTTP/1.1\r\nconnection: Upgrade\r\nupgrade: civic-console\r\n\r\nhello";
    stream.write_all(head).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    while !answer.ends_with("HELLO") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error}: {answer}"));
        answer.push(byte[0] as char);
    }
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
}

#[test]
fn metrics_tell_what_info_tells() {
    let setup = setup(Limits::default());
    setup.raw(b"GET /v1/nonsense HTTP/1.1\r\nconnection: close\r\n\r\n");
    let text = block_on(setup.client().metrics()).unwrap();
    for line in [
        "civic_vm_info{name=\"web\",version=\"0.1.0\"} 1",
        "civic_vm_state{state=\"created\"} 1",
        "civic_vm_state{state=\"running\"} 0",
        "civic_vm_boots_total 3",
        "civic_vm_run_seconds_total 1.5",
        "civic_vm_memory_bytes 1073741824",
        "civic_vm_balloon_bytes{part=\"target\"} 4096",
        "civic_vm_balloon_bytes{part=\"actual\"} 0",
        "civic_vcpu_exits_total{vcpu=\"0\",reason=\"hlt\"} 7",
        "civic_device_events_total{device=\"disk0\",kind=\"blk\",counter=\"read_bytes\"} 512",
        "civic_api_requests_total{route=\"other\",method=\"GET\",status=\"404\"} 1",
        "# EOF",
    ] {
        assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
    }
    assert!(text.contains("civic_process_resident_bytes{kind=\"anon\"} "), "{text}");
}

#[test]
fn stopping_answers_what_is_under_way() {
    let mut setup = setup(Limits::default());
    setup.fake.hangs.store(true, Ordering::Relaxed);
    let mut stream = StdStream::connect(&setup.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(b"POST /v1/kill HTTP/1.1\r\n\r\n").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let request = loop {
        if let Some(request) = setup.fake.silent.lock().unwrap().pop() {
            break request;
        }
        assert!(Instant::now() < deadline, "the command never came");
        std::thread::sleep(Duration::from_millis(1));
    };
    // An idle connection must not hold the stop up.
    let _idle = StdStream::connect(&setup.socket).unwrap();
    let server = setup.server.take().unwrap();
    let stopper = std::thread::spawn(move || server.stop());
    std::thread::sleep(Duration::from_millis(100));
    request.reply.send(Ok(Answer::Done)).unwrap();
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 204 "));
    stopper.join().unwrap();
    assert!(Instant::now() < deadline);
    assert!(matches!(block_on(setup.client().info()), Err(ClientError::NotRunning { .. })));
}

/// A save takes longer than any connection may last.
#[test]
fn a_balloon_tells_what_the_guest_says_now() {
    let setup = setup(Limits { statistics: Duration::from_millis(300), ..Limits::default() });
    let client = setup.client();
    // Nothing runs yet, so nobody is waited for: what is known is told.
    setup.fake.talks.store(false, Ordering::Relaxed);
    assert_eq!(block_on(client.balloon()).unwrap().reports, 0);
    block_on(client.start()).unwrap();
    // Nor is a guest that says nothing waited for for ever.
    let begun = Instant::now();
    assert_eq!(block_on(client.balloon()).unwrap().reports, 0);
    assert!(begun.elapsed() >= Duration::from_millis(300));
    setup.fake.talks.store(true, Ordering::Relaxed);
    for told in 1..3 {
        let balloon = block_on(client.balloon()).unwrap();
        assert_eq!((balloon.reports, balloon.statistics["free_bytes"]), (told, told));
    }
}

#[test]
fn a_balloon_is_told_its_target() {
    let setup = setup(Limits::default());
    let client = setup.client();
    let set = |target_bytes| block_on(client.set_balloon(&BalloonConfig { target_bytes }));
    set(1 << 20).unwrap();
    assert_eq!(block_on(client.balloon()).unwrap().target_bytes, 1 << 20);
    assert_eq!(block_on(client.info()).unwrap().balloon, setup.fake.info().balloon);
    for wrong in [4095, 1 << 30] {
        let error = set(wrong).unwrap_err();
        assert_eq!(error.refusal().unwrap().code, ErrorCode::InvalidConfig, "{error}");
    }
    for body in ["", "{\"target\":1}", "4096", "{\"target_bytes\":-1}", "{"] {
        let head = "PUT /v1/balloon HTTP/1.1\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length:";
        let answer = setup.raw(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes());
        assert_eq!(error_code(&answer, "400"), ErrorCode::InvalidRequest, "{body}");
    }
    assert_eq!(block_on(client.balloon()).unwrap().target_bytes, 1 << 20);

    *setup.fake.balloon.lock().unwrap() = None;
    for error in [set(0).unwrap_err(), block_on(client.balloon()).unwrap_err()] {
        assert_eq!(error.refusal(), Some(&no_balloon()));
    }
}

#[test]
fn a_save_is_answered_when_it_is_done() {
    let connection = Duration::from_millis(50);
    let setup = setup(Limits { connection, ..Limits::default() });
    setup.fake.hangs.store(true, Ordering::Relaxed);
    let asked = SaveRequest { directory: "/saved/web".into(), then: AfterSave::Resume };
    let (client, request) = (setup.client(), asked.clone());
    let waiting = std::thread::spawn(move || block_on(client.save(&request)));
    let deadline = Instant::now() + Duration::from_secs(20);
    let request = loop {
        if let Some(request) = setup.fake.silent.lock().unwrap().pop() {
            break request;
        }
        assert!(Instant::now() < deadline, "the command never came");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(request.command, Command::Save(asked));
    // Beyond the connection's time and its grace.
    std::thread::sleep(connection + GRACE + Duration::from_millis(200));
    assert!(!waiting.is_finished());
    let directory = "/saved/web".into();
    let report = SaveReport { directory, memory_bytes_written: 5, state_bytes: 6, pause_ms: 7, total_ms: 8 };
    request.reply.send(Ok(Answer::Saved(report.clone()))).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), report);
}

#[test]
fn a_save_without_a_directory_is_refused() {
    let setup = setup(Limits::default());
    for body in ["", "{}", "[]", r#"{"directory":"/x","then":"fly"}"#, r#"{"directory":"/x","color":1}"#] {
        let head = "POST /v1/save HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n";
        let answer = setup.raw(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body}: {answer}");
        assert!(answer.contains("invalid_request"), "{body}: {answer}");
    }
}

/// Every documented path answers with its documented method, and the paths are those the client uses.
#[test]
fn the_document_and_the_routes_agree() {
    use civic_api::routes::*;
    let setup = setup(Limits::default());
    let document = serde_json::to_value(openapi()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    let mut known: Vec<&str> =
        vec![INFO, START, PAUSE, RESUME, STOP, KILL, SAVE, FORK, BALLOON, METRICS, OPENAPI, CONSOLE, DEVICE];
    known.extend([DISKS, NETS, CONSOLES, GUEST, PROGRAMS, PROGRAM]);
    known.sort_unstable();
    assert_eq!(paths.keys().map(String::as_str).collect::<Vec<_>>(), known);
    for (path, item) in paths {
        for method in ["get", "post", "put", "delete"] {
            let request = format!("{} {path} HTTP/1.1\r\nconnection: close\r\n\r\n", method.to_uppercase());
            let answer = setup.raw(request.as_bytes());
            let taken = !answer.starts_with("HTTP/1.1 405 ");
            assert_eq!(taken, item.get(method).is_some(), "{method} {path}: {answer}");
            let status = &answer["HTTP/1.1 ".len()..][..3];
            if taken {
                assert!(!item[method]["responses"][status].is_null(), "{method} {path} gives {status}, not documented");
            }
        }
    }
    let served: serde_json::Value = serde_json::from_str(&block_on(setup.client().openapi()).unwrap()).unwrap();
    assert_eq!(served, document);
}

/// The committed copy is what readers and generators see. `CIVIC_BLESS=1 cargo test -p civic-vmm openapi` writes it.
#[test]
fn the_committed_openapi_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/openapi.json");
    let current = openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("CIVIC_BLESS").is_some() {
        std::fs::write(path, &current).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == current,
        "api/openapi.json is not what the routes say: CIVIC_BLESS=1 cargo test -p civic-vmm openapi, and commit it"
    );
}
