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

use anyhow::{Result, bail};
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
        let snapshot = json!({ "capabilities": [{ "capability": "background-snapshot", "state": true }] });
        qmp.execute("migrate-set-capabilities", snapshot, limit)?;
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
        let deadline = Instant::now() + self.limit;
        loop {
            let told = self.qmp.execute("query-migrate", json!({}), self.limit)?;
            match told["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("active" | "device" | "setup") if Instant::now() < deadline => {}
                _ => bail!("QEMU's snapshot: {told}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
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
        let mut clone = Self::start(tools, spec, sockets, name, limit)?;
        let uri = format!("unix:{}", sockets.stream.display());
        let by_demand = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
        for qmp in [&mut self.qmp, &mut clone.qmp] {
            qmp.execute("migrate-set-capabilities", by_demand.clone(), limit)?;
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
                (Some("postcopy-active"), Some("paused" | "prelaunch")) => return Ok(clone),
                (Some("setup" | "active" | "device" | "postcopy-active"), _) if Instant::now() < deadline => {}
                _ => bail!("QEMU's post-copy: {sent}, {got}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until it has all of the snapshot and its guest runs: the moment.
    pub fn runs(&mut self, limit: Duration) -> Result<Instant> {
        Ok(self.qmp.event("RESUME", limit)?.read)
    }
}
