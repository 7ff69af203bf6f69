//! `civic fork` and `civic tree`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};

use anyhow::Context;
use civic_api::{ForkReport, MAX_CHILDREN, VmInfo, validate_name};
use serde::Serialize;

use crate::advice;
use crate::birth::Birth;
use crate::cli::ForkArgs;
use crate::console::Signals;
use crate::monitor::Until;
use crate::rundir::{Found, RunDir};
use crate::show::print_json;

/// Forks a VM into one child or several, and prints their names, or the report.
pub async fn fork(dir: &RunDir, args: ForkArgs) -> anyhow::Result<()> {
    let names = names(&args.name, args.count)?;
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let mut birth = Birth::new(dir, &args.source, names.clone());
    let prepared = tokio::select! {
        prepared = birth.prepare(&args.child, Until::Told) => prepared,
        _ = signals.next() => Err(advice::error("interrupted before the fork", "nothing was forked")),
    };
    if let Err(error) = prepared {
        birth.give_up().await;
        return Err(error);
    }
    let report = match birth.fork(args.paused).await {
        Ok(report) => report,
        Err(error) => {
            birth.give_up().await;
            return Err(error);
        }
    };
    for (name, monitor) in names.iter().zip(birth.monitors()) {
        if report.children.iter().any(|child| child.name == *name)
            && let Some(monitor) = monitor
        {
            monitor.release();
        }
    }
    for failed in &report.failed {
        eprintln!("civic: '{}' could not be brought to life: {}", failed.name, failed.message);
    }
    if args.json {
        print_json(&report)?;
    } else {
        let mut out = std::io::stdout().lock();
        for child in &report.children {
            writeln!(out, "{}", child.name)?;
        }
        if std::io::stderr().is_terminal() {
            eprintln!("{}", told(&args.source, &report));
        }
    }
    if report.failed.is_empty() {
        return Ok(());
    }
    let message = format!("{} of {} children do not live", report.failed.len(), names.len());
    Err(advice::error(message, format!("see {}", dir.log(&report.failed[0].name).display())))
}

/// The children's names: that which was given, or numbered ones.
fn names(name: &str, count: usize) -> anyhow::Result<Vec<String>> {
    if !(1..=MAX_CHILDREN).contains(&count) {
        let message = format!("--count {count}: a fork has 1 to {MAX_CHILDREN} children");
        return Err(advice::error(message, "fork again for more"));
    }
    let names: Vec<_> = match count {
        1 => vec![name.to_owned()],
        _ => (1..=count).map(|n| format!("{name}-{n}")).collect(),
    };
    for name in &names {
        validate_name(name)?;
    }
    Ok(names)
}

fn told(source: &str, report: &ForkReport) -> String {
    let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
    let running = report.children.iter().map(|child| child.running_us).max().unwrap_or_default();
    format!(
        "{source} stood still for {}; {} after {}",
        ms(report.stages.pause_us),
        if report.children.len() == 1 { "its child ran" } else { "its children ran" },
        ms(running)
    )
}

/// A VM with those that were forked from it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Node {
    name: String,
    state: String,
    /// Of which fork of its parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u32>,
    children: Vec<Node>,
}

/// Shows which VM was forked from which.
pub async fn tree(dir: &RunDir, json: bool) -> anyhow::Result<()> {
    let mut vms = Vec::new();
    for name in dir.names()? {
        if let Found::Alive(info) = dir.find(&name).await {
            vms.push(*info);
        }
    }
    let roots = forest(&vms);
    if json {
        return print_json(&roots);
    }
    let mut out = std::io::stdout().lock();
    let mut lines = Vec::new();
    for root in &roots {
        lines.push(root.line());
        root.draw("", &mut lines);
    }
    for line in lines {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Roots are those whose parent is none, or no more.
fn forest(vms: &[VmInfo]) -> Vec<Node> {
    let names: BTreeSet<_> = vms.iter().map(|vm| vm.name.as_str()).collect();
    let mut children: BTreeMap<&str, Vec<&VmInfo>> = BTreeMap::new();
    let mut roots = Vec::new();
    for vm in vms {
        match vm.family.parent.as_ref().map(|parent| parent.name.as_str()) {
            // A VM cannot be its own ancestor, but names are used again.
            Some(parent) if names.contains(parent) && parent != vm.name => {
                children.entry(parent).or_default().push(vm);
            }
            _ => roots.push(vm),
        }
    }
    fn node(vm: &VmInfo, children: &mut BTreeMap<&str, Vec<&VmInfo>>) -> Node {
        let own = children.remove(vm.name.as_str()).unwrap_or_default();
        Node {
            name: vm.name.clone(),
            state: vm.state.to_string(),
            generation: vm.family.parent.as_ref().map(|parent| parent.generation).filter(|generation| *generation != 0),
            children: own.into_iter().map(|child| node(child, children)).collect(),
        }
    }
    let mut forest: Vec<_> = roots.into_iter().map(|root| node(root, &mut children)).collect();
    // Rings, which only used-again names can make.
    while let Some((_, ring)) = children.pop_first() {
        forest.extend(ring.into_iter().map(|vm| node(vm, &mut children)));
    }
    forest
}

impl Node {
    fn line(&self) -> String {
        match self.generation {
            Some(generation) => format!("{} ({}, fork {generation})", self.name, self.state),
            None => format!("{} ({})", self.name, self.state),
        }
    }

    fn draw(&self, indent: &str, lines: &mut Vec<String>) {
        for (n, child) in self.children.iter().enumerate() {
            let last = n + 1 == self.children.len();
            lines.push(format!("{indent}{}{}", if last { "└── " } else { "├── " }, child.line()));
            child.draw(&format!("{indent}{}", if last { "    " } else { "│   " }), lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use civic_api::{Family, ForkStages, ForkedVm, Parent, VmState};

    fn vm(name: &str, parent: Option<(&str, u32)>) -> VmInfo {
        let parent = parent.map(|(name, generation)| Parent { name: name.into(), generation });
        VmInfo {
            name: name.into(),
            state: VmState::Running,
            pid: 1,
            version: "0".into(),
            cpus: 1,
            memory_bytes: 0,
            kernel: "k".into(),
            audit: None,
            boots: 1,
            started_at_ms: None,
            run_ms: 0,
            devices: vec![],
            vcpus: vec![],
            consoles: vec![],
            programs: vec![],
            balloon: None,
            family: Family { parent, ..Family::default() },
            saving: None,
            ended: None,
        }
    }

    #[test]
    fn a_tree_is_drawn() {
        let vms = [
            vm("db", None),
            vm("web", None),
            vm("web-1", Some(("web", 1))),
            vm("web-2", Some(("web", 2))),
            vm("web-3", Some(("web", 0))),
            vm("x", Some(("gone", 1))),
        ];
        let mut lines = Vec::new();
        for root in forest(&vms) {
            lines.push(root.line());
            root.draw("", &mut lines);
        }
        assert_eq!(
            lines,
            [
                "db (running)",
                "web (running)",
                "├── web-1 (running, fork 1)",
                "├── web-2 (running, fork 2)",
                "└── web-3 (running)",
                "x (running, fork 1)"
            ]
        );
    }

    #[test]
    fn names_that_were_used_again_lose_nobody() {
        let vms = [vm("a", Some(("b", 1))), vm("b", Some(("a", 1))), vm("c", Some(("c", 1)))];
        let mut lines = Vec::new();
        for root in forest(&vms) {
            lines.push(root.line());
            root.draw("", &mut lines);
        }
        assert_eq!(lines.len(), 3, "{lines:?}");
    }

    #[test]
    fn children_have_names_and_a_report_says_the_pause() {
        assert_eq!(names("web-1", 1).unwrap(), ["web-1"]);
        assert_eq!(names("w", 3).unwrap(), ["w-1", "w-2", "w-3"]);
        assert!(names("w", 0).is_err() && names("w", MAX_CHILDREN + 1).is_err() && names("a/b", 1).is_err());
        let report = ForkReport {
            generation: 1,
            children: vec![ForkedVm { name: "w".into(), pid: 1, running_us: 12_345 }],
            failed: vec![],
            stages: ForkStages { pause_us: 1_980, ..ForkStages::default() },
        };
        assert_eq!(told("web", &report), "web stood still for 1.9 ms; its child ran after 12.3 ms");
    }
}
