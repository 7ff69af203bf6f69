//! What is told of a child and its program.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use civic_api::{ForkStages, InjectStages};
use serde::Serialize;

use super::hearing::{Captured, Hearing};
use super::{End, Why};
use crate::FAILED;
use crate::cli::InspectArgs;

/// What came of one child of a round.
pub struct Look {
    /// Its number, from 1.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// How its program ended, or why there was none.
    pub ended: Result<End>,
    /// It lives on.
    pub kept: bool,
    /// Why it is not gone, though it should be.
    pub left: Option<anyhow::Error>,
    /// What has heard it.
    pub hearing: Option<Hearing>,
    /// When it had come how far.
    pub stages: Stages,
}

/// What the children of a fork have in common, and when this one ran.
pub struct Born {
    /// Until all children waited, since the round's beginning, in microseconds.
    pub waiting_us: u64,
    /// From asking for the fork until this child's vCPUs were let run.
    pub running_us: u64,
    /// The fork's own stages.
    pub fork: ForkStages,
}

/// When a child had come how far, in microseconds since its round began.
#[derive(Default)]
pub struct Stages {
    /// If it was born.
    pub born: Option<Born>,
    /// The loader ran in it.
    pub started_us: Option<u64>,
    /// What that took, by its monitor.
    pub inject: Option<InjectStages>,
    /// The program's first byte was here.
    pub first_output_us: Option<u64>,
    /// The program has ended, and the store is as it is to be found by the next.
    pub ended_us: u64,
    /// Nothing of the child is left.
    pub discarded_us: Option<u64>,
}

/// A line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    source: &'a str,
    round: u64,
    #[serde(skip_serializing_if = "is_zero")]
    late_us: u64,
    child: usize,
    name: Option<&'a str>,
    status: u8,
    signal: Option<u8>,
    timed_out: bool,
    error: Option<String>,
    stdout: Option<&'a Captured>,
    stderr: Option<&'a Captured>,
    remarks: &'a [String],
    kept: bool,
    pause_us: Option<u64>,
    stages: Times<'a>,
}

/// [`Stages`], as told.
#[derive(Default, Serialize)]
struct Times<'a> {
    waiting_us: Option<u64>,
    alive_us: Option<u64>,
    started_us: Option<u64>,
    first_output_us: Option<u64>,
    ended_us: u64,
    discarded_us: Option<u64>,
    fork: Option<&'a ForkStages>,
    inject: Option<&'a InjectStages>,
}

fn is_zero(us: &u64) -> bool {
    *us == 0
}

/// Prints a line for each child of a round; where there were none, why.
pub fn print(args: &InspectArgs, round: u64, late: Duration, looks: &Result<Vec<Look>>) -> Result<()> {
    let mut text = Vec::new();
    let empty = |child| Line {
        source: &args.source,
        round,
        late_us: late.as_micros() as u64,
        child,
        name: None,
        status: FAILED,
        signal: None,
        timed_out: false,
        error: None,
        stdout: None,
        stderr: None,
        remarks: &[],
        kept: false,
        pause_us: None,
        stages: Times::default(),
    };
    match looks {
        Ok(looks) => {
            for look in looks {
                let kept = look.hearing.as_ref().and_then(Hearing::kept);
                let line = Line {
                    name: Some(&look.name),
                    status: look.ended.as_ref().map_or(FAILED, End::status),
                    signal: look.ended.as_ref().ok().and_then(|end| end.outcome.signal),
                    timed_out: look.ended.as_ref().is_ok_and(|end| matches!(end.why, Why::TimedOut)),
                    error: look.ended.as_ref().err().map(|error| format!("{error:#}")),
                    stdout: kept.map(|kept| &kept.stdout),
                    stderr: kept.map(|kept| &kept.stderr),
                    remarks: kept.map_or(&[], |kept| &kept.remarks),
                    kept: look.kept,
                    pause_us: look.stages.born.as_ref().map(|born| born.fork.pause_us),
                    stages: look.stages.times(),
                    ..empty(look.number)
                };
                serde_json::to_writer(&mut text, &line)?;
                text.push(b'\n');
            }
        }
        Err(error) => {
            for child in 1..=args.children() {
                serde_json::to_writer(&mut text, &Line { error: Some(format!("{error:#}")), ..empty(child) })?;
                text.push(b'\n');
            }
        }
    }
    let mut out = std::io::stdout().lock();
    out.write_all(&text)?;
    Ok(out.flush()?)
}

impl Stages {
    fn times(&self) -> Times<'_> {
        let born = self.born.as_ref();
        Times {
            waiting_us: born.map(|born| born.waiting_us),
            alive_us: born.map(Born::alive_us),
            started_us: self.started_us,
            first_output_us: self.first_output_us,
            ended_us: self.ended_us,
            discarded_us: self.discarded_us,
            fork: born.map(|born| &born.fork),
            inject: self.inject.as_ref(),
        }
    }
}

impl Born {
    fn alive_us(&self) -> u64 {
        self.waiting_us + self.running_us
    }
}

impl Look {
    /// A line for people.
    pub fn summary(&self, source: &str) -> String {
        let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
        let mut parts = vec![match &self.ended {
            Ok(end) => format!("{}: status {}", self.name, end.status()),
            Err(error) => format!("{}: {error}", self.name).replace('\n', "; "),
        }];
        let Stages { born, started_us, first_output_us, ended_us, discarded_us, .. } = &self.stages;
        if let Some(born) = born {
            parts.push(format!("{source} stood still for {}", ms(born.fork.pause_us)));
            parts.push(format!("its fork ran after {}", ms(born.alive_us())));
        }
        for (what, when) in [
            ("the program was started", *started_us),
            ("it wrote first", *first_output_us),
            ("it had ended", Some(*ended_us)),
            ("all was gone", *discarded_us),
        ] {
            parts.extend(when.map(|us| format!("{what} after {}", ms(us))));
        }
        parts.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::talk::Outcome;

    #[test]
    fn a_look_is_told_in_a_line() {
        let look = Look {
            number: 1,
            name: "web-inspect-1".into(),
            ended: Ok(End {
                outcome: Outcome { status: 7, signal: None, executed: true, first_output: None, stages: Vec::new() },
                why: Why::Itself,
            }),
            kept: false,
            left: None,
            hearing: None,
            stages: Stages {
                born: Some(Born {
                    waiting_us: 10_000,
                    running_us: 2345,
                    fork: ForkStages { pause_us: 1980, ..ForkStages::default() },
                }),
                started_us: Some(40_000),
                inject: None,
                first_output_us: None,
                ended_us: 50_000,
                discarded_us: Some(60_000),
            },
        };
        assert_eq!(
            look.summary("web"),
            "web-inspect-1: status 7; web stood still for 1.9 ms; its fork ran after 12.3 ms; the program was started after 40.0 ms; \
             it had ended after 50.0 ms; all was gone after 60.0 ms"
        );
    }
}
