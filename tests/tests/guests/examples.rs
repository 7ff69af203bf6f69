//! The worked examples of `docs/examples`, each as an operator would run it: its `run.sh`, on a Debian guest.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use civic_bench::curve::{self, Curve, Mark, Panel};
use civic_tests::linux::{Image, Page, Spec, Userland, Vm, from_env};

use super::ROOT_IMAGE;

/// The files of a folder of `docs/examples`.
macro_rules! example {
    ($name:literal: $($file:literal),+) => {
        Example { name: $name, files: &[$(($file, include_str!(concat!("../../../docs/examples/", $name, "/", $file)))),+] }
    };
}

/// A folder of `docs/examples`, with what its script and its guest need.
struct Example {
    name: &'static str,
    files: &'static [(&'static str, &'static str)],
}

const AGENTS: Example = example!("agents": "run.sh", "compare.awk", "load.pl");
const AUTOTUNING: Example = example!("autotuning": "run.sh", "apply");
const TROUBLESHOOTING: Example = example!("troubleshooting": "run.sh", "shop.py", "page.html");
/// What all of them have.
const CLIENTS: (&str, &str) = ("clients.pl", include_str!("../../../docs/examples/clients.pl"));

/// An example about to run.
struct Run {
    example: &'static Example,
    dir: tempfile::TempDir,
}

impl Run {
    /// Has its files in a folder of their own.
    fn new(example: &'static Example) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        for (name, text) in example.files.iter().chain([&CLIENTS]) {
            fs::write(dir.path().join(name), text)?;
        }
        Ok(Self { example, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The example's store, as an asset, to be written to.
    fn store(&self) -> Result<PathBuf> {
        let name = format!("{}.img", self.example.name);
        let copy = self.path(&name);
        let from = from_env("CIVIC_ASSETS")?.join(&name);
        let copied =
            Command::new("cp").args(["--sparse=always", "--reflink=auto"]).args([&from, &copy]).status()?.success();
        ensure!(copied, "cannot copy {}", from.display());
        Ok(copy)
    }

    /// Brings a file of the example's into a folder of the guest's.
    fn bring(&self, vm: &mut Vm, name: &str, folder: &str) -> Result<()> {
        let page = Page::serve(vm.tap.host, fs::read(self.path(name))?)?;
        vm.sh(&format!("curl -fsS --max-time 100 {} -o {folder}/{name}", page.url())).map(drop)
    }

    /// Has so many requests made by clients from outside, all at once.
    fn clients(&self, server: &str, page: &str, requests: u32) -> Result<Served> {
        let mut command = Command::new("perl");
        command.arg(self.path("clients.pl")).args([server, page, "4", &(10 * requests).to_string(), "0.1"]);
        let out = command.output()?;
        let said = String::from_utf8_lossy(&out.stdout);
        ensure!(out.status.success(), "clients: {}", String::from_utf8_lossy(&out.stderr));
        eprint!("{said}");
        Served::parse(&said)
    }

    /// A file that the script has written.
    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.path(name)).with_context(|| name.to_owned())
    }

    /// What the clients of a part of the script had to tell.
    fn served(&self, part: &str) -> Result<Served> {
        Served::parse(&self.read(&format!("clients-{part}"))?)
    }

    /// Runs the script to its end, with these variables; what it prints.
    fn script(&self, vm: &Vm, variables: &[(&str, &str)]) -> Result<String> {
        let begun = Instant::now();
        let mut command = Command::new("sh");
        command.arg("run.sh").current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("CIVIC", vm.command_line()?).env("VM", &vm.name).envs(variables.iter().copied());
        let out = command.output()?;
        let (said, complained) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        eprintln!("{said}{complained}run.sh took {:.1} s", begun.elapsed().as_secs_f64());
        ensure!(out.status.success(), "run.sh ended with {}: {complained}", out.status);
        Ok(said.into_owned())
    }

    /// Leaves a file of the run's where somebody has asked for it, by `CIVIC_EXAMPLES`.
    fn keep(&self, name: &str) -> Result<()> {
        let Ok(to) = from_env("CIVIC_EXAMPLES") else { return Ok(()) };
        let to = to.join(self.example.name);
        fs::create_dir_all(&to)?;
        fs::copy(self.path(name), to.join(name))?;
        Ok(())
    }
}

/// Where the guest has the disk of services.
const SERVICES: &str = "/srv/services";

/// What clients.pl tells.
struct Served {
    /// Requests.
    asked: f64,
    /// Those that were answered before the last had to be asked.
    in_time: f64,
    /// Of all, as long as the last one took.
    per_second: f64,
    /// Milliseconds within which 95 % were answered, from when they were due.
    most: f64,
}

impl Served {
    fn parse(told: &str) -> Result<Self> {
        let last = told.trim_end().lines().last().unwrap_or_default();
        let numbers = last.split(|c: char| !c.is_ascii_digit() && c != '.').map(|word| word.trim_end_matches('.'));
        let numbers: Vec<f64> = numbers.filter_map(|word| word.parse().ok()).collect();
        let [asked, in_time, _, _, per_second, _, _, most] = numbers[..] else { bail!("clients told {told:?}") };
        Ok(Self { asked, in_time, per_second, most })
    }

    fn share_in_time(&self) -> f64 {
        self.in_time / self.asked
    }
}

/// The guest of all examples: a Debian that its owner lets programs be started in, with a disk of services.
fn boot() -> Result<Vm> {
    let services = format!("path={},overlay,id=services", from_env("CIVIC_ASSETS")?.join("services.img").display());
    let mut vm = Vm::start(&Spec {
        kernel: "6.12-cloud",
        image: Image::BzImage,
        userland: Userland::Debian,
        cpus: 1,
        memory: "1G",
        more: vec!["--allow-programs".into(), "--disk".into(), services],
    })?;
    vm.sh("systemctl is-system-running --wait || systemctl --failed --no-legend --plain")?;
    vm.sh(&format!(
        "mkdir -p {SERVICES} && mount /dev/disk/by-id/virtio-services {SERVICES} && mount -t proc proc {SERVICES}/proc && \
         mount --bind /dev {SERVICES}/dev && mount -t tmpfs tmpfs {SERVICES}/tmp && \
         cp /etc/hosts {SERVICES}/etc/"
    ))?;
    Ok(vm)
}

/// An example on a guest.
type On = fn(&mut Vm) -> Result<()>;

/// All of them, by their folders.
pub const ALL: [(&str, On); 3] = [("agents", agents), ("autotuning", autotuning), ("troubleshooting", troubleshooting)];

/// All of them, in turn on one guest: in the testbed it takes a minute to boot.
pub fn all() -> Result<()> {
    let mut failed = None;
    on_a_guest(|vm| {
        for (name, example) in ALL {
            let begun = Instant::now();
            let done = example(vm).with_context(|| name.to_owned());
            eprintln!("{name} took {:.1} s", begun.elapsed().as_secs_f64());
            if let Err(error) = done {
                eprintln!("{error:#}");
                failed = failed.take().or(Some(error));
            }
        }
        failed.take().map_or(Ok(()), Err)
    })
}

/// One alone.
pub fn one(example: On) -> Result<()> {
    on_a_guest(example)
}

fn on_a_guest(work: impl FnOnce(&mut Vm) -> Result<()>) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let mut vm = boot()?;
    work(&mut vm)?;
    vm.check_kernel_log()?;
    vm.stop()
}

/// What an agent saw in a fork, beside what was true in the source: a line of `curve`.
struct Look {
    agent: String,
    at: f64,
    /// Percent of a processor since the look before: seen, true.
    cpu: (f64, f64),
    /// MiB.
    memory: (f64, f64),
}

impl Look {
    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let agent = words.next().context("an empty line")?.to_owned();
        let numbers: Vec<f64> = words.map(str::parse).collect::<Result<_, _>>().with_context(|| line.to_owned())?;
        let [at, cpu_seen, cpu, memory_seen, memory] = numbers[..] else { bail!("compare.awk told {line:?}") };
        Ok(Self { agent, at, cpu: (cpu_seen, cpu), memory: (memory_seen, memory) })
    }
}

/// How far what was seen is from what was true, as a share of the latter: all looks together (root of the mean square), and the furthest.
fn deviation(values: &[(f64, f64)]) -> (f64, f64) {
    let mean = values.iter().map(|(_, truth)| truth).sum::<f64>() / values.len() as f64;
    let off = values.iter().map(|(seen, truth)| (seen - truth).abs() / mean);
    let square = off.clone().map(|off| off * off).sum::<f64>() / values.len() as f64;
    (square.sqrt(), off.fold(0.0, f64::max))
}

/// Stock agents in frozen forks see what is true in their source.
fn agents(vm: &mut Vm) -> Result<()> {
    const PERIOD: &str = "160";
    const ROUNDS: usize = 16;
    /// Over how many rounds the use of the processor is taken.
    const OVER: usize = 4;
    /// How far the curves may be apart.
    const APART: f64 = 0.04;
    let run = Run::new(&AGENTS)?;
    let store = run.store()?.display().to_string();
    run.bring(vm, "load.pl", "/root")?;
    vm.sh("mkdir /run/load; ln -s /run/load/truth /var/www/html/")?;
    let load = format!("-E MALLOC_MMAP_THRESHOLD_=131072 perl /root/load.pl {PERIOD} /run/load/truth");
    // Once it has what it begins with.
    serve(vm, "load", &load, "[ -s /run/load/truth ] && [ $(wc -l < /run/load/truth) -gt 40 ]")?;
    let truth = format!("http://{}/truth", vm.tap.guest);
    let (rounds, over) = (ROUNDS.to_string(), OVER.to_string());
    run.script(vm, &[("STORE", &store), ("TRUTH", &truth), ("EVERY", "10s"), ("ROUNDS", &rounds), ("OVER", &over)])?;
    vm.sh("systemctl stop load; rm /var/www/html/truth")?;
    let curve = fs::read_to_string(run.path("curve"))?;
    let looks = curve.lines().map(Look::parse).collect::<Result<Vec<_>>>()?;
    let truth = fs::read_to_string(run.path("truth"))?;
    fs::write(run.path("curve.svg"), plot(&looks, OVER, &truth)?)?;
    ["seen", "truth", "curve", "curve.svg"].into_iter().try_for_each(|file| run.keep(file))?;
    for agent in ["collectd", "snmpd"] {
        let of: Vec<_> = looks.iter().filter(|look| look.agent == agent).collect();
        ensure!(of.len() == ROUNDS - OVER, "{agent} told of {} looks after its first {OVER}", of.len());
        for (what, value) in
            [("processor", (|look| look.cpu) as fn(&Look) -> (f64, f64)), ("memory", |look| look.memory)]
        {
            let values: Vec<_> = of.iter().map(|look| value(look)).collect();
            let truths = || values.iter().map(|(_, truth)| *truth);
            let (least, most) = (truths().fold(f64::MAX, f64::min), truths().fold(0.0, f64::max));
            let (apart, furthest) = deviation(&values);
            eprintln!(
                "{agent}, {what}: {least:.1} to {most:.1} in truth; apart by {:.1} %, at most {:.1} %",
                100.0 * apart,
                100.0 * furthest
            );
            // What stands still is not hard to agree with.
            ensure!(most > 1.5 * least, "{agent}, {what}: the truth was only {least} to {most}");
            ensure!(apart <= APART, "{agent}, {what}: {:.1} % apart", 100.0 * apart);
        }
    }
    // What they keep is there from fork to fork.
    let checked = vm.civic_with(&["store", "check", &store])?;
    ensure!(checked.status.success(), "{checked:?}");
    Ok(())
}

/// What was seen as points, what was true as lines.
fn plot(looks: &[Look], over: usize, truth: &str) -> Result<String> {
    /// Seconds of the record that a point of the true use of the processor is made of.
    const WINDOW: f64 = 10.0;
    let lines = truth.lines().map(|line| line.split(' ').map(str::parse).collect::<Result<Vec<f64>, _>>());
    let lines = lines.collect::<Result<Vec<_>, _>>()?;
    let begun = lines.first().and_then(|line| line.first()).copied().context("nothing was recorded")?;
    let column = |n: usize| lines.iter().map(|line| (line[0] - begun, line[n] / 1024.0)).collect::<Vec<_>>();
    let mut cpu = Vec::new();
    let mut from = &lines[0];
    for line in &lines {
        let passed = line[0] - from[0];
        if passed >= WINDOW {
            cpu.push((f64::midpoint(from[0], line[0]) - begun, 100.0 * (line[1] - from[1]) / passed));
            from = line;
        }
    }
    let seen = |agent: &str, point: &dyn Fn(&Look, f64) -> (f64, f64)| {
        let of: Vec<_> = looks.iter().filter(|look| look.agent == agent).collect();
        let points = of.windows(over + 1).map(|looks| point(looks[over], looks[0].at)).collect();
        Curve { label: format!("{agent}, in forks"), mark: Mark::Points, points }
    };
    let line = |label: &str, points| Curve { label: label.into(), mark: Mark::Line, points };
    // What is used between two looks belongs to the middle.
    let used = |look: &Look, before: f64| (f64::midpoint(look.at, before) - begun, look.cpu.0);
    let had = |look: &Look, _| (look.at - begun, look.memory.0);
    let panels = [
        Panel {
            axis: "the service's use of the processor, %".into(),
            curves: vec![line("the service's own account", cpu), seen("collectd", &used), seen("snmpd", &used)],
        },
        Panel {
            axis: "its control group's memory, MiB".into(),
            curves: vec![line("by its own kernel", column(3)), seen("collectd", &had)],
        },
        Panel {
            axis: "what is resident of its process, MiB".into(),
            curves: vec![line("by its own kernel", column(4)), seen("snmpd", &had)],
        },
    ];
    curve::svg("Stock agents in frozen forks, and the truth", &panels).context("nothing is to be seen")
}

/// Starts a service in the guest, with these options of systemd-run, and waits until this command succeeds.
fn serve(vm: &mut Vm, unit: &str, service: &str, ready: &str) -> Result<()> {
    vm.sh(&format!("systemd-run -q --unit {unit} {service}"))?;
    let told = vm.sh(&format!(
        "until {ready}; do systemctl -q is-active {unit} || break; sleep 0.2; done; systemctl is-active {unit} || journalctl --no-pager -u {unit}"
    ))?;
    ensure!(told == "active", "the service {unit} has ended:\n{told}");
    Ok(())
}

/// The store that the guest's own disk of services is made of, as forks may have it.
fn services() -> Result<String> {
    Ok(format!("{},overlay", from_env("CIVIC_ASSETS")?.join("services.img").display()))
}

/// Milliseconds of processor time that nginx has used.
fn nginx_ms(vm: &mut Vm) -> Result<f64> {
    let used = vm.sh("awk '/^usage_usec/ { print $2 }' /sys/fs/cgroup/system.slice/nginx.service/cpu.stat")?;
    Ok(used.parse::<f64>()? / 1e3)
}

/// Settings of nginx and of the kernel are searched in forks, and what is found serves pages faster in the guest.
fn autotuning(vm: &mut Vm) -> Result<()> {
    const FOUND: &str = "gzip=9 wmem=4608";
    const REQUESTS: u32 = 24;
    let run = Run::new(&AUTOTUNING)?;
    // Words that a compressor has something to do with, and a picture that it has nothing to do with.
    vm.sh("perl -e 'srand 1; print join \" \", map { (\"a\"..\"z\")[rand 26] x (1 + rand 4) . int rand 1000 } 1..48000' > /var/www/html/goods.html; \
           head -c 512K /dev/urandom > /var/www/html/goods.jpg")?;
    fs::write(run.path("pages"), "/goods.html\n/goods.jpg\n")?;
    let pages = format!("@{}", run.path("pages").display());
    let settings: Vec<_> = FOUND.split(' ').collect();
    let apply = fs::read(run.path("apply"))?;
    let applied = vm.exec(&[], &[&["/bin/sh", "-s", "--"], &*settings].concat(), &apply)?;
    ensure!(applied.status.success(), "{applied:?}");
    let server = format!("{}:80", vm.tap.guest);
    let serve = |vm: &mut Vm| {
        let before = nginx_ms(vm)?;
        let served = run.clients(&server, &pages, REQUESTS)?;
        anyhow::Ok((served.per_second, (nginx_ms(vm)? - before) / f64::from(REQUESTS)))
    };
    let (rate_before, before) = serve(vm)?;
    let store = services()?;
    run.script(vm, &[("STORE", &store), ("FOUND", FOUND), ("PUSH", "yes")])?;
    let (rate_after, after) = serve(vm)?;
    let best = run.read("best")?.trim().to_owned();
    eprintln!(
        "in the guest {before:.1} ms of processor time a request and {rate_before:.1} requests/s before, \
         {after:.1} ms and {rate_after:.1} with {best}"
    );
    for parameter in ["gzip", "wmem"] {
        ensure!(run.read(&format!("by-{parameter}"))?.lines().count() == 3, "not all forks for {parameter} told");
    }
    // What was as bad as it can be is not the best, and what was found is what the guest has now.
    ensure!(!best.contains("gzip=9") && !best.contains("wmem=4608"), "the best is {best}");
    let settings =
        vm.sh("curl -sI http://127.0.0.1/ | grep -i x-settings | tr -d '\\r'; cut -f 2 /proc/sys/net/ipv4/tcp_wmem")?;
    let wmem = best.rsplit('=').next().unwrap_or_default();
    ensure!(settings == format!("X-Settings: {best}\n{wmem}"), "{best} was found, the guest has {settings}");
    ensure!(after < 0.7 * before, "{before:.1} ms a request before, {after:.1} after");
    vm.sh("rm /etc/nginx/conf.d/tuned.conf; nginx -s reload").map(drop)
}

/// A leak of a web application is found by what cannot be done to the guest itself.
fn troubleshooting(vm: &mut Vm) -> Result<()> {
    let run = Run::new(&TROUBLESHOOTING)?;
    for file in ["shop.py", "page.html"] {
        run.bring(vm, file, &format!("{SERVICES}/root"))?;
    }
    vm.sh(
        "echo 'server { listen 82; access_log off; location / { proxy_pass http://127.0.0.1:8000; } }' > /etc/nginx/conf.d/shop.conf; \
         nginx -s reload",
    )?;
    let shop = format!("-p LimitNOFILE=65536 chroot {SERVICES} python3 /root/shop.py 8000 /root");
    serve(vm, "shop", &shop, "curl -fs http://127.0.0.1:82/ | grep -q Welcome")?;
    let server = format!("{}:82", vm.tap.guest);
    let rate = run.clients(&server, "/", 60)?.per_second;
    let (store, rate, there) =
        (services()?, format!("{:.1}", rate / 8.0), format!("/usr/sbin/chroot {SERVICES} find-leak"));
    let variables =
        [("STORE", &*store), ("SERVER", &server), ("RATE", &rate), ("SECONDS_EACH", "20"), ("THERE", &there)];
    run.script(vm, &variables)?;
    let found = run.read("found")?;
    let leak = |line: &str| line.starts_with("opened ") && line.ends_with("closed 0 times: /root/page.html");
    ensure!(found.lines().any(leak), "strace did not find it: {found}");
    ensure!(found.contains("open files are in the dict ['pages']"), "gdb did not find it: {found}");
    let [nobody, fork, source] = ["nobody", "fork", "source"].map(|part| run.served(part));
    let (nobody, fork, source) = (nobody?, fork?, source?);
    ensure!(fork.share_in_time() > 0.95 * nobody.share_in_time(), "clients lost by a look into a fork");
    // How long they wait for it is another matter where guest, fork and clients share a processor.
    ensure!(source.most > 4.0 * nobody.most, "clients did not notice what was done in the source itself");
    vm.sh("systemctl stop shop; rm /etc/nginx/conf.d/shop.conf; nginx -s reload").map(drop)
}
