//! `civic inspect` of guests in which no program can be started: whatever goes wrong, and whoever dies, nothing is left of it.
//!
//! When somebody dies is chosen at random: some of the stages last for microseconds.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use civic_api::Family;
use civic_tests::bare::vm::{Setup, Vm, binary};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::pausing::{LINE_LEN, hammer};

/// How long a command may take that is told to end: it asks a monitor that does not answer, and then kills it.
const END: Duration = Duration::from_secs(20);
/// Rounds of what is done at random times.
const ROUNDS: u32 = 12;

/// A source, and what there is of it.
struct Source {
    vm: Vm,
    descriptors: usize,
}

impl Source {
    fn new() -> Self {
        Self::of(Setup::new(&hammer()))
    }

    fn of(setup: Setup) -> Self {
        let vm = setup.cpus(2).boot();
        vm.until("output", |vm| vm.printed() > 20 * LINE_LEN);
        // The first fork leaves what all others use too.
        let mut this = Self { vm, descriptors: usize::MAX };
        this.inspect(&[]);
        this.vm.until("the fork to be forgotten", |vm| vm.info().family == Family::default());
        this.descriptors = descriptors(this.vm.pid());
        this
    }

    fn run_dir(&self) -> PathBuf {
        self.vm.dir().parent().unwrap().to_owned()
    }

    fn command(&self, source: &str, options: &[&str]) -> Command {
        let mut command = Command::new(binary("civic"));
        command.arg("--run-dir").arg(self.run_dir()).args(["inspect", source]).args(options).args(["--", "/bin/true"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn inspect(&self, options: &[&str]) -> Output {
        self.command("bare", options).output().unwrap()
    }

    /// Has it refused: what it says.
    fn complains(&self, source: &str, options: &[&str]) -> String {
        let out = self.command(source, options).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(125), "{options:?}: {said}");
        assert!(said.lines().count() >= 2, "{options:?}: nothing is said of what to do: {said}");
        self.nothing_is_left();
        said
    }

    /// Those of our directory that run, but for the source's own guardian where it is jailed.
    fn processes(&self) -> BTreeSet<u32> {
        let ours = self.run_dir().display().to_string();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let runs =
            |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains(&ours));
        pids.filter(|pid| runs(pid) && jailed_by(*pid) != Some(self.vm.pid())).collect()
    }

    /// The page server, if it runs.
    fn page_server(&self) -> Option<u32> {
        let found = self.processes().into_iter().find(|pid| serves_pages(*pid))?;
        // In a jail its own command line names nothing of the host.
        if program(found) == "civic-jailer" { jailed_by(found) } else { Some(found) }
    }

    fn entries(&self) -> Vec<String> {
        fs::read_dir(self.run_dir()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn nothing_is_left(&self) {
        // The command has ended: its children and their directories are gone. The page server goes by itself.
        assert_eq!(self.entries(), ["bare"]);
        self.vm.until("its forks to be forgotten", |vm| vm.info().family == Family::default());
        self.vm.until("processes to end", |vm| self.processes() == BTreeSet::from([vm.pid()]));
        self.vm.until("descriptors to be closed", |vm| descriptors(vm.pid()) <= self.descriptors);
        self.goes_on();
    }

    /// The same where a page server may have come for which there is nobody: it waits for a minute.
    fn nothing_but_a_page_server_is_left(&self) {
        self.vm.until("processes to end", |vm| {
            self.processes().into_iter().filter(|pid| !serves_pages(*pid)).collect::<Vec<_>>() == [vm.pid()]
        });
        self.vm.until("its forks to be forgotten", |vm| {
            let Family { children, waiting, .. } = vm.info().family;
            children.is_empty() && waiting.is_empty()
        });
        self.goes_on();
    }

    fn goes_on(&self) {
        let before = self.vm.printed();
        self.vm.until("the source to go on", |vm| vm.printed() > before + LINE_LEN);
    }

    /// The monitor of this name, when it is there.
    fn monitor(&self, name: &str) -> Pid {
        let dir = format!("{}/{name}", self.run_dir().display());
        let deadline = Instant::now() + END;
        loop {
            let found = self.processes().into_iter().filter(|pid| program(*pid) != "civic-jailer").find(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                // Not the command, which has none of it among its arguments.
                line.split(|byte| *byte == 0).any(|word| word == dir.as_bytes())
            });
            if let Some(pid) = found {
                return Pid::from_raw(pid as i32);
            }
            assert!(Instant::now() < deadline, "no monitor {name}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The name of a process; empty if there is none.
fn program(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Whom a process guards, if it is a jail's guardian.
fn jailed_by(pid: u32) -> Option<u32> {
    let guards = program(pid) == "civic-jailer";
    let children = guards.then(|| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()).flatten()?;
    children.split_whitespace().next()?.parse().ok()
}

/// Whether it is a page server, or the guardian of one.
fn serves_pages(pid: u32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let guards = || program(pid) == "civic-jailer" && line.split(|byte| *byte == 0).any(|word| word == b"pager");
    program(pid) == "civic-pager" || guards()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Its exit status, and what it said; it must end in time.
fn end(mut command: Child) -> (Option<i32>, String) {
    let deadline = Instant::now() + END;
    while command.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the command does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    let out = command.wait_with_output().unwrap();
    (out.status.code(), String::from_utf8(out.stderr).unwrap())
}

fn send(command: &Child, signal: Signal) {
    // It may have ended by itself; it is ours until it is waited for.
    let _ = kill(Pid::from_raw(command.id() as i32), signal);
}

#[test]
fn where_no_program_can_be_started_it_is_said_and_nothing_is_left() {
    let source = Source::new();
    let said = source.complains("bare", &[]);
    assert!(said.contains("kernel"), "{said}");
    let said = source.complains("bare", &["--keep", "-v"]);
    assert!(
        said.contains("bare-inspect-1") && said.contains("bare stood still for") && !said.contains("is kept"),
        "{said}"
    );
    let said = source.complains("bare", &["--count", "3"]);
    assert!(said.contains("3 of 3 children could not be inspected"), "{said}");
    assert!(["1: ", "2: ", "3: "].iter().all(|number| said.contains(number)), "{said}");
    // A round that fails is no reason to try a second one, if it is the first.
    let said = source.complains("bare", &["--every", "10ms"]);
    assert!(!said.contains("round 2"), "{said}");

    let out = source.inspect(&["--json", "--count", "2"]);
    assert_eq!(out.status.code(), Some(125), "{out:?}");
    let lines: Vec<serde_json::Value> = out
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    for (line, number) in lines.iter().zip(1..) {
        assert_eq!((&line["child"], &line["status"], &line["round"]), (&number.into(), &125.into(), &1.into()));
        assert_eq!(line["name"], format!("bare-inspect-{number}"));
        assert!(line["error"].as_str().unwrap().contains("kernel"), "{line}");
        let times = &line["stages"];
        let times: Vec<_> =
            ["waiting_us", "alive_us", "ended_us", "discarded_us"].iter().map(|n| times[n].as_u64().unwrap()).collect();
        assert!(times.is_sorted() && times[0] > 0, "{line}");
        let pause = line["pause_us"].as_u64().unwrap();
        assert!(pause > 0 && line["stages"]["fork"]["pause_us"] == pause, "{line}");
    }
    source.nothing_is_left();
}

#[test]
fn what_cannot_be_is_said_before_anything_is_forked() {
    let source = Source::new();
    let dir = source.vm.setup().root();
    let image = dir.join("store.img");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let store = image.to_str().unwrap();
    let text = dir.join("text");
    fs::write(&text, "no image").unwrap();
    let tap = "--net=tap=civic-no-such{n}";
    for (options, parts) in [
        (&["--store", "/no/such.img"][..], &["/no/such.img"][..]),
        (&["--store", text.to_str().unwrap()], &["text"]),
        (&["--store", store], &["does not listen to devices", "docs/support.md"]),
        (&["--disk", "path=/no/such.img"], &["/no/such.img"]),
        (&[tap], &["civic-no-such1", "ip tuntap add"]),
        (&["--ip", "own=10.0.0.2/24"], &["own"]),
        (&["--overlay-dir", "/no/such/dir", "--store", &format!("{store},overlay")], &["/no/such/dir"]),
        (&["--count", "0"], &["--count 0", "1 to 64"]),
        (&["--count", "2", "--store", store], &[",overlay"]),
        (&["--every", "1s", "--keep"], &["--keep"]),
        (&["--rounds", "2"], &["--every 10s"]),
        (&["--tty"], &["there is no terminal", "leave --tty away"]),
    ] {
        let said = source.complains("bare", options);
        assert!(parts.iter().all(|part| said.contains(part)), "{options:?}: {said}");
        let out = source.inspect(&[options, &["--json"]].concat());
        assert_eq!(out.status.code(), Some(125), "{out:?}");
        source.nothing_is_left();
    }
    let said = source.complains("nobody", &[]);
    assert!(said.contains("there is no VM named 'nobody'") && said.contains("civic list"), "{said}");

    // Somebody else has the store.
    let held = Setup::new(&hammer()).name("other").disk("held", 1 << 20).boot();
    let path = held.setup().root().join("held.img");
    let said = source.complains("bare", &["--store", path.to_str().unwrap()]);
    assert!(said.contains("held.img") && said.contains(",overlay"), "{said}");
}

#[test]
fn a_source_that_does_not_run_is_said_to_be_so() {
    let source = Source::new();
    // One that was never started.
    let run_dir = source.run_dir();
    let mut idle = Setup::new(&hammer()).name("idle").run_dir(run_dir.clone()).launch();
    let out = source.command("idle", &[]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(125) && said.contains("created"), "{said}");
    assert_eq!(fs::read_dir(&run_dir).unwrap().count(), 2);
    idle.kill();
    idle.ended();
    // One that has ended badly.
    fs::create_dir(run_dir.join("dead")).unwrap();
    fs::write(run_dir.join("dead/vmm.log"), "why\n").unwrap();
    let out = source.command("dead", &[]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(125) && said.contains("the VM 'dead' has ended badly"), "{said}");
    fs::remove_dir_all(run_dir.join("dead")).unwrap();
    source.nothing_is_left();
}

#[test]
fn signals_at_any_stage_leave_nothing() {
    let source = Source::new();
    let begun = Instant::now();
    source.inspect(&["--count", "2"]);
    let whole = begun.elapsed();
    let mut interrupted = 0;
    for (round, signal) in (0..ROUNDS).zip([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().cycle()) {
        let command = source.command("bare", &["--count", "2"]).spawn().unwrap();
        std::thread::sleep(whole * round / ROUNDS);
        send(&command, signal);
        if round % 2 == 1 {
            send(&command, signal);
        }
        let (status, said) = end(command);
        match status {
            // Before anything was caught.
            None => {}
            Some(125) => assert!(said.contains("kernel"), "{said}"),
            status => {
                interrupted += 1;
                assert_eq!(status, Some(128 + signal as i32), "{said}");
            }
        }
        source.nothing_is_left();
    }
    assert!(interrupted > 0, "no signal came in time");
}

#[test]
fn signals_end_what_hangs() {
    let source = Source::new();
    // The source does not answer.
    let pid = Pid::from_raw(source.vm.pid() as i32);
    for signals in [1, 2] {
        kill(pid, Signal::SIGSTOP).unwrap();
        let command = source.command("bare", &[]).spawn().unwrap();
        let deadline = Instant::now() + END;
        while source.entries().len() < 2 {
            assert!(Instant::now() < deadline, "nothing is begun");
            std::thread::sleep(Duration::from_millis(1));
        }
        (0..signals).for_each(|_| send(&command, Signal::SIGINT));
        let (status, said) = end(command);
        kill(pid, Signal::SIGCONT).unwrap();
        assert_eq!(status, Some(130), "{said}");
        assert_eq!(source.entries(), ["bare"]);
        source.nothing_but_a_page_server_is_left();
    }
    // A child does not.
    let command = source.command("bare", &[]).spawn().unwrap();
    kill(source.monitor("bare-inspect-1"), Signal::SIGSTOP).unwrap();
    send(&command, Signal::SIGTERM);
    let (status, said) = end(command);
    assert_eq!(status, Some(143), "{said}");
    assert_eq!(source.entries(), ["bare"]);
    source.nothing_but_a_page_server_is_left();
}

#[test]
fn a_child_or_page_server_that_is_killed_at_any_stage_leaves_nothing() {
    let source = Source::new();
    let begun = Instant::now();
    source.inspect(&["--count", "2"]);
    let whole = begun.elapsed();
    for round in 0..ROUNDS {
        let command = source.command("bare", &["--count", "2"]).spawn().unwrap();
        let victim = match round % 2 {
            0 => source.monitor("bare-inspect-2"),
            _ => {
                let monitors = [source.monitor("bare-inspect-1"), source.monitor("bare-inspect-2")];
                source.page_server().map_or(monitors[0], |pid| Pid::from_raw(pid as i32))
            }
        };
        std::thread::sleep(whole * (round / 2) / ROUNDS);
        // It may have ended by itself.
        let _ = kill(victim, Signal::SIGKILL);
        let (status, said) = end(command);
        assert_eq!(status, Some(125), "{said}");
        source.nothing_is_left();
    }
}

#[test]
fn a_command_that_is_killed_takes_its_children_with_it() {
    let source = Source::new();
    let mut left = 0;
    for round in 0..ROUNDS {
        let mut command = source.command("bare", &[]).spawn().unwrap();
        let monitor = source.monitor(&format!("bare-inspect-{}", left + 1));
        std::thread::sleep(Duration::from_millis(5) * round);
        send(&command, Signal::SIGKILL);
        command.wait().unwrap();
        source.nothing_but_a_page_server_is_left();
        source.vm.until("its monitor to end", |_| !Path::new(&format!("/proc/{monitor}/fd/0")).exists());
        // What a killed process could not remove is in nobody's way.
        left = source.entries().len() - 1;
    }
    let said = {
        let out = source.inspect(&["-v"]);
        String::from_utf8(out.stderr).unwrap()
    };
    assert!(said.contains(&format!("bare-inspect-{}:", left + 1)), "{left}: {said}");
}

#[test]
fn nobody_elses_directory_is_touched() {
    let source = Source::new();
    let mine = source.run_dir().join("bare-inspect-1");
    fs::create_dir(&mine).unwrap();
    let lock = fs::File::create(mine.join("lock")).unwrap();
    let _held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e).unwrap();
    let out = source.inspect(&["-v"]);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("bare-inspect-2:"), "{said}");
    assert!(mine.join("lock").exists() && !source.run_dir().join("bare-inspect-2").exists());
}

/// The nineteenth field of proc_pid_stat(5).
fn niceness(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().split_whitespace().nth(16).unwrap().to_owned()
}

#[test]
fn a_command_that_can_wait_starts_no_page_server_for_which_the_source_waits() {
    let source = Source::new();
    let mut command = Command::new("nice");
    command.args(["-n", "15"]).arg(binary("civic")).arg("--run-dir").arg(source.run_dir());
    let out = command.args(["fork", "bare", "--name", "nice"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let server = source.page_server().unwrap();
    let fork = source.monitor("nice");
    let told = [server, source.vm.pid(), fork.as_raw() as u32].map(niceness);
    // Nobody else ends it.
    kill(fork, Signal::SIGKILL).unwrap();
    assert_eq!(told, ["0", "0", "15"], "of the page server, the source and the fork");
}
