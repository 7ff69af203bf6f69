//! `civic inspect` with the tools of a store that `civic store build` has made, in forks of a Debian guest that serves pages: what they say is
//! what the guest itself says of the moment, and nothing of it is in the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use civic_tests::linux::{Spec, Vm, run};
use civic_tests::stored::{Look, trace, workers};

use super::ROOT_IMAGE;

/// The guest's processes but for those of its kernel, which come and go as they like.
const PROCESSES: &str = "ps --deselect --ppid 2 -p 2 -o pid=,comm=";
/// Who listens to TCP.
const LISTENERS: &str = "ss -Hltnp";
/// What a process has open, except for what is mapped.
const FILES: &str = "lsof -nPw -a -d 0-1023 -F fn -p";
/// Between what one tool says and the next.
const NEXT: &str = "== next ==\n";
/// What no page is called.
const PAGE: &str = "/asked-of-a-fork";

/// Each tool once: those that only look in one fork, the one that changes what it looks at in another.
pub fn debian(spec: &Spec) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let mut vm = Vm::start(spec)?;
    vm.sh("systemctl is-system-running --wait || systemctl --failed --no-legend --plain")?;
    let workers = workers(&mut vm)?;
    let worker = workers.split(',').next().context("nginx has no worker")?;
    timed("ps, ss and lsof", || seen(&mut vm, worker))?;
    timed("strace", || traced(&mut vm, &workers))?;
    vm.check_kernel_log()?;
    vm.stop()
}

fn timed(tool: &str, look: impl FnOnce() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    look().context(tool.to_owned())?;
    eprintln!("{tool} took {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Lines without what columns are filled with.
fn lines(text: &str) -> BTreeSet<String> {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(words).filter(|line| !line.is_empty()).collect()
}

/// What looks around says the truth.
fn seen(vm: &mut Vm, worker: &str) -> Result<()> {
    let before = lines(&vm.sh(PROCESSES)?);
    let look = [PROCESSES, LISTENERS, &format!("{FILES} {worker}")].join(&format!("; echo -n '{NEXT}'; "));
    let look = Look::at(vm, &["bash", "-c", &look])?;
    eprintln!("{}", look.told["stages"]);
    let said = look.stdout;
    let after = lines(&vm.sh(PROCESSES)?);
    let [processes, sockets, files] = said.split(NEXT).collect::<Vec<_>>()[..] else { bail!("they said {said}") };
    // A fork has more: its udev looks at what was plugged in.
    let (there, stayed) = (lines(processes), before.intersection(&after).collect::<BTreeSet<_>>());
    let missing: Vec<_> = stayed.iter().filter(|line| !there.contains(**line)).collect();
    ensure!(missing.is_empty(), "{missing:?} are not among\n{processes}");
    ensure!(["1 systemd", "nginx"].iter().all(|name| stayed.iter().any(|line| line.ends_with(name))), "{stayed:?}");
    listeners(vm, &lines(sockets)).context("ss")?;
    open_files(vm, worker, files).context("lsof")
}

/// The same sockets and processes, down to the descriptors.
fn listeners(vm: &mut Vm, seen: &BTreeSet<String>) -> Result<()> {
    let there = lines(&vm.sh(LISTENERS)?);
    ensure!(there.iter().any(|line| line.contains("0.0.0.0:80") && line.contains("nginx")), "{there:?}");
    ensure!(*seen == there, "in the fork {seen:?}, in the guest {there:?}");
    Ok(())
}

/// Every descriptor of a worker, the names of its files, and its port.
fn open_files(vm: &mut Vm, worker: &str, said: &str) -> Result<()> {
    let (mut seen, mut descriptor) = (BTreeMap::new(), None);
    for line in said.lines() {
        match line.split_at_checked(1) {
            Some(("f", number)) => descriptor = Some(number),
            Some(("n", name)) => drop(seen.insert(descriptor.take().with_context(|| said.to_owned())?, name)),
            _ => {}
        }
    }
    let there = vm.sh(&format!("cd /proc/{worker}/fd && for n in *; do echo $n $(readlink $n); done"))?;
    let there: BTreeMap<_, _> = there.lines().filter_map(|line| line.split_once(' ')).collect();
    let both = || format!("in the fork {seen:?}, in the guest {there:?}");
    ensure!(seen.keys().eq(there.keys()), "{}", both());
    let mut named = there.iter().filter(|(_, name)| name.starts_with('/')).peekable();
    ensure!(named.peek().is_some() && named.all(|(descriptor, name)| seen.get(descriptor) == Some(name)), "{}", both());
    ensure!(seen.values().any(|name| *name == "*:80"), "{}", both());
    Ok(())
}

/// A request that was made in the fork is in the trace of its worker, and neither it nor the tracer is in the guest.
fn traced(vm: &mut Vm, workers: &str) -> Result<()> {
    let look = Look::at(vm, &trace(workers, PAGE))?;
    let trace = &look.stdout;
    let call = |name: &str, about: &str| trace.lines().any(|line| line.contains(name) && line.contains(about));
    let asked = format!("GET {PAGE} HTTP/1.0");
    ensure!(call("accept4(", "inet_addr(\"127.0.0.1\")"), "no accept4 in:\n{trace}");
    ensure!(call("recvfrom(", &asked), "no recvfrom of the request in:\n{trace}");
    let sought = format!("\"/var/www/html{PAGE}\"");
    let lines = || trace.lines().filter(|line| line.contains(&sought));
    ensure!(
        lines().next().is_some() && lines().all(|line| line.ends_with("ENOENT (No such file or directory)")),
        "{trace}"
    );
    ensure!(call("writev(", "404 Not Found"), "no writev of the answer in:\n{trace}");
    ensure!(call("write(", &asked), "no write to the log in:\n{trace}");
    let logged = vm.sh(&format!("grep -c '{PAGE}' /var/log/nginx/access.log || true"))?;
    let tracers = vm.sh(&format!(
        "for worker in {}; do grep TracerPid /proc/$worker/status; done | tr -d '\\t'",
        workers.replace(',', " ")
    ))?;
    ensure!(logged == "0" && tracers.lines().all(|line| line == "TracerPid:0"), "{logged} in the log, {tracers}");
    let page = run("curl", &["-sS", "--max-time", "60", &format!("http://{}/", vm.tap.guest)])?;
    ensure!(page.contains("nginx in a Civic guest"), "nginx served {page:?}");
    Ok(())
}
