//! `civic inspect`: looks into a running VM by a program in a fork of it, which is discarded.
//!
//! ```text
//!  a round:  names ─▶ monitors, page server ─▶ fork ─┬▶ program ─ output ─▶ end, store unmounted ─▶ discard   for each child,
//!            child.rs       birth.rs                 └▶ …        hearing.rs                         child.rs   at the same time
//! ```
//!
//! Invariants:
//! * Whatever happens, signals included, a child that is not to be kept ends with its round, and its directory with it. If this process is
//!   killed, the kernel kills the monitors with it; only their directories stay then.
//! * A round begins when nothing is left of the one before: the store is free, and its file system in order.
//! * Every wait has an end or is ended by a signal: the first ends programs, in their own time, and the second waits for none.

mod child;
mod hearing;
mod report;
mod stop;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use civic_api::launch::LOG_FILE;
use civic_api::{ErrorBody, ErrorCode, ProgramRequest};
use nix::libc::{self, c_int};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

use self::child::{Child, Reserved};
use self::hearing::{Hearing, Lines, To, say};
use self::report::{Born, Look, Stages};
use self::stop::Stop;
use crate::birth::Birth;
use crate::cli::InspectArgs;
use crate::monitor::Until;
use crate::program::{self, Input, OurOutputs, TIMED_OUT};
use crate::rundir::{Found, RunDir};
use crate::talk::{NOT_THERE, Outcome};
use crate::terminal::{Raw, spinner};
use crate::{Ended, advice};

/// How long our output may take to take the last of it, once we are told to end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Looks into a VM, once or again and again.
pub async fn inspect(dir: &RunDir, args: InspectArgs) -> Result<()> {
    args.check()?;
    let mut request = args.program.request()?;
    // What is to be looked at stays as the program has left it.
    request.tidy_up = !args.keep;
    let stop = Stop::catch().context("cannot catch signals")?;
    let inspection = Inspection { dir, args: &args, request, stop };
    if args.every.is_some() { inspection.rounds().await } else { ended(inspection.round(1, Duration::ZERO).await?) }
}

/// This process's end, for a program's.
fn ended(status: u8) -> Result<()> {
    match status {
        0 => Ok(()),
        status => Err(Ended(status).into()),
    }
}

/// A shell's number for an end by a signal.
fn signalled(signal: c_int) -> u8 {
    128_u8.wrapping_add(signal as u8)
}

/// A signal has ended us.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted(c_int);

struct Inspection<'a> {
    dir: &'a RunDir,
    args: &'a InspectArgs,
    request: ProgramRequest,
    stop: Stop,
}

impl Inspection<'_> {
    /// One round after the other.
    async fn rounds(&self) -> Result<()> {
        let every = self.args.every.unwrap_or_default();
        let (mut due, mut status) = (Instant::now(), 0);
        for number in 1..=self.args.rounds.unwrap_or(u64::MAX) {
            let late = self.until(due).await?;
            // Those that should have begun meanwhile are left out.
            due += every + late;
            if !late.is_zero() && !self.args.json {
                say(&format!("round {number} begins {:.1} s late: the last one took longer", late.as_secs_f64()));
            }
            status = match self.round(number, late).await {
                Ok(status) => {
                    if !self.args.json {
                        say(&format!("round {number}: status {status}"));
                    }
                    status
                }
                Err(error) if number == 1 || self.stop.signal().is_some() || error.is::<io::Error>() => {
                    return Err(error);
                }
                Err(error) => {
                    say(&format!("round {number}: {}", advice::told(&error).trim_start_matches("civic: ")));
                    if matches!(self.dir.find(&self.args.source).await, Found::Dead) {
                        return Err(self.dir.not_running(&self.args.source));
                    }
                    crate::FAILED
                }
            };
            if let Some(signal) = self.stop.signal() {
                return ended(signalled(signal));
            }
        }
        ended(status)
    }

    /// Waits until a round is due; how much later it is by then, if that is worth telling.
    async fn until(&self, due: Instant) -> Result<Duration> {
        const WORTH_TELLING: Duration = Duration::from_millis(100);
        let mut stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep_until(due.into()) => {}
            signal = stop.first() => return Err(Ended(signalled(signal)).into()),
        }
        Ok(Some(due.elapsed()).filter(|late| *late > WORTH_TELLING).unwrap_or_default())
    }

    /// Forks, runs the program in each child, discards them, and reports. Gives the status to end with.
    async fn round(&self, number: u64, late: Duration) -> Result<u8> {
        let begun = Instant::now();
        let bar = if self.args.program.tty {
            indicatif::ProgressBar::hidden()
        } else {
            spinner(format!("forking {}", self.args.source))
        };
        let raw = if self.args.program.tty { Raw::enter().context("cannot use the terminal")? } else { None };
        let forked = self.fork(begun).await;
        bar.set_message(format!("starting {}", self.args.program.argv[0]));
        let looks = match forked {
            Ok(children) => Ok(self.look(children, begun, &bar).await),
            Err(error) => Err(error),
        };
        bar.finish_and_clear();
        drop(raw);
        if self.args.json {
            report::print(self.args, number, late, &looks)?;
        }
        match looks {
            Ok(looks) => self.conclude(looks),
            Err(error) => Err(match error.downcast_ref::<Interrupted>() {
                Some(Interrupted(signal)) => Ended(signalled(*signal)).into(),
                None => error,
            }),
        }
    }

    /// Makes the children; each with what it has in common with the others.
    async fn fork(&self, begun: Instant) -> Result<Vec<(Child, Result<Born>)>> {
        let (source, count) = (&self.args.source, self.args.children());
        let reserved = (0..count).map(|_| Reserved::new(self.dir, source)).collect::<Result<Vec<_>>>()?;
        let names = reserved.iter().map(|reserved| reserved.name().to_owned()).collect();
        let until = if self.args.keep { Until::Told } else { Until::WeEnd };
        let mut birth = Birth::new(self.dir, source, names).for_programs();
        let mut stop = self.stop.clone();
        let made = tokio::select! {
            made = async {
                birth.prepare(&self.args.child, until).await?;
                let waiting_us = begun.elapsed().as_micros() as u64;
                Ok((waiting_us, birth.fork(false).await?))
            } => made,
            signal = stop.first() => Err(Interrupted(signal).into()),
        };
        let (waiting_us, report) = match made {
            Ok(made) => made,
            Err(error) => {
                birth.give_up().await;
                return Err(self.unborn(error));
            }
        };
        let children = reserved.into_iter().zip(birth.monitors()).map(|(reserved, monitor)| {
            let lives = report.children.iter().find(|child| child.name == reserved.name());
            let failed = report.failed.iter().find(|failed| failed.name == reserved.name());
            let born = match (lives, failed) {
                (Some(child), _) => Ok(Born { waiting_us, running_us: child.running_us, fork: report.stages }),
                (None, Some(failed)) => {
                    let message = format!("'{}' could not be brought to life: {}", failed.name, failed.message);
                    Err(advice::error(message, self.why_unborn()))
                }
                (None, None) => Err(anyhow::anyhow!("the source does not tell of '{}'", reserved.name())),
            };
            (Child::new(reserved, monitor), born)
        });
        Ok(children.collect())
    }

    /// `error` of a fork of which no child lives, without a word of logs, which have gone with the children.
    fn unborn(&self, error: anyhow::Error) -> anyhow::Error {
        let store = self.args.child.store.as_ref().map(|store| store.unnumbered().path.display().to_string());
        match error.downcast::<ErrorBody>() {
            Ok(body) if body.hint.as_ref().is_some_and(|hint| hint.contains(LOG_FILE)) => {
                body.with_hint(self.why_unborn()).into()
            }
            Ok(body) if body.code == ErrorCode::ImageLocked => match store {
                Some(path) => body
                    .with_hint(format!(
                        "one VM at a time writes to a store ('civic tree' shows who may have it): wait for it, or write --store {path},overlay"
                    ))
                    .into(),
                None => body.into(),
            },
            Ok(body) => body.into(),
            Err(error) => error,
        }
    }

    fn why_unborn(&self) -> String {
        let child = &self.args.child;
        if child.store.is_some() || !child.devices.is_empty() {
            return "docs/support.md says what a guest's kernel must have to take a store, disks and cards while it runs".into();
        }
        format!("try again; 'civic info {}' shows the VM", self.args.source)
    }

    /// Runs the program in all of them at the same time, and discards each when it has ended.
    async fn look(
        &self,
        children: Vec<(Child, Result<Born>)>,
        begun: Instant,
        bar: &indicatif::ProgressBar,
    ) -> Vec<Look> {
        let mut tasks = JoinSet::new();
        for (index, (child, born)) in children.into_iter().enumerate() {
            let number = index + 1;
            let closed = Arc::new(Notify::new());
            let to = match (self.args.json, self.args.count) {
                (true, _) => To::Kept(Default::default()),
                (false, Some(2..)) => To::Lines(Lines::new(number)),
                (false, _) => To::Ours(OurOutputs::default()),
            };
            let mut request = self.request.clone();
            if self.args.count.is_some() {
                let put = |argument: &String| argument.replace("{n}", &number.to_string());
                request.argv = request.argv.iter().map(put).collect();
            }
            let watch = Watch {
                dir: self.dir.clone(),
                number,
                request,
                stop: self.stop.clone(),
                hearing: Some(Hearing::new(to, bar.clone(), Arc::clone(&closed))),
                closed,
                input: if self.args.is_interactive() { Input::Ours } else { Input::None },
                limit: self.args.program.timeout.map(Duration::from_secs),
                keep: self.args.keep,
                begun,
            };
            tasks.spawn(watch.look(child, born));
        }
        let mut looks = Vec::new();
        while let Some(look) = tasks.join_next().await {
            // Nothing of it panics; and with the task goes its child.
            looks.extend(look.ok());
        }
        looks.sort_unstable_by_key(|look| look.number);
        looks
    }

    /// Tells what is to be told of a round that was made, and how this process is to end.
    fn conclude(&self, looks: Vec<Look>) -> Result<u8> {
        let several = self.args.children() > 1;
        let (mut status, mut failed, mut closed) = (0, Vec::new(), false);
        for look in looks {
            if self.args.verbose {
                say(&look.summary(&self.args.source));
            }
            if look.kept {
                let name = &look.name;
                say(&format!(
                    "{name} is kept: 'civic exec {name} -- PROGRAM' looks on, 'civic kill {name}' discards it"
                ));
            }
            if let Some(error) = look.left {
                say(advice::told(&error).trim_start_matches("civic: "));
            }
            match look.ended {
                Ok(end) => {
                    if !self.args.json && !end.outcome.executed && end.outcome.status == NOT_THERE {
                        say(self.where_to_look());
                    }
                    closed |= matches!(end.why, Why::Closed);
                    status = if status == 0 { end.status() } else { status };
                }
                Err(error) => failed.push((look.number, error)),
            }
        }
        if let Some(signal) = self.stop.signal() {
            return Ok(signalled(signal));
        }
        if closed && self.args.every.is_some() {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        }
        match failed.len() {
            0 => Ok(status),
            1 if !several => Err(failed.swap_remove(0).1),
            count => {
                for (number, error) in failed {
                    say(&format!("{number}: {}", advice::told(&error).trim_start_matches("civic: ")));
                }
                let message = format!("{count} of {} children could not be inspected", self.args.children());
                Err(advice::error(message, "what is above says why"))
            }
        }
    }

    fn where_to_look(&self) -> &'static str {
        match (&self.args.child.store, self.args.program.root) {
            (Some(_), None | Some(crate::cli::RootArg::Store)) => {
                "it was looked for in the store; the guest's own programs are at /guest, or run with --root guest"
            }
            _ => "it was looked for among the guest's own files; bring it with a disk of tools: --store FILE",
        }
    }
}

/// What watches one child.
struct Watch {
    dir: RunDir,
    number: usize,
    request: ProgramRequest,
    stop: Stop,
    hearing: Option<Hearing>,
    closed: Arc<Notify>,
    input: Input,
    limit: Option<Duration>,
    keep: bool,
    begun: Instant,
}

/// Why a program has ended.
enum Why {
    /// By itself.
    Itself,
    /// It took longer than it might.
    TimedOut,
    /// A signal was sent to us.
    Interrupted,
    /// Nobody reads our output.
    Closed,
}

/// How a program has ended, and why.
struct End {
    outcome: Outcome,
    why: Why,
}

impl End {
    fn status(&self) -> u8 {
        match self.why {
            Why::TimedOut => TIMED_OUT,
            Why::Closed => signalled(libc::SIGPIPE),
            Why::Itself | Why::Interrupted => self.outcome.status,
        }
    }
}

impl Watch {
    /// Runs the program in a child that was born, and then discards it, whatever came of it.
    async fn look(mut self, child: Child, born: Result<Born>) -> Look {
        let mut look = Look {
            number: self.number,
            name: child.name().to_owned(),
            ended: Err(Interrupted(0).into()),
            kept: false,
            left: None,
            hearing: None,
            stages: Stages::default(),
        };
        let mut written = None;
        look.ended = match born {
            Ok(born) => {
                look.stages.born = Some(born);
                match self.serve(child.name(), &mut look.stages, &mut written).await {
                    Ok(end) => Ok(end),
                    Err(error) => Err(explained(error, &child).await),
                }
            }
            Err(error) => Err(error),
        };
        look.stages.ended_us = self.now();
        if self.keep && look.ended.is_ok() {
            look.kept = true;
            child.keep();
        } else {
            look.left = child.discard().await.err();
            look.stages.discarded_us = Some(self.now());
        }
        if let Some(written) = written {
            look.hearing = self.last_of(written).await;
        }
        let first = look.ended.as_ref().ok().and_then(|end| end.outcome.first_output);
        look.stages.first_output_us = first.map(|first| first.duration_since(self.begun).as_micros() as u64);
        look
    }

    /// Has the program started, and serves it to its end.
    async fn serve(
        &mut self,
        name: &str,
        stages: &mut Stages,
        written: &mut Option<oneshot::Receiver<Hearing>>,
    ) -> Result<End> {
        let mut stop = self.stop.clone();
        let (started, stream) = tokio::select! {
            started = program::start(&self.dir, name, &self.request) => started?,
            signal = stop.first() => bail!(Interrupted(signal)),
        };
        stages.started_us = Some(self.now());
        stages.inject = Some(started.stages);
        let hearing = self.hearing.take().context("a child is served once")?;
        let (talk, all) = program::attend(stream, self.input, hearing)?;
        *written = Some(all);
        if self.request.tty.is_some() {
            program::forward_sizes(talk.to_guest())?;
        }
        let mut why = Why::Itself;
        let cut = async {
            let signal;
            (signal, why) = tokio::select! {
                signal = program::time_is_up(self.limit) => (signal, Why::TimedOut),
                signal = self.stop.first() => (signal, Why::Interrupted),
                () = self.closed.notified() => (libc::SIGPIPE, Why::Closed),
            };
            signal
        };
        let (outcome, _) = tokio::select! {
            ended = program::until_its_end(talk, cut) => ended?,
            signal = stop.second() => bail!(Interrupted(signal)),
        };
        Ok(End { outcome, why })
    }

    /// Waits until all of the output is where it belongs; not for long when we are to end.
    async fn last_of(&mut self, written: oneshot::Receiver<Hearing>) -> Option<Hearing> {
        tokio::select! {
            hearing = written => hearing.ok(),
            () = async {
                self.stop.first().await;
                tokio::time::sleep(LAST_WORDS).await;
            } => None,
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }
}

/// The error of a child that has ended is what its monitor said last: its log goes with it.
async fn explained(error: anyhow::Error, child: &Child) -> anyhow::Error {
    // What a monitor refuses, it has lived to say.
    let refused = error.downcast_ref::<ErrorBody>().is_some_and(|body| body.code != ErrorCode::Internal);
    if error.is::<Interrupted>() || refused || !child.ends_soon().await {
        return error;
    }
    let why = child.last_words().unwrap_or_else(|| "its monitor was killed".into());
    let hint = "inspect again; if it is lost again, give forks more room with 'civic run --forks'";
    advice::error(format!("{} has ended before its program: {why}", child.name()), hint)
}
