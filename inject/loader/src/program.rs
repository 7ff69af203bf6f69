//! The program's process: its terminal or pipes, what it starts with, and how it is found; or what it does instead of becoming one.

use core::ffi::CStr;

use civic_loader::{FromGuest, Job, Launch, MAX_STRINGS, Output, Step, Strings, WindowSize, split};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, open, openat, statat};
use rustix::io::{Errno, ioctl_fionbio, read, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Gid, Pid, PidfdFlags, Signal, Uid, WaitOptions, WaitStatus, chdir, ioctl_tiocsctty, kill_process_group, pidfd_open,
    setpriority_process, setsid, umask, wait, waitpid,
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use crate::failure::{Failure, Text};
use crate::files::{self, detached};
use crate::link::Buffer;
use crate::pack::pack;
use crate::root::TERMINALS;
use crate::sys::{self, Fork, Pointers};
use crate::unpack::unpack;

/// Where to look for a program if the environment does not say it.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A path's bytes at most, with the zero at its end.
const PATH_MAX: usize = 4096;
/// The end of input, typed.
const END_OF_INPUT: u8 = 4;

/// The program, as long as it runs and after.
pub struct Program {
    pid: Pid,
    /// Readable when it has ended; not on kernels where a filter forbids it.
    pidfd: Option<OwnedFd>,
    ends: Ends,
}

/// Our ends of what is the program's input and output. None of them blocks, but none of the program's own does not.
enum Ends {
    Terminal(OwnedFd),
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// A terminal that nobody will write to any more.
    Closed,
}

/// The program's ends.
enum Theirs {
    Terminal(OwnedFd),
    Pipes { stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd },
}

impl Program {
    /// Starts it, and comes back when its file is executed. `report` is where its process says why not.
    pub fn start<'a>(launch: &Launch<'a>, proc: Option<&OwnedFd>, report: &'a mut [u8]) -> Result<Self, Failure<'a>> {
        let failure = |errno, text| Failure::new(Step::Terminal, errno, text);
        let (ends, theirs) = match launch.tty {
            Some(size) => terminal(size).map_err(|e| failure(e, "the guest's kernel gives no terminal"))?,
            None => pipes().map_err(|e| failure(e, "the guest's kernel gives no pipes"))?,
        };
        let failure = |errno, text| Failure::new(Step::Process, errno, text);
        let (from_child, to_parent) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|e| failure(e, "the guest's kernel gives no pipes"))?;
        let pid = match sys::fork().map_err(|e| failure(e, "the guest's kernel starts no process"))? {
            Fork::Child => become_program(launch, &theirs, proc, to_parent),
            Fork::Parent(pid) => pid,
        };
        drop((theirs, to_parent));
        // Its end is when the file is executed: nothing has been told then.
        let mut len = 0;
        while let Ok(count @ 1..) = read(&from_child, &mut report[len..]) {
            len += count;
        }
        if let Ok(Some((frame, _))) = split(&report[..len])
            && let Ok(FromGuest::Failed { step, errno, text }) = FromGuest::decode(frame)
        {
            let _ = waitpid(Some(pid), WaitOptions::empty());
            return Err(Failure::told(step, errno, text));
        }
        Ok(Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty()).ok(), ends })
    }

    /// How it ended, if it has. To be asked no more when it was told.
    pub fn ended(&self) -> Option<WaitStatus> {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.pid => return Some(status),
                // One that it has left to us.
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// What becomes readable when it has ended.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// To it and all processes of its group. Not to be called when it has ended: the number may be another's then.
    pub fn signal(&self, signal: Signal) {
        // They may all be gone.
        let _ = kill_process_group(self.pid, signal);
    }

    /// Changes its terminal's size, if it has one.
    pub fn resize(&self, size: WindowSize) {
        if let Ends::Terminal(terminal) = &self.ends {
            // The terminal of a program that has closed it has no size.
            let _ = tcsetwinsize(terminal, winsize(size));
        }
    }

    /// Where its input goes, if it is open.
    pub fn stdin(&self) -> Option<BorrowedFd<'_>> {
        match &self.ends {
            Ends::Terminal(terminal) => Some(terminal.as_fd()),
            Ends::Pipes { stdin, .. } => stdin.as_ref().map(AsFd::as_fd),
            Ends::Closed => None,
        }
    }

    /// It has closed its input.
    pub fn close_stdin(&mut self) {
        if let Ends::Pipes { stdin, .. } = &mut self.ends {
            *stdin = None;
        }
    }

    /// It has all of its input. Whether it was told: a terminal may have no room for that now.
    pub fn end_stdin(&mut self) -> bool {
        self.close_stdin();
        match &self.ends {
            Ends::Terminal(terminal) => !matches!(write(terminal, &[END_OF_INPUT]), Err(Errno::AGAIN)),
            Ends::Pipes { .. } | Ends::Closed => true,
        }
    }

    /// Where output comes from, if it is open.
    pub fn output(&self, output: Output) -> Option<BorrowedFd<'_>> {
        match (&self.ends, output) {
            (Ends::Terminal(terminal), Output::Stdout) => Some(terminal.as_fd()),
            (Ends::Pipes { stdout, .. }, Output::Stdout) => stdout.as_ref().map(AsFd::as_fd),
            (Ends::Pipes { stderr, .. }, Output::Stderr) => stderr.as_ref().map(AsFd::as_fd),
            (Ends::Terminal(_), Output::Stderr) | (Ends::Closed, _) => None,
        }
    }

    /// No more comes from there, or is wanted.
    pub fn close_output(&mut self, output: Output) {
        match (&mut self.ends, output) {
            (Ends::Pipes { stdout, .. }, Output::Stdout) => *stdout = None,
            (Ends::Pipes { stderr, .. }, Output::Stderr) => *stderr = None,
            (Ends::Terminal(_) | Ends::Closed, _) => self.ends = Ends::Closed,
        }
    }
}

/// A terminal. One that the program finds by name in its root, if there is a place for such.
fn terminal(size: WindowSize) -> Result<(Ends, Theirs), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let ours = open(c"/dev/pts/ptmx", flags, Mode::empty())
        .or_else(|_| open(c"/dev/ptmx", flags, Mode::empty()))
        .or_else(|_| openat(detached(c"devpts", TERMINALS)?, c"ptmx", flags, Mode::empty()))?;
    unlockpt(&ours)?;
    tcsetwinsize(&ours, winsize(size))?;
    let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    Ok((Ends::Terminal(ours), Theirs::Terminal(theirs)))
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: size.width, ws_ypixel: size.height }
}

fn pipes() -> Result<(Ends, Theirs), Errno> {
    let (their_stdin, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stdout, their_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    for end in [&stdin, &stdout, &stderr] {
        ioctl_fionbio(end, true)?;
    }
    let ends = Ends::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr) };
    Ok((ends, Theirs::Pipes { stdin: their_stdin, stdout: their_stdout, stderr: their_stderr }))
}

/// In the new process: becomes the program, or says why not and ends.
fn become_program(launch: &Launch<'_>, theirs: &Theirs, proc: Option<&OwnedFd>, to_parent: OwnedFd) -> ! {
    let mut path = Path::new();
    let failure = match (prepare(launch, theirs, proc, &to_parent), launch.job) {
        (Err(failure), _) => failure,
        (Ok(()), Job::Run(argv)) => execute(argv, launch.env, &mut path),
        (Ok(()), Job::Pack(path)) => {
            // As if a file were executed.
            drop(to_parent);
            sys::exit(pack(path))
        }
        (Ok(()), Job::Unpack { path, rename }) => {
            drop(to_parent);
            sys::exit(unpack(path, rename))
        }
    };
    let (mut text, mut bytes) = (Text::new(), [0; 2048]);
    let mut frame = Buffer::new(&mut bytes);
    // The text has a greatest length, and so has the frame; a pipe takes it at once. Nobody else could be told.
    let _ = failure.frame(&mut text).encode(&mut frame);
    let _ = write(&to_parent, frame.waiting());
    sys::exit(127)
}

/// What there is before the file.
fn prepare<'a>(
    launch: &Launch<'a>,
    theirs: &Theirs,
    proc: Option<&OwnedFd>,
    to_parent: &OwnedFd,
) -> Result<(), Failure<'a>> {
    let failure = |errno, text| Failure::new(Step::Process, errno, text);
    if let Some(proc) = proc {
        let _ = files::write(proc, c"self/oom_score_adj", b"0");
    }
    // Whatever port was used; who never had one loses none.
    let _ = sys::ioperm(0, 1 << 16, false);
    setsid().map_err(|e| failure(e, "the program gets no session of its own"))?;
    let moved = match theirs {
        Theirs::Terminal(terminal) => ioctl_tiocsctty(terminal)
            .and_then(|()| dup2_stdin(terminal))
            .and_then(|()| dup2_stdout(terminal))
            .and_then(|()| dup2_stderr(terminal)),
        Theirs::Pipes { stdin, stdout, stderr } => {
            dup2_stdin(stdin).and_then(|()| dup2_stdout(stdout)).and_then(|()| dup2_stderr(stderr))
        }
    };
    moved.map_err(|e| failure(e, "the program does not get its input and output"))?;
    if let Some(nice) = launch.nice {
        setpriority_process(None, nice.into()).map_err(|e| failure(e, "the program does not get its niceness"))?;
    }
    if let Some(priority) = launch.realtime {
        sys::realtime(priority).map_err(|e| failure(e, "the program does not get its real-time priority"))?;
    }
    set_thread_groups(&[])
        .and_then(|()| set_thread_gid(Gid::from_raw(launch.gid)))
        .and_then(|()| set_thread_uid(Uid::from_raw(launch.uid)))
        .map_err(|e| failure(e, "the program does not get its user and group"))?;
    if let Some(cwd) = launch.cwd {
        chdir(cwd).map_err(|e| failure(e, "the program cannot be started in the folder ").about(cwd.to_bytes(), ""))?;
    }
    umask(Mode::from_raw_mode(0o022));
    sys::reset_signals();
    sys::close_but(to_parent);
    Ok(())
}

/// Executes the file, or says why it cannot be. `path` is where its path is put together, if it has to be.
fn execute<'p>(arguments: Strings<'p>, environment: Strings<'p>, path: &'p mut Path) -> Failure<'p> {
    let argv = Pointers::<{ MAX_STRINGS + 1 }>::new(arguments.iter());
    let env = Pointers::<{ MAX_STRINGS + 1 }>::new(environment.iter());
    let name = arguments.iter().next().unwrap_or_default();
    if name.to_bytes().contains(&b'/') {
        return why_not(sys::execve(name, &argv, &env), name);
    }
    let folders = environment.iter().find_map(|variable| variable.to_bytes().strip_prefix(b"PATH=")).unwrap_or(PATH);
    let mut found = None;
    // A program without a name would be the folder itself.
    for folder in folders.split(|byte| *byte == b':').filter(|_| !name.is_empty()) {
        let Some(path) = path.set(folder, name) else {
            continue;
        };
        match sys::execve(path, &argv, &env) {
            Errno::NOENT | Errno::NOTDIR if statat(CWD, path, AtFlags::empty()).is_err() => {}
            // There may be another that can be executed.
            Errno::ACCESS => found = found.or(Some((Errno::ACCESS, folder))),
            errno => {
                found = Some((errno, folder));
                break;
            }
        }
    }
    match found.and_then(|(errno, folder)| Some((errno, path.set(folder, name)?))) {
        Some((errno, path)) => why_not(errno, path),
        None => Failure::new(Step::Exec, Errno::NOENT, "there is no program ")
            .about(name.to_bytes(), " in the folders that PATH names"),
    }
}

/// Why the file was not executed.
fn why_not(errno: Errno, path: &CStr) -> Failure<'_> {
    let stat = statat(CWD, path, AtFlags::empty());
    let is_folder = stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
    let is_executable = stat.is_ok_and(|stat| stat.st_mode & 0o111 != 0);
    let (before, after) = match errno {
        Errno::ACCESS if is_folder => ("", " is a folder"),
        Errno::ACCESS if stat.is_ok() && !is_executable => ("", " is not executable"),
        Errno::ACCESS => ("", " may not be executed by the program's user, or where it is"),
        Errno::NOENT if stat.is_ok() => ("", " needs an interpreter or dynamic loader that is not there"),
        Errno::NOENT => ("there is no program ", ""),
        Errno::NOEXEC => ("", " has no format that the guest's kernel executes"),
        _ => ("the guest's kernel does not execute ", ""),
    };
    Failure::new(Step::Exec, errno, before).about(path.to_bytes(), after)
}

/// A path that is put together.
struct Path([u8; PATH_MAX]);

impl Path {
    fn new() -> Self {
        Self([0; PATH_MAX])
    }

    /// `name` in `folder`, the working directory if that is empty; `None` if it is too long for the kernel.
    fn set(&mut self, folder: &[u8], name: &CStr) -> Option<&CStr> {
        let folder = if folder.is_empty() { b"." } else { folder };
        let mut rest = &mut self.0[..];
        for part in [folder, b"/", name.to_bytes_with_nul()] {
            rest.split_off_mut(..part.len())?.copy_from_slice(part);
        }
        CStr::from_bytes_until_nul(&self.0).ok()
    }
}
