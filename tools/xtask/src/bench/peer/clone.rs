//! QEMU's nearest to a fork: a `background-snapshot`, streamed into a second QEMU that waits for it.
//!
//! ```text
//!  first    migrate ─▶ STOP ─▶ RESUME ─▶ … stream …
//!  second   (waits)                        … loads … ─▶ RESUME
//! ```
//!
//! The paper's clone runs at once and fetches its memory when it is touched, by post-copy; a stock QEMU's post-copy source cannot run on. So
//! the second one has all of its memory before it runs: it starts later, and is faster from then on. What the source does meanwhile is
//! nobody's concern where only the clone is looked at: there, a third one is had from the second by post-copy ([`Second::clone_on_demand`]).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::bench::guest::Guest;
use crate::bench::machine::{Spec, Tools};
use crate::bench::qmp::{Event, Qmp};

/// Where a second QEMU listens: for the snapshot, and for us.
#[derive(Clone)]
pub struct Sockets {
    stream: PathBuf,
    control: PathBuf,
    stub: PathBuf,
}

impl Sockets {
    /// In this folder.
    pub fn new(work: &Path, who: &str) -> Self {
        let socket = |name: &str| work.join(format!("{who}.{name}"));
        Self { stream: socket("stream"), control: socket("qmp"), stub: socket("gdb") }
    }

    /// QEMU's options: to wait for a snapshot, and to take commands.
    pub fn options(&self) -> Vec<String> {
        let incoming = format!("unix:{}", self.stream.display());
        ["-incoming", &incoming, "-qmp", &listens(&self.control)].map(str::to_owned).into()
    }

    /// The same for [`Second::clone_on_demand`]: what it takes must be said before it listens, and it must not run by itself.
    pub fn deferred_options(&self) -> Vec<String> {
        ["-S", "-incoming", "defer", "-qmp", &listens(&self.control)].map(str::to_owned).into()
    }

    /// To take commands, of one that boots a guest of its own.
    pub fn control_options(&self) -> Vec<String> {
        ["-qmp", &listens(&self.control)].map(str::to_owned).into()
    }

    /// And to have its guest changed.
    pub fn stub_options(&self) -> [String; 2] {
        ["-gdb".to_owned(), listens(&self.stub)]
    }

    /// The GDB stub's.
    pub fn stub(&self) -> &Path {
        &self.stub
    }
}

/// A socket that QEMU makes.
pub fn listens(socket: &Path) -> String {
    format!("unix:{},server=on,wait=off", socket.display())
}

/// The QEMU that snapshots are taken of.
pub struct Source<'a> {
    tools: &'a Tools,
    /// Its guest.
    pub guest: Guest<'a>,
    /// Its control socket.
    pub qmp: Qmp,
    sockets: Sockets,
    limit: Duration,
}

/// The QEMU that takes one.
pub struct Second<'a> {
    /// Its guest.
    pub guest: Guest<'a>,
    /// Its control socket.
    pub qmp: Qmp,
}

impl<'a> Source<'a> {
    /// Whatever is asked of it may take as long as `limit`.
    pub fn new(tools: &'a Tools, guest: Guest<'a>, control: &Path, sockets: Sockets, limit: Duration) -> Result<Self> {
        let mut qmp = Qmp::connect(control, limit)?;
        capabilities(&mut qmp, &[(SNAPSHOT, true)], limit)?;
        // No limit: by default QEMU sends 128 MiB a second.
        qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }), limit)?;
        Ok(Self { tools, guest, qmp, sockets, limit })
    }

    /// Has its guest stand still.
    pub fn halt(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}), self.limit)?;
        self.qmp.event("STOP", self.limit).map(drop)
    }

    /// Lets it run.
    pub fn go(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({}), self.limit)?;
        self.qmp.event("RESUME", self.limit).map(drop)
    }

    /// Starts a second QEMU, which has [`Sockets::options`].
    pub fn second(&self, spec: &Spec, name: String) -> Result<Second<'a>> {
        Second::start(self.tools, spec, &self.sockets, name, self.limit)
    }

    /// Begins a snapshot: when its guest had stopped, and when it ran on.
    pub fn snapshot(&mut self) -> Result<[Event; 2]> {
        let uri = format!("unix:{}", self.sockets.stream.display());
        self.qmp.execute("migrate", json!({ "uri": uri }), self.limit)?;
        Ok([self.qmp.event("STOP", self.limit)?, self.qmp.event("RESUME", self.limit)?])
    }

    /// Waits until QEMU has done with the snapshot.
    pub fn complete(&mut self) -> Result<()> {
        complete(&mut self.qmp, self.limit)
    }

    /// Writes all of a guest that runs to a file, while it stands still: when it had stopped, and when it ran on.
    pub fn save(&mut self, file: &Path) -> Result<[Event; 2]> {
        // Events tell the end of it at once, which is within the guest's pause.
        capabilities(&mut self.qmp, &[(SNAPSHOT, false), (EVENTS, true)], self.limit)?;
        self.qmp.execute("stop", json!({}), self.limit)?;
        let stopped = self.qmp.event("STOP", self.limit)?;
        self.qmp.execute("migrate", json!({ "uri": format!("file:{}", file.display()) }), self.limit)?;
        loop {
            let told = self.qmp.event("MIGRATION", self.limit)?.data;
            match told["status"].as_str() {
                Some("completed") => break,
                Some("setup" | "active" | "device") => {}
                _ => bail!("QEMU's migration to a file: {told}"),
            }
        }
        self.qmp.execute("cont", json!({}), self.limit)?;
        let resumed = self.qmp.event("RESUME", self.limit)?;
        capabilities(&mut self.qmp, &[(EVENTS, false), (SNAPSHOT, true)], self.limit)?;
        Ok([stopped, resumed])
    }
}

const SNAPSHOT: &str = "background-snapshot";
const EVENTS: &str = "events";

/// Has migrations be of a kind, or not.
fn capabilities(qmp: &mut Qmp, which: &[(&str, bool)], limit: Duration) -> Result<()> {
    let of: Vec<_> = which.iter().map(|(name, on)| json!({ "capability": name, "state": on })).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": of }), limit).map(drop)
}

/// Waits until a migration is over.
fn complete(qmp: &mut Qmp, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let told = qmp.execute("query-migrate", json!({}), limit)?;
        match told["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("active" | "device" | "setup" | "postcopy-active") if Instant::now() < deadline => {}
            _ => bail!("QEMU's migration: {told}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Bytes a second that are sent before the clone has the devices' state: next to nothing, as the paper has it.
const BEFORE: u32 = 40_960;

impl<'a> Second<'a> {
    fn start(tools: &'a Tools, spec: &Spec, sockets: &Sockets, name: String, limit: Duration) -> Result<Self> {
        for socket in [&sockets.stream, &sockets.control, &sockets.stub] {
            let _ = std::fs::remove_file(socket);
        }
        let guest = Guest::start_as(tools, spec, name)?;
        let qmp = Qmp::connect(&sockets.control, limit)?;
        Ok(Self { guest, qmp })
    }

    /// One that has [`Sockets::deferred_options`]: it waits to be told what to take.
    pub fn deferred(tools: &'a Tools, spec: &Spec, sockets: &Sockets, name: String, limit: Duration) -> Result<Self> {
        Self::start(tools, spec, sockets, name, limit)
    }

    /// One that has booted a guest of its own, with [`Sockets::control_options`].
    pub fn attach(guest: Guest<'a>, sockets: &Sockets, limit: Duration) -> Result<Self> {
        Ok(Self { guest, qmp: Qmp::connect(&sockets.control, limit)? })
    }

    /// Has its guest stand still.
    pub fn halt(&mut self, limit: Duration) -> Result<()> {
        self.qmp.execute("stop", json!({}), limit)?;
        self.qmp.event("STOP", limit).map(drop)
    }

    /// Lets it run: the moment.
    pub fn go(&mut self, limit: Duration) -> Result<Instant> {
        self.qmp.execute("cont", json!({}), limit)?;
        self.runs(limit)
    }

    /// Reads what [`Source::save`] has written; its guest stands still then.
    pub fn take_saved(&mut self, file: &Path, limit: Duration) -> Result<()> {
        capabilities(&mut self.qmp, &[(EVENTS, true)], limit)?;
        self.qmp.execute("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) }), limit)?;
        while {
            let told = self.qmp.event("MIGRATION", limit)?.data;
            ensure!(told["status"] != "failed", "QEMU does not read what it has written");
            told["status"] != "completed"
        } {}
        Ok(())
    }

    /// A clone as the paper has it: it has the devices' state, and each page of memory when it touches that, unless that has come by itself
    /// before. The paper has nothing come by itself; a stock QEMU that is told so (`max-postcopy-bandwidth`) serves pages so slowly that
    /// its clone took 33 to 39 s for what takes it 2 s otherwise. This one, which must stand still, is left to serve it. The clone has [`Sockets::deferred_options`], and stands still.
    pub fn clone_on_demand(
        &mut self,
        tools: &'a Tools,
        spec: &Spec,
        sockets: &Sockets,
        name: String,
        limit: Duration,
    ) -> Result<Self> {
        let mut clone = Self::deferred(tools, spec, sockets, name, limit)?;
        self.give_on_demand(&mut clone, sockets, limit)?;
        Ok(clone)
    }

    /// The same to one that waits.
    pub fn give_on_demand(&mut self, clone: &mut Self, sockets: &Sockets, limit: Duration) -> Result<()> {
        let uri = format!("unix:{}", sockets.stream.display());
        for qmp in [&mut self.qmp, &mut clone.qmp] {
            capabilities(qmp, &[("postcopy-ram", true)], limit)?;
        }
        clone.qmp.execute("migrate-incoming", json!({ "uri": uri }), limit)?;
        // No limit afterwards.
        let limits = json!({ "max-bandwidth": BEFORE, "max-postcopy-bandwidth": 0 });
        self.qmp.execute("migrate-set-parameters", limits, limit)?;
        self.qmp.execute("migrate", json!({ "uri": uri }), limit)?;
        self.qmp.execute("migrate-start-postcopy", json!({}), limit)?;
        let deadline = Instant::now() + limit;
        loop {
            let (here, there) = ("query-migrate", "query-status");
            let sent = self.qmp.execute(here, json!({}), limit)?;
            let got = clone.qmp.execute(there, json!({}), limit)?;
            match (sent["status"].as_str(), got["status"].as_str()) {
                // All of a small one may have come already.
                (Some("postcopy-active" | "completed"), Some("paused" | "prelaunch")) => return Ok(()),
                (Some("setup" | "active" | "device" | "postcopy-active"), _) if Instant::now() < deadline => {}
                _ => bail!("QEMU's post-copy: {sent}, {got}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until all of it was given.
    pub fn given(&mut self, limit: Duration) -> Result<()> {
        complete(&mut self.qmp, limit)
    }

    /// Waits until it has all of the snapshot and its guest runs: the moment.
    pub fn runs(&mut self, limit: Duration) -> Result<Instant> {
        Ok(self.qmp.event("RESUME", limit)?.read)
    }
}
