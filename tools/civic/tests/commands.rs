//! The command as scripts see it, with shell scripts in place of the monitor. Real VMs are in the `tests` crate.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use civic_api::VmConfig;
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
    for command in ["info web", "console web", "pause web", "resume web", "stop web", "kill web", "metrics web"] {
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
    for command in ["run", "list", "info", "console", "pause", "resume", "stop", "kill", "doctor", "metrics"] {
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
