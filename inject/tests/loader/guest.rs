//! A stand-in for a guest: process, mount, network and control group namespaces on this host, with the loader in them, and the host's end
//! of its channel. Everything in it ends with it.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use civic_inject::LOADER;
use civic_inject::wire::{Exit, FromGuest, Job, Launch, Stage, Step, Strings, ToGuest, pack, split};
use tempfile::TempDir;

/// Everything here takes a fraction of this even on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(100);

/// What runs as the first process. Its input is the channel.
const INIT: &str = r#"
exec 9<&0 </dev/null
cd "$DIR"
eval "$SETUP"
"$LOADER" fd:9 &
loader=$!
exec 9<&-
wait $loader || :
eval "$AFTER"
"#;

/// What becomes the first process's parent. A control group that it is in is the root group of the guest.
const OUTSIDE: &str = r#"
test -z "$GROUP" || echo 0 > "$GROUP/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --mount-proc --net --cgroup --ipc --uts sh -ec "$INIT"
"#;

/// What else there may be in a guest.
#[derive(Default)]
pub struct Setting<'a> {
    /// What a shell executes before the loader.
    pub before: &'a str,
    /// What it executes after. Then everything ends.
    pub after: &'a str,
    /// What is to be the root of its control groups: a folder of a cgroup2 of this host.
    pub group: Option<&'a Path>,
}

/// The loader, as a file that can be executed.
pub fn loader() -> &'static Path {
    static FILE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FILE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loader");
        std::fs::write(&path, LOADER).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        (dir, path)
    });
    path
}

/// A guest with the loader in it, which waits for its launch.
pub struct Guest {
    init: Child,
    channel: UnixStream,
    received: Vec<u8>,
    /// Bytes of input that may be sent.
    pub credit: usize,
    deadline: Instant,
    /// A folder that the guest's shell, the program and the test see.
    pub dir: TempDir,
}

/// What was heard of a program, from its launch to its end.
#[derive(Debug, Default)]
pub struct Heard {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub stages: Vec<Stage>,
    pub warnings: Vec<String>,
    pub end: Option<End>,
}

/// The last frame.
#[derive(Debug, PartialEq)]
pub enum End {
    Exited(Exit),
    Failed { step: Step, errno: i32, text: String },
}

impl Heard {
    pub fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    #[track_caller]
    pub fn assert_code(&self, code: u8) {
        let stderr = String::from_utf8_lossy(&self.stderr);
        assert_eq!(self.end, Some(End::Exited(Exit::Code(code))), "{}, {stderr}, {:?}", self.stdout(), self.warnings);
    }

    /// Asserts a failure, and gives its text.
    #[track_caller]
    pub fn assert_failed(&self, expected: Step, reason: i32) -> &str {
        match &self.end {
            Some(End::Failed { step, errno, text }) if (*step, *errno) == (expected, reason) => text,
            _ => panic!("{self:?}"),
        }
    }
}

impl Guest {
    /// One in which a shell has executed `before`.
    pub fn start(before: &str) -> Self {
        Self::new(&Setting { before, ..Setting::default() })
    }

    /// One with more.
    pub fn new(setting: &Setting<'_>) -> Self {
        let (channel, theirs) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let init = Command::new("sh")
            .args(["-ec", OUTSIDE])
            .env("INIT", INIT)
            .env("LOADER", loader())
            .env("SETUP", setting.before)
            .env("AFTER", setting.after)
            .env("GROUP", setting.group.unwrap_or(Path::new("")))
            .env("DIR", dir.path())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .expect("there is a shell");
        let deadline = Instant::now() + DEADLINE;
        let mut this = Self { init, channel, received: Vec::new(), credit: 0, deadline, dir };
        let credit = this.next(|frame| match frame {
            FromGuest::Hello { version: civic_inject::wire::VERSION, credit } => credit,
            frame => panic!("{frame:?}"),
        });
        this.credit = credit.expect("the loader starts") as usize;
        this
    }

    pub fn send(&mut self, message: ToGuest<'_>) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        self.send_bytes(&bytes);
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.channel.set_write_timeout(Some(DEADLINE)).unwrap();
        match self.channel.write_all(bytes) {
            // It has ended, and what it has said of that is still to be heard.
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {}
            sent => sent.unwrap(),
        }
    }

    /// Waits until everything in it has ended by itself.
    pub fn wait_for_end(&mut self) {
        while self.init.try_wait().unwrap().is_none() {
            assert!(Instant::now() < self.deadline, "the guest has not ended");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What `look` makes of the next frame; `None` if there are no more.
    pub fn next<T>(&mut self, look: impl FnOnce(FromGuest<'_>) -> T) -> Option<T> {
        loop {
            if let Some((frame, len)) = split(&self.received).unwrap() {
                let result = look(FromGuest::decode(frame).unwrap());
                self.received.drain(..len);
                return Some(result);
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            self.channel.set_read_timeout(Some(left.max(Duration::from_millis(1)))).unwrap();
            let mut buffer = [0; 1 << 16];
            match self.channel.read(&mut buffer) {
                Ok(0) => {
                    assert!(self.received.is_empty(), "half a frame");
                    return None;
                }
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("nothing more was heard: {e}"),
            }
        }
    }

    /// Adds the next frame to `heard`; whether there was one.
    pub fn hear(&mut self, heard: &mut Heard) -> bool {
        assert_eq!(heard.end, None, "nothing is said after the last frame");
        let credit = self.next(|frame| {
            match frame {
                FromGuest::Hello { .. } => panic!("a second hello"),
                FromGuest::Stage { stage, .. } => heard.stages.push(stage),
                FromGuest::Stdout(bytes) => heard.stdout.extend_from_slice(bytes),
                FromGuest::Stderr(bytes) => heard.stderr.extend_from_slice(bytes),
                FromGuest::Warning(text) => heard.warnings.push(text.to_owned()),
                FromGuest::Exited(exit) => heard.end = Some(End::Exited(exit)),
                FromGuest::Failed { step, errno, text } => {
                    heard.end = Some(End::Failed { step, errno, text: text.to_owned() });
                }
                FromGuest::Credit(more) => return more as usize,
            }
            0
        });
        self.credit += credit.unwrap_or_default();
        credit.is_some() && heard.end.is_none()
    }

    /// Hears until `enough`.
    pub fn hear_until(&mut self, heard: &mut Heard, enough: impl Fn(&Heard) -> bool) {
        while !enough(heard) {
            assert!(self.hear(heard), "{heard:?}");
        }
    }

    /// Hears to the end.
    pub fn hear_all(&mut self, mut heard: Heard) -> Heard {
        while self.hear(&mut heard) {}
        assert_eq!(self.next(|frame| panic!("after the end: {frame:?}")), None::<()>);
        heard
    }

    /// Launches `argv` as `change` says, without input.
    pub fn run<'a>(&mut self, argv: &[&str], change: impl FnOnce(&mut Launch<'a>)) -> Heard {
        self.launch(argv, change);
        self.send(ToGuest::StdinEnd);
        self.hear_all(Heard::default())
    }

    /// Launches `argv` as `change` says.
    pub fn launch<'a>(&mut self, argv: &[&str], change: impl FnOnce(&mut Launch<'a>)) {
        let mut launch = Launch::new(Job::Run(Strings::default()));
        change(&mut launch);
        let argv = pack(argv).unwrap();
        let env = pack(["PATH=/usr/bin:/bin", "FOO=bar"]).unwrap();
        let (job, env) = (Job::Run(Strings::new(&argv).unwrap()), Strings::new(&env).unwrap());
        self.send(ToGuest::Launch(Launch { job, env, ..launch }));
    }

    /// Has the loader itself do something with `input`.
    pub fn copy(&mut self, job: Job<'_>, mut input: &[u8]) -> Heard {
        self.send(ToGuest::Launch(Launch::new(job)));
        let mut heard = Heard::default();
        while !input.is_empty() {
            let chunk = input.split_off(..input.len().min(self.credit).min(50_000)).unwrap();
            self.send(ToGuest::Stdin(chunk));
            self.credit -= chunk.len();
            if self.credit == 0 && !self.hear(&mut heard) {
                return heard;
            }
        }
        self.send(ToGuest::StdinEnd);
        self.hear_all(heard)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // And all processes in it, by --kill-child.
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}
