//! What `civic inspect` is told.

use std::time::Duration;

use clap::Args;

use super::{ChildArgs, ProgramArgs, name};
use crate::advice;
use civic_api::MAX_CHILDREN;

/// What `civic inspect` is told.
#[derive(Clone, Debug, Args)]
pub struct InspectArgs {
    /// The VM to look into: it is forked, and runs on.
    #[arg(value_parser = name)]
    pub source: String,
    #[command(flatten)]
    pub child: ChildArgs,
    #[command(flatten)]
    pub program: ProgramArgs,
    /// Leave the child for a look when the program has ended, and say its name.
    #[arg(long)]
    pub keep: bool,
    /// Do it again and again, each time in a new fork, and begin so long after the last beginning: 10s, 500ms, 2m. Until --rounds are over,
    /// or for ever.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub every: Option<Duration>,
    /// With --every: how often.
    #[arg(long, value_name = "N")]
    pub rounds: Option<u64>,
    // As in FORK_HELP.
    #[arg(
        long,
        value_name = "N",
        help = "In so many children of one moment at the same time. '{\u{1b}[0mn}' in the program's arguments, in paths, taps and ids is a \
                child's number, 1 to N"
    )]
    pub count: Option<usize>,
    /// Print a line of JSON for each child of each round: how the program ended, what it wrote, what took how long.
    #[arg(long)]
    pub json: bool,
    /// Say on standard error at the end what took how long.
    #[arg(long, short = 'v')]
    pub verbose: bool,
}

impl InspectArgs {
    /// How many children a round has.
    pub fn children(&self) -> usize {
        self.count.unwrap_or(1)
    }

    /// Whether the program has this process's input: one that is alone.
    pub fn is_interactive(&self) -> bool {
        self.count.is_none() && self.every.is_none()
    }

    /// Refuses what makes no sense together.
    pub fn check(&self) -> anyhow::Result<()> {
        let refuse = |wrong: bool, message: &str, hint: &str| {
            if wrong { Err(advice::error(message, hint)) } else { Ok(()) }
        };
        let children = self.children();
        refuse(
            !(1..=MAX_CHILDREN).contains(&children),
            &format!("--count {children}: a fork has 1 to {MAX_CHILDREN} children"),
            "inspect once more for more",
        )?;
        refuse(
            self.keep && self.every.is_some(),
            "--keep: the next round of --every would need what a child is left with",
            "leave --keep or --every away; 'civic inspect --keep' once more leaves another child",
        )?;
        refuse(
            self.rounds.is_some() && self.every.is_none(),
            "--rounds: nothing is done again",
            "say how often a round begins: --every 10s",
        )?;
        refuse(self.rounds == Some(0), "--rounds 0: nothing would be done", "give at least 1, or leave --rounds away")?;
        let alone = self.is_interactive() && !self.json;
        refuse(
            self.program.tty && !alone,
            "--tty: there is one terminal, for one program at a time",
            "leave --tty away, or --count, --every and --json",
        )?;
        self.shared()
    }

    /// Refuses what several children cannot all have.
    fn shared(&self) -> anyhow::Result<()> {
        if self.children() == 1 {
            return Ok(());
        }
        let numbered = |path: &std::path::Path| path.to_string_lossy().contains("{n}");
        if let Some(store) = self.child.store.as_ref().map(super::StoreSpec::unnumbered)
            && !(store.overlay || store.read_only || numbered(&store.path))
        {
            let path = store.path.display();
            return Err(advice::error(
                format!("--store {path}: one child at a time can write to a store"),
                format!(
                    "write --store {path},overlay (what is written goes with each child) or {path},ro, or give each its own with '{{n}}' in its path"
                ),
            ));
        }
        for disk in self.child.devices.disks.iter().map(|disk| disk.config(0)) {
            if !(disk.overlay || disk.read_only || numbered(&disk.path)) {
                let path = disk.path.display();
                return Err(advice::error(
                    format!("--disk path={path}: one child at a time can write to a disk"),
                    "give it with 'overlay' or 'ro', or each child its own with '{n}' in its path",
                ));
            }
        }
        for net in self.child.devices.nets.iter().map(|net| net.config(0)) {
            if !net.tap.contains("{n}") {
                return Err(advice::error(
                    format!("--net tap={}: a tap belongs to one child", net.tap),
                    "give each child its own with '{n}' in its name",
                ));
            }
        }
        Ok(())
    }
}

/// A number with its unit; seconds without one.
fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("'{unit}' is no unit of time: write 500ms, 10s, 2m or 1h")),
    };
    let number: f64 = number.parse().map_err(|_| format!("'{text}' is no time: write 500ms, 10s, 2m or 1h"))?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| format!("'{text}' is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn args(options: &str) -> Result<InspectArgs, clap::Error> {
        match Cli::try_parse_from(format!("civic inspect web {options} -- ps {{n}}").split_whitespace())?.command {
            Command::Inspect(args) => Ok(*args),
            command => panic!("{command:?}"),
        }
    }

    #[test]
    fn times_have_units() {
        for (text, ms) in [("10s", 10_000), ("500ms", 500), ("2m", 120_000), ("1.5h", 5_400_000), ("3", 3000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for wrong in ["", "s", "10 s", "1d", "-1s", "1e9999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_can_be_asked_for() {
        for options in [
            "",
            "--keep",
            "--every 10s --rounds 3 --store t.img --json",
            "--count 2 --store t.img,overlay --net tap=t{n} --disk path=d{n}",
            "--count 2 --store t-{n}.img -v",
            "--count 1 --store t.img",
            "--tty --keep",
            "--count 3 --keep --disk path=d,ro",
        ] {
            args(options).unwrap().check().unwrap_or_else(|error| panic!("{options}: {error}"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_answered_with_what_does() {
        for (options, message, hint) in [
            ("--count 0", "--count 0: a fork has 1 to 64", "once more"),
            ("--count 65", "--count 65", "once more"),
            ("--every 1s --keep", "--keep", "leave --keep or --every away"),
            ("--rounds 3", "--rounds: nothing is done again", "--every 10s"),
            ("--every 1s --rounds 0", "--rounds 0", "at least 1"),
            ("--tty --json", "--tty", "leave --tty away"),
            ("--tty --count 2", "--tty", "leave --tty away"),
            ("--tty --every 1s", "--tty", "leave --tty away"),
            ("--count 2 --store t.img", "--store t.img: one child", "--store t.img,overlay"),
            ("--count 2 --disk path=d", "--disk path=d: one child", "'{n}' in its path"),
            ("--count 2 --net tap=t", "--net tap=t: a tap", "'{n}' in its name"),
        ] {
            let told = advice::told(&args(options).unwrap().check().unwrap_err());
            let (first, last) = told.split_once('\n').unwrap();
            assert!(first.contains(message) && last.contains(hint), "{options}: {told}");
        }
        assert!(args("--every soon").is_err() && args("--count x").is_err());
    }
}
