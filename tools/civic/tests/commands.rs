//! The command as scripts see it, with shell scripts in place of the monitor. Real VMs are in the `tests` crate.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use civic_api::VmConfig;
use civic_api::launch::LaunchRequest;
use nix::fcntl::{Flock, FlockArg};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A monitor that runs `script`; its directory is `$dir`.
    fn monitor(&self, script: &str) {
        let path = self.path("vmm");
        fs::write(&path, format!("#!/bin/sh\ndir=$4\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_civic"));
        command.args(line.split(' ').filter(|arg| !arg.is_empty()));
        command.env("CIVIC_RUN_DIR", self.path("run")).env("CIVIC_VMM", self.path("vmm")).stdin(Stdio::null());
        command
    }

    fn civic(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// What `line` prints, which must succeed.
    fn prints(&self, line: &str) -> String {
        let output = self.civic(line);
        assert!(output.status.success(), "civic {line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The lines on stderr of `line`, which must fail with 125.
    fn complains(&self, line: &str) -> Vec<String> {
        let output = self.civic(line);
        assert_eq!(output.status.code(), Some(125), "civic {line}: {output:?}");
        String::from_utf8(output.stderr).unwrap().lines().map(str::to_owned).collect()
    }
}

/// The API of a VM called `web`, as far as a test needs it. Ends with the test's process.
struct Api {
    /// `METHOD PATH BODY` of what was asked, in order.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Api {
    /// Answers with what `answer` says to `METHOD PATH`: a status and a body.
    fn new(place: &Place, mut answer: impl FnMut(&str) -> (u16, String) + Send + 'static) -> Self {
        fs::create_dir_all(place.path("run/web")).unwrap();
        let listener = UnixListener::bind(place.path("run/web/api.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let (mut line, mut length) = (String::new(), 0);
                stream.read_line(&mut line).unwrap();
                let route = line.rsplit_once(' ').map(|(route, _)| route.to_owned()).unwrap();
                while line.trim() != "" {
                    line.clear();
                    stream.read_line(&mut line).unwrap();
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                let (status, answered) = answer(&route);
                record.lock().unwrap().push(format!("{route} {}", String::from_utf8(body).unwrap()));
                let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n", answered.len());
                // A client that has gone, as an interrupted one has, is no concern of the server's.
                let _ = stream.get_mut().write_all((head + &answered).as_bytes());
            }
        });
        Self { asked }
    }

    /// What was asked since the last time, but for the VM's state.
    fn asked(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().unwrap());
        asked.retain(|line| !line.starts_with("GET /v1/info"));
        asked
    }
}

/// What a monitor with this process id tells.
fn info(pid: u32) -> String {
    format!(
        r#"{{"name":"web","state":"running","pid":{pid},"version":"1","cpus":1,"memory_bytes":33554432,"kernel":"/k",
        "boots":1,"run_ms":1,"devices":[],"vcpus":[],"consoles":[]}}"#
    )
}

const RUN: &str = "run --name web --kernel /k --detach";

#[test]
fn what_the_monitor_says_is_passed_on() {
    let place = Place::new();
    place.monitor(r#"echo '{"error":{"code":"image_locked","message":"b is in use","hint":"stop its user"}}'; exit 1"#);
    assert_eq!(place.complains(RUN), ["civic: b is in use", "stop its user"]);
    place.monitor("echo 'all is lost' >&2; exit 3");
    let lines = place.complains(RUN);
    assert_eq!(lines[..2], ["civic: the monitor failed (exit status: 3)", "its last words: all is lost"]);
    assert!(lines[2].starts_with("see /") && lines[2].ends_with("run/web/vmm.log"), "{lines:?}");
    // It claims to be ready, but nobody answers.
    place.monitor(r#"echo '{"ready":true,"pid":1}'; sleep 60"#);
    assert!(place.complains(RUN)[0].contains("web"));
}

#[test]
fn the_monitor_gets_the_configuration_and_a_closed_directory() {
    let place = Place::new();
    place.monitor(r#"cat "$2" >"$dir/config"; echo '{"error":{"code":"internal","message":"x"}}'"#);
    place.complains(&format!("{RUN} --memory 1G --cpus 2 --disk path=root.img,ro --net tap=tap0"));
    let config: VmConfig = serde_json::from_slice(&fs::read(place.path("run/web/config")).unwrap()).unwrap();
    config.validate().unwrap();
    assert_eq!((config.memory_bytes, config.cpus), (1 << 30, 2));
    assert!(config.disks[0].path.is_absolute() && config.disks[0].read_only);
    assert_eq!(fs::metadata(place.path("run/web")).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn the_monitor_is_told_what_to_restore() {
    let place = Place::new();
    place.monitor(r#"cat "$2" >"$dir/config"; echo '{"error":{"code":"state_invalid","message":"cut short"}}'"#);
    let line = "run --name web --restore saved --disk id=data,path=data.img --net id=lan,tap=tap7 --detach";
    assert_eq!(place.complains(line)[0], "civic: cut short");
    let config = fs::read_to_string(place.path("run/web/config")).unwrap();
    let LaunchRequest::Restore(config) = LaunchRequest::from_json(&config).unwrap() else { panic!("{config}") };
    assert!(config.restore.is_absolute() && config.restore.ends_with("saved"));
    assert!(config.disks[0].path.is_absolute());
    assert_eq!((config.disks[0].id.as_str(), config.nets[0].tap.as_str()), ("data", "tap7"));
    let lines = place.complains("run --name web --restore saved --memory 1G");
    assert_eq!(lines[0], "civic: --memory: a restored VM has what it was saved with");
}

#[test]
fn a_balloon_is_set_and_shown() {
    let place = Place::new();
    let api = Api::new(&place, |route| match route {
        "PUT /v1/balloon" => (204, String::new()),
        _ => (200, r#"{"target_bytes":1073741824,"actual_bytes":4096,"reports":1,"from_the_future":1}"#.into()),
    });
    assert_eq!(place.prints("balloon web 1G"), "");
    assert_eq!(api.asked(), [r#"PUT /v1/balloon {"target_bytes":1073741824}"#]);
    assert!(place.prints("balloon web").starts_with("target: 1G\nactual: 4K\n"));
    assert_eq!(api.asked(), ["GET /v1/balloon "]);
    let shown: serde_json::Value = serde_json::from_str(&place.prints("balloon web 1G --json")).unwrap();
    assert_eq!(shown["actual_bytes"], 4096);
    assert!(place.complains("balloon web 1X")[0].contains("1X"));
}

#[test]
fn what_the_monitor_refuses_is_told() {
    let place = Place::new();
    let error = r#"{"code":"not_found","message":"the VM has no balloon","hint":"start it with one"}"#;
    Api::new(&place, move |_| (404, error.into()));
    for command in ["balloon web", "balloon web 1M", "save web /s"] {
        assert_eq!(place.complains(command), ["civic: the VM has no balloon", "start it with one"], "{command}");
    }
}

const SAVED: &str = r#"{"directory":"/s","memory_bytes_written":5,"state_bytes":6,"pause_ms":7,"total_ms":8}"#;

/// The process that is said to be the monitor; it ends when told.
struct Ending(Child);

impl Ending {
    fn new() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }

    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn a_saved_vm_is_gone_when_the_command_returns() {
    let place = Place::new();
    let process = Arc::new(Mutex::new(Ending::new()));
    let monitor = Arc::clone(&process);
    let api = Api::new(&place, move |route| {
        if route == "POST /v1/save" {
            // As the monitor does: it answers, and ends some time after.
            let monitor = Arc::clone(&monitor);
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(300));
                monitor.lock().unwrap().end();
            });
            return (200, SAVED.into());
        }
        (200, info(monitor.lock().unwrap().0.id()))
    });
    assert_eq!(place.prints("save web saved"), "", "a pipe is told nothing");
    assert!(process.lock().unwrap().0.try_wait().unwrap().is_some(), "the command came back too early");
    let here = std::env::current_dir().unwrap();
    let asked = format!(r#"POST /v1/save {{"directory":"{}","then":"stop"}}"#, here.join("saved").display());
    assert_eq!(api.asked(), [asked]);
}

#[test]
fn a_saved_vm_may_go_on() {
    let place = Place::new();
    let process = Ending::new();
    let pid = process.0.id();
    let api = Api::new(&place, move |route| (200, if route == "POST /v1/save" { SAVED.into() } else { info(pid) }));
    let report: serde_json::Value = serde_json::from_str(&place.prints("save web /s --keep-running --json")).unwrap();
    assert_eq!(report, serde_json::from_str::<serde_json::Value>(SAVED).unwrap());
    assert_eq!(api.asked(), [r#"POST /v1/save {"directory":"/s","then":"resume"}"#]);
    place.prints("save web /s --keep-paused");
    assert_eq!(api.asked(), [r#"POST /v1/save {"directory":"/s","then":"pause"}"#]);
}

#[test]
fn an_interrupted_save_says_that_it_goes_on() {
    let place = Place::new();
    let process = Ending::new();
    let pid = process.0.id();
    let (saving, begun) = std::sync::mpsc::channel();
    // Dropped by the test's end only: the answer does not come before.
    let (_hold, held) = std::sync::mpsc::channel::<()>();
    Api::new(&place, move |route| {
        if route == "POST /v1/save" {
            saving.send(()).unwrap();
            let _ = held.recv();
        }
        (200, info(pid))
    });
    let civic = place.command("save web /s").stderr(Stdio::piped()).spawn().unwrap();
    begun.recv_timeout(std::time::Duration::from_secs(20)).unwrap();
    let id = nix::unistd::Pid::from_raw(civic.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    let output = civic.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("web is being saved all the same") && told.contains("'civic info web'"), "{told}");
}

#[test]
fn a_missing_monitor_is_named() {
    let place = Place::new();
    let lines = place.complains(RUN);
    assert!(lines[0].contains("CIVIC_VMM") && lines[1].contains("CIVIC_VMM"), "{lines:?}");
}

#[test]
fn a_name_in_use_is_refused_and_its_log_kept() {
    let place = Place::new();
    place.monitor("exit 1");
    fs::create_dir_all(place.path("run/web")).unwrap();
    fs::write(place.path("run/web/vmm.log"), "words").unwrap();
    let file = File::create(place.path("run/web/lock")).unwrap();
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error).unwrap();
    assert_eq!(place.complains(RUN)[0], "civic: a VM named 'web' is running");
    assert_eq!(fs::read_to_string(place.path("run/web/vmm.log")).unwrap(), "words");
    assert!(place.prints("list").contains("web   unresponsive"), "{}", place.prints("list"));
    drop(lock);
    assert!(place.complains(RUN)[0].contains("the monitor failed"));
}

#[test]
fn dead_vms_are_listed_as_such() {
    let place = Place::new();
    assert_eq!(place.prints("list --json"), "[]\n");
    fs::create_dir_all(place.path("run/web")).unwrap();
    fs::write(place.path("run/web/vmm.log"), "").unwrap();
    let list: serde_json::Value = serde_json::from_str(&place.prints("list --json")).unwrap();
    assert_eq!((&list[0]["name"], &list[0]["state"]), (&"web".into(), &"dead".into()));
    for command in [
        "info web",
        "console web",
        "pause web",
        "resume web",
        "stop web",
        "kill web",
        "metrics web",
        "save web /s",
        "balloon web",
    ] {
        let lines = place.complains(command);
        assert_eq!(lines[0], "civic: the VM 'web' has ended badly", "{command}");
        assert!(lines[1].contains("vmm.log"), "{command}: {lines:?}");
        assert!(place.complains(&command.replace("web", "db"))[0].contains("there is no VM named 'db'"));
    }
}

#[test]
fn an_interrupted_start_ends_the_monitor() {
    let place = Place::new();
    place.monitor(r#"echo $$ >"$dir/pid"; exec sleep 60"#);
    let mut civic = place.command(RUN).stderr(Stdio::null()).spawn().unwrap();
    let pid_file = place.path("run/web/pid");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let pid = loop {
        match fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok()) {
            Some(pid) => break pid,
            None => assert!(std::time::Instant::now() < deadline, "the monitor never started"),
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let civic_pid = nix::unistd::Pid::from_raw(civic.id() as i32);
    nix::sys::signal::kill(civic_pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(civic.wait().unwrap().code(), Some(125));
    let gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    assert_eq!(gone, Err(nix::errno::Errno::ESRCH));
}

#[test]
fn the_doctors_verdict_is_the_exit_status() {
    let place = Place::new();
    let report = |status: &str, can_run: bool| {
        let check = format!(r#"{{"name":"kvm","status":"{status}","found":"f","why":"w","fix":"do it"}}"#);
        place.monitor(&format!("echo '{{\"version\":\"1\",\"can_run\":{can_run},\"checks\":[{check}]}}'"));
    };
    report("warn", true);
    assert_eq!(place.prints("doctor"), "STATUS  CHECK  FOUND\nwarn    kvm    f\n\nkvm: w\n  do it\n");
    assert!(place.prints("doctor --json").contains("\"can_run\": true"));
    report("fail", false);
    assert_eq!(place.complains("doctor")[0], "civic: VMs cannot run on this host (kvm)");
    place.monitor("exit 1");
    assert!(place.complains("doctor")[1].contains("CIVIC_VMM"));
}

#[test]
fn help_pages_and_completions() {
    let place = Place::new();
    assert!(place.prints("man").contains(".TH civic 1"));
    let help = place.prints("--help");
    for command in
        ["run", "list", "info", "console", "pause", "resume", "stop", "save", "balloon", "kill", "doctor", "metrics"]
    {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
        assert!(place.prints(&format!("man {command}")).contains(&format!(".TH civic-{command} 1")));
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = place.prints(&format!("completion {shell}"));
        assert!(script.contains("any-kvm") && script.contains("doctor"), "{shell}");
    }
    assert!(place.complains("man nonsense")[1].contains("civic help"));
    for misuse in ["", "nonsense", "run", "info ../x", "stop web --timeout soon"] {
        place.complains(misuse);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_complaint() {
    let place = Place::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = place.command("completion bash").stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}
