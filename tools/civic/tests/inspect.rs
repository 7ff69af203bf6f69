//! `civic inspect` as scripts see it, with shell scripts in place of monitors and programs that are told by this test. Real forks, and real
//! programs in them, are in the `tests` crate.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use civic_api::{ForkReport, ForkRequest, ForkStages, ForkedVm, InjectStages, ProgramRequest, StartedProgram};
use civic_loader::{Exit, FromGuest, Step, ToGuest, VERSION, split};
use nix::libc::ENOENT;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What takes longer has failed.
const LONG: Duration = Duration::from_secs(60);

/// A source called `web`, which others are forked from.
struct Web {
    dir: tempfile::TempDir,
    /// Programs that were started, with the forks they were started in.
    started: Arc<Mutex<Vec<(String, ProgramRequest)>>>,
}

impl Web {
    fn new() -> Self {
        let this = Self { dir: tempfile::tempdir().unwrap(), started: Arc::default() };
        let script = "#!/bin/sh\necho $$ > $4/pid\necho '{\"ready\":true,\"pid\":'$$'}'\nexec sleep 1000\n";
        fs::write(this.path("vmm"), script).unwrap();
        fs::set_permissions(this.path("vmm"), fs::Permissions::from_mode(0o755)).unwrap();
        let (run, started) = (this.path("run"), Arc::clone(&this.started));
        let info = |_: &Path| {
            r#"{"name":"web","state":"running","pid":1,"version":"1","cpus":1,"memory_bytes":33554432,"kernel":"/k","boots":1,"run_ms":1,
            "devices":[],"vcpus":[],"consoles":[],"family":{"page_server":true}}"#
                .to_owned()
        };
        serve(&this.path("run/web"), move |route, body, _| {
            Some(match route {
                "POST /v1/fork" => {
                    let request: ForkRequest = serde_json::from_slice(body).unwrap();
                    let child = |name: &String| {
                        fork(&run.join(name), &started);
                        ForkedVm { name: name.clone(), pid: 1, running_us: 20 }
                    };
                    let children = request.children.iter().map(child).collect();
                    let stages = ForkStages { pause_us: 1500, ..ForkStages::default() };
                    serde_json::to_string(&ForkReport { generation: 1, children, failed: vec![], stages }).unwrap()
                }
                _ => info(&run),
            })
        });
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, options: &str, program: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_civic"));
        command.args(["inspect", "web"]).args(options.split_whitespace()).arg("--").args(program);
        command.env("CIVIC_RUN_DIR", self.path("run")).env("CIVIC_VMM", self.path("vmm"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Exit status, output and error output; nothing may be left.
    fn inspect(&self, options: &str, program: &[&str]) -> (i32, String, String) {
        let told = told(&self.command(options, program).output().unwrap());
        self.nothing_is_left();
        told
    }

    fn nothing_is_left(&self) {
        let entries = fs::read_dir(self.path("run")).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(entries.collect::<Vec<_>>(), ["web"]);
    }
}

fn told(out: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr))
}

/// Answers requests at a VM's socket, as `answer` says; it may take the connection over instead.
fn serve(dir: &Path, answer: impl Fn(&str, &[u8], &mut UnixStream) -> Option<String> + Send + Sync + 'static) {
    fs::create_dir_all(dir).unwrap();
    let listener = UnixListener::bind(dir.join("api.sock")).unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), Arc::clone(&answer));
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut line, mut length) = (String::new(), 0);
                // One that has gone already asks nothing.
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let route = line.rsplit_once(' ').map(|(route, _)| route.to_owned()).unwrap();
                while line.trim() != "" {
                    line.clear();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                if let Some(answered) = answer(&route, &body, &mut stream) {
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answered.len());
                    let _ = stream.write_all((head + &answered).as_bytes());
                }
            });
        }
    });
}

/// The API of a fork whose monitor waits in `dir`.
fn fork(dir: &Path, started: &Arc<Mutex<Vec<(String, ProgramRequest)>>>) {
    let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
    let pid = fs::read_to_string(dir.join("pid")).unwrap().trim().parse().unwrap();
    let (started, program) = (Arc::clone(started), Mutex::new(None));
    serve(dir, move |route, body, stream| match route {
        "POST /v1/programs" => {
            let request: ProgramRequest = serde_json::from_slice(body).unwrap();
            started.lock().unwrap().push((name.clone(), request.clone()));
            *program.lock().unwrap() = Some(request.argv);
            Some(serde_json::to_string(&StartedProgram { id: 1, stages: InjectStages::default() }).unwrap())
        }
        "GET /v1/programs/1" => {
            let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: civic-program\r\n\r\n";
            stream.write_all(head.as_bytes()).unwrap();
            let argv = program.lock().unwrap().take().unwrap();
            // The command may have gone.
            let _ = run(&argv, stream, Pid::from_raw(pid));
            None
        }
        "POST /v1/kill" => {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            Some(String::new())
        }
        route => panic!("{route}"),
    });
}

/// Does what a program would.
fn run(argv: &[String], stream: &mut UnixStream, monitor: Pid) -> std::io::Result<()> {
    let mut from_host = stream.try_clone()?;
    let mut say = |frame: FromGuest<'_>| {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).unwrap();
        stream.write_all(&bytes)
    };
    say(FromGuest::Hello { version: VERSION, credit: 1 << 16 })?;
    let line = format!("{}\n", argv[1..].join(" "));
    match argv[0].as_str() {
        "say" => {
            say(FromGuest::Stdout(line.as_bytes()))?;
            say(FromGuest::Stderr(b"err"))?;
            say(FromGuest::Warning("it was said"))?;
            say(FromGuest::Exited(Exit::Code(7)))
        }
        "end" => say(FromGuest::Exited(Exit::Code(argv[1].parse().unwrap()))),
        "none" => say(FromGuest::Failed { step: Step::Exec, errno: ENOENT, text: "there is no program none" }),
        "lost" => {
            kill(monitor, Signal::SIGKILL)?;
            Ok(())
        }
        // Until it gets a signal of these.
        "until" => {
            say(FromGuest::Stdout(b"begun\n"))?;
            let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
            loop {
                while let Some((frame, len)) = split(&bytes).unwrap() {
                    if let ToGuest::Signal(signal) = ToGuest::decode(frame).unwrap()
                        && argv[1..].contains(&signal.to_string())
                    {
                        return say(FromGuest::Exited(Exit::Signal { signal, core: false }));
                    }
                    bytes.drain(..len);
                }
                match from_host.read(&mut chunk)? {
                    0 => return Ok(()),
                    count => bytes.extend(&chunk[..count]),
                }
            }
        }
        what => panic!("{what}"),
    }
}

#[test]
fn what_the_program_says_is_passed_on() {
    let web = Web::new();
    let (status, out, err) = web.inspect("", &["say", "a b", "{n}"]);
    assert_eq!((status, out.as_str(), err.as_str()), (7, "a b {n}\n", "errcivic: it was said\n"));
    let (status, _, err) = web.inspect("-v", &["end", "0"]);
    let parts = ["web-inspect-1: status 0; web stood still for 1.5 ms; its fork ran after ", "all was gone after "];
    assert!(status == 0 && parts.iter().all(|part| err.contains(part)), "{err}");
    let (status, _, err) = web.inspect("", &["none"]);
    assert!(
        status == 127 && err.starts_with("civic: there is no program none") && err.contains("--store FILE"),
        "{err}"
    );
    let (name, request) = web.started.lock().unwrap()[0].clone();
    assert!(name == "web-inspect-1" && request.tidy_up, "{request:?}");
}

#[test]
fn a_fork_that_is_lost_is_told() {
    let web = Web::new();
    let (status, _, err) = web.inspect("", &["lost"]);
    assert!(status == 125 && err.starts_with("civic: web-inspect-1 has ended before its program: "), "{err}");
    assert_eq!(err.lines().count(), 2, "{err}");
}

#[test]
fn several_have_their_numbers() {
    let web = Web::new();
    let (status, out, err) = web.inspect("--count 3", &["say", "child {n}"]);
    let mut lines: Vec<_> = out.lines().collect();
    lines.sort_unstable();
    assert_eq!((status, lines), (7, vec!["1: child 1", "2: child 2", "3: child 3"]), "{err}");
    let mut lines: Vec<_> = err.lines().collect();
    lines.sort_unstable();
    let remarks = (1..=3).map(|n| format!("civic: {n}: it was said"));
    assert_eq!(lines, (1..=3).map(|n| format!("{n}: err")).chain(remarks).collect::<Vec<_>>());
    assert_eq!(web.inspect("--count 3", &["end", "{n}"]).0, 1);
}

#[test]
fn rounds_are_counted_and_do_not_pile_up() {
    let web = Web::new();
    let (status, out, err) = web.inspect("--every 1ms --rounds 3", &["say", "round"]);
    assert_eq!((status, out.as_str()), (7, "round\nround\nround\n"), "{err}");
    assert!((1..=3).all(|n| err.contains(&format!("civic: round {n}: status 7\n"))), "{err}");
    let begun = Instant::now();
    let (status, out, _) = web.inspect("--every 700ms --rounds 3 --json", &["end", "5"]);
    assert!(status == 5 && begun.elapsed() >= Duration::from_millis(1400), "{:?}", begun.elapsed());
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line["round"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(lines.iter().all(|line| line["status"] == 5 && line["error"].is_null()), "{out}");
    // Without input, and each in a fork of its own.
    assert!(web.started.lock().unwrap().iter().all(|(name, _)| name == "web-inspect-1"));
}

#[test]
fn a_round_is_told_in_json() {
    let web = Web::new();
    let (status, out, err) = web.inspect("--json --count 2", &["say", "{n}"]);
    assert_eq!((status, err.as_str()), (7, ""));
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (line, n) in lines.iter().zip(1..) {
        assert_eq!((&line["child"], &line["name"]), (&n.into(), &format!("web-inspect-{n}").into()));
        assert_eq!(
            line["stdout"],
            serde_json::json!({ "text": format!("{n}\n"), "encoding": "utf-8", "bytes": 2, "cut": false })
        );
        assert_eq!((&line["stderr"]["text"], &line["remarks"]), (&"err".into(), &serde_json::json!(["it was said"])));
        assert_eq!((&line["pause_us"], &line["kept"]), (&1500.into(), &false.into()));
        let times = ["waiting_us", "alive_us", "started_us", "first_output_us", "ended_us", "discarded_us"];
        let times: Vec<_> = times.iter().map(|name| line["stages"][name].as_u64().unwrap()).collect();
        assert!(times.is_sorted(), "{line}");
    }
    assert_eq!(lines.len(), 2);
}

#[test]
fn a_fork_that_is_kept_is_named_and_lives() {
    let web = Web::new();
    let (status, _, err) = told(&web.command("--keep", &["end", "3"]).output().unwrap());
    assert!(status == 3 && err.contains("web-inspect-1 is kept: 'civic exec web-inspect-1 -- PROGRAM'"), "{err}");
    let pid: i32 = fs::read_to_string(web.path("run/web-inspect-1/pid")).unwrap().trim().parse().unwrap();
    assert!(kill(Pid::from_raw(pid), None).is_ok());
    assert!(!web.started.lock().unwrap()[0].1.tidy_up);
    // The next one gets another name.
    let (status, _, err) = told(&web.command("-v", &["end", "0"]).output().unwrap());
    assert!(status == 0 && err.contains("web-inspect-2: status 0"), "{err}");
    assert!(!web.path("run/web-inspect-2").exists());
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Begins a program that says so, sends these signals one after the other, and waits for the end.
fn signalled(web: &Web, options: &str, program: &[&str], signals: &[Signal]) -> (Option<i32>, Duration) {
    let mut running: Child = web.command(options, program).spawn().unwrap();
    let mut stdout = BufReader::new(running.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.ends_with("begun\n"), "{line}");
    let begun = Instant::now();
    for signal in signals {
        kill(Pid::from_raw(running.id() as i32), *signal).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    while running.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < LONG, "it does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    web.nothing_is_left();
    (running.wait().unwrap().code(), begun.elapsed())
}

#[test]
fn a_signal_is_given_to_the_program_and_ends_the_inspection() {
    let web = Web::new();
    for (signal, number) in [(Signal::SIGINT, "2"), (Signal::SIGTERM, "15"), (Signal::SIGHUP, "1")] {
        let (status, _) = signalled(&web, "", &["until", number], &[signal]);
        assert_eq!(status, Some(128 + signal as i32));
    }
    let (status, _) = signalled(&web, "--count 2", &["until", "2"], &[Signal::SIGINT]);
    assert_eq!(status, Some(130));
    // One that does not heed it is killed; a second one does not wait for that.
    let (status, took) = signalled(&web, "", &["until", "9"], &[Signal::SIGINT]);
    assert!(status == Some(130) && took >= Duration::from_secs(5), "{status:?}, {took:?}");
    let (status, took) = signalled(&web, "", &["until", "9"], &[Signal::SIGTERM, Signal::SIGINT]);
    assert!(status == Some(143) && took < Duration::from_secs(5), "{status:?}, {took:?}");
}

#[test]
fn time_and_readers_come_to_an_end() {
    let web = Web::new();
    let (status, _, _) = web.inspect("--timeout 1", &["until", "15"]);
    assert_eq!(status, 124);
    let (_, out, _) = web.inspect("--timeout 1 --json", &["until", "15"]);
    let line: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&line["timed_out"], &line["status"], &line["signal"]), (&true.into(), &124.into(), &15.into()));
    // Between two rounds.
    let mut running = web.command("--every 1h --json", &["end", "0"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(running.stdout.take().unwrap()).read_line(&mut line).unwrap();
    kill(Pid::from_raw(running.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(running.wait().unwrap().code(), Some(130));
    web.nothing_is_left();
}
