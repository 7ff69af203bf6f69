//! A Debian guest that serves pages under load while it writes its disk, and is forked on a schedule.
//!
//! Each child is asked on its console (its network card is on a wire that leads nowhere) what its own nginx serves, by the shell that
//! its source had there, without starting a program: the page that the source had in memory at the fork and has overwritten since, and the
//! count of requests of that moment. Then it is killed.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use civic_api::ForkReport;

use super::{Answer, Load, ask, number};
use crate::linux::{Image, STEP, Spec, Userland, Vm};

/// Where nginx serves what is in memory, and its count.
const PORT: u16 = 81;
/// The page is in a tmpfs; the count in memory that nginx's processes share. One process serves: two that count at a time may tell the
/// same number.
const SERVE: &str = "sed -i 's/^worker_processes .*/worker_processes 1;/' /etc/nginx/nginx.conf; mkdir -p /run/page; echo boot > /run/page/index.html; echo 'server { listen 81; access_log off; root /run/page; \
    location = / { stub_status; } }' > /etc/nginx/conf.d/count.conf; nginx -s reload";
/// `get PATH` by the shell alone.
const GET: &str = "get() { exec 3<>/dev/tcp/127.0.0.1/81; printf 'GET %s HTTP/1.0\\r\\n\\r\\n' \"$1\" >&3; \
    while read -r line <&3; do echo \"$line\"; done; exec 3>&-; }";
/// Two contents in turn, written past the cache, flushed, read back past the cache and compared.
const WRITE: &str = "for n in 0 1; do dd if=/dev/urandom of=/root/data$n bs=64k count=4 status=none; done; \
    (n=0; while :; do dd if=/root/data$((n % 2)) of=/root/copy bs=64k oflag=direct conv=fsync status=none || echo write $n >> /run/disk.bad; \
    dd if=/root/copy bs=64k iflag=direct status=none | cmp -s - /root/data$((n % 2)) || echo read $n >> /run/disk.bad; \
    n=$((n + 1)); echo $n > /run/disk.now; sleep 0.2; done) & true";
/// Of what the guest answers when nothing else is asked of it, what it is given to do.
const SHARE: f64 = 0.25;

/// The guest.
pub struct Served {
    /// It.
    pub vm: Vm,
    server: SocketAddr,
    forks: u32,
}

/// What some time of load showed.
pub struct Phase {
    /// How long requests were sent.
    pub length: Duration,
    /// What became of each.
    pub answers: Vec<Answer>,
    /// What each fork told.
    pub forks: Vec<ForkReport>,
    /// What the disk's writer did, rounds of it per second.
    pub disk: f64,
}

impl Phase {
    /// Why requests were lost, those that were.
    pub fn lost(&self) -> Vec<&str> {
        self.answers.iter().filter_map(|answer| answer.number.as_ref().err().map(String::as_str)).collect()
    }

    /// Milliseconds from when each request was due until its answer was there.
    pub fn latencies(&self) -> Vec<f64> {
        let answered = self.answers.iter().filter(|answer| answer.number.is_ok());
        answered.map(|answer| answer.took.as_secs_f64() * 1e3).collect()
    }

    /// The share of the requests that were answered while others were still being sent.
    pub fn answered(&self) -> f64 {
        let Some(first) = self.answers.first() else { return f64::NAN };
        let end = first.due + self.length;
        let in_time = |answer: &&Answer| answer.number.is_ok() && answer.due + answer.took <= end;
        self.answers.iter().filter(in_time).count() as f64 / self.answers.len() as f64
    }
}

/// What [`Served::start`] may boot where nothing depends on the kernel: Debian with so many vCPUs.
pub fn debian(cpus: u8) -> Spec {
    Spec {
        kernel: "6.12-cloud",
        image: Image::BzImage,
        userland: Userland::Debian,
        cpus,
        memory: "1G",
        more: Vec::new(),
    }
}

impl Served {
    /// Boots it and gives it its work.
    pub fn start(spec: &Spec) -> Result<Self> {
        let mut vm = Vm::start(spec)?;
        vm.sh("systemctl is-system-running --wait || systemctl --failed --no-legend --plain")?;
        vm.sh(SERVE)?;
        vm.sh(GET)?;
        vm.sh(WRITE)?;
        let server = (vm.tap.guest, PORT).into();
        let deadline = Instant::now() + STEP;
        while let Err(e) = ask(server) {
            ensure!(Instant::now() < deadline, "nginx does not serve its count: {e:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(Self { vm, server, forks: 0 })
    }

    /// How many requests a second it can be given here: a share of what it answers to one client after the other.
    pub fn rate(&self) -> Result<f64> {
        const REQUESTS: u32 = 100;
        let begun = Instant::now();
        for _ in 0..REQUESTS {
            ask(self.server)?;
        }
        Ok(SHARE * f64::from(REQUESTS) / begun.elapsed().as_secs_f64())
    }

    /// Sends it so many requests a second from now on.
    pub fn load(&self, rate: f64) -> Result<Load> {
        Load::start(self.server, rate)
    }

    /// Sends it so many requests a second for as long as this, and forks it every so often meanwhile. A fork that takes longer than that
    /// delays the next.
    pub fn phase(&mut self, rate: f64, every: Option<Duration>, length: Duration) -> Result<Phase> {
        let load = self.load(rate)?;
        let (begun, before) = (Instant::now(), self.rounds()?);
        let mut forks = Vec::new();
        if let Some(every) = every {
            let mut due = begun + every;
            while due < begun + length {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                forks.push(self.fork(&load).with_context(|| format!("fork {}", self.forks))?);
                due = (due + every).max(Instant::now());
            }
        }
        std::thread::sleep((begun + length).saturating_duration_since(Instant::now()));
        let (length, after) = (begun.elapsed(), self.rounds()?);
        let disk = (after - before) as f64 / begun.elapsed().as_secs_f64();
        Ok(Phase { length, answers: load.finish()?, forks, disk })
    }

    /// Has clients ask for pages for as long as this, each as soon as the one before is there, and forks it every so often meanwhile: how
    /// many pages were served, and what each fork told.
    pub fn saturated(&mut self, length: Duration, every: Option<Duration>) -> Result<(u64, Vec<ForkReport>)> {
        const CLIENTS: usize = 4;
        let (server, end) = (self.server, Instant::now() + length);
        let client = move || -> Result<u64> {
            let mut served = 0;
            while Instant::now() < end {
                ask(server)?;
                served += 1;
            }
            Ok(served)
        };
        std::thread::scope(|scope| {
            let clients = [(); CLIENTS].map(|()| scope.spawn(client));
            let mut forks = Vec::new();
            let mut due = every.map(|every| Instant::now() + every / 2);
            while let (Some(every), Some(at)) = (every, due.filter(|due| *due < end)) {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                self.forks += 1;
                let n = self.forks;
                let (child, told) = self.vm.fork(&format!("child{n}"))?;
                child.kill()?;
                self.vm.sh(&format!("echo after-{n} > /run/page/index.html"))?;
                forks.push(told);
                due = Some((at + every).max(Instant::now()));
            }
            let mut served = 0;
            for client in clients {
                served += client.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            Ok((served, forks))
        })
    }

    /// How many rounds the disk's writer has done.
    fn rounds(&mut self) -> Result<u64> {
        let rounds = self.vm.sh("until read n 2>/dev/null < /run/disk.now; do :; done; echo $n")?;
        rounds.trim().parse().with_context(|| format!("{rounds:?} rounds"))
    }

    /// Forks it, and checks the child.
    fn fork(&mut self, load: &Load) -> Result<ForkReport> {
        self.forks += 1;
        let n = self.forks;
        self.vm.sh(&format!("echo before-{n} > /run/page/index.html"))?;
        let least = load.highest();
        let (mut child, report) = self.vm.fork(&format!("child{n}"))?;
        self.vm.sh(&format!("echo after-{n} > /run/page/index.html"))?;
        // What was on its way at the fork is counted in both, and may be served there in another order.
        let most = load.on_their_way() + ask(self.server).context("the source after the fork")?;
        let said = child.sh("get /index.html; get /; cat /run/disk.bad 2>/dev/null || true")?;
        let said_by_child =
            || format!("the child's nginx, where the source had answered {least} and then {most}:\n{said}");
        ensure!(said.lines().any(|line| line == format!("before-{n}")), "another page from {}", said_by_child());
        let count = number(&said).with_context(said_by_child)?;
        ensure!(count > least && count <= most, "another moment's count from {}", said_by_child());
        ensure!(!said.contains("write ") && !said.contains("read "), "its disk is not as it was: {}", said_by_child());
        child.kill()?;
        Ok(report)
    }

    /// Checks that nothing went wrong in the guest, and stops it.
    pub fn end(mut self) -> Result<()> {
        let page = self.vm.sh("read page < /run/page/index.html; echo $page")?;
        ensure!(self.forks == 0 || page == format!("after-{}", self.forks), "the source's page is {page:?}");
        let bad = self.vm.sh("cat /run/disk.bad 2>/dev/null || true")?;
        ensure!(bad.is_empty(), "the disk went wrong:\n{bad}");
        self.vm.check_kernel_log()?;
        self.vm.stop()
    }
}
