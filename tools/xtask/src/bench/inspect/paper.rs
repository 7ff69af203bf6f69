//! The CIVIC paper's pipeline, whole (`peer.rs` says what stands for what).

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;

use super::load::Load;
use super::{PATIENCE, Program, Run, up};
use crate::bench::clock::Clock;
use crate::bench::guest::said;
use crate::bench::io::complaints;
use crate::bench::machine::{Aio, Disk, Spec, Tools, line};
use crate::bench::memory;
use crate::bench::net::Tap;
use crate::bench::peer::clone::{Sockets, Source, listens};
use crate::bench::peer::code::Helper;
use crate::bench::peer::gdb::Injection;
use crate::bench::peer::kernel::{Kernel, look_up};
use crate::bench::peer::root_port;
use crate::bench::peer::stub::Stub;
use crate::bench::qmp::Qmp;
use civic_bench::report::Report;

/// The second QEMU, in the report.
pub const SECOND: &str = "qemu, second";
const FOLDER: &str = "/mnt";
/// The paper's section 3.6, without what is needed only once: the source's card down, the plugged one up, the store's programs. Its arguments
/// are the plugged card's address and what the program is to do.
pub const LOADER: &str = "#!/bin/sh
exec < /dev/null > /dev/console 2>&1
ip link set eth0 down
until ip link set eth1 up 2> /dev/null; do sleep 0.01; done
ip addr add \"$1\" dev eth1
exec chroot /mnt /bin/busybox sh -c \"$2\"
";
const MAC: &str = "52:54:00:0b:00:78";

/// QEMU with the guest that is cloned.
pub struct Paper<'a> {
    tools: &'a Tools,
    source: Source<'a>,
    second: Spec,
    sockets: Sockets,
    store: PathBuf,
    kernel: Kernel,
    tap: &'a Tap,
    plugged: &'a Tap,
    disk: Chain,
}

impl<'a> Paper<'a> {
    /// Boots it, looks at it, and has it stand still. The taps are its own, its clones', and that which they have plugged in.
    pub fn new(
        tools: &'a Tools,
        spec: Spec,
        root: &Path,
        store: PathBuf,
        [tap, clones, plugged]: [&'a Tap; 3],
        report: &mut Report,
    ) -> Result<Self> {
        let [control, stub] = ["qmp", "gdb"].map(|what| tools.work.join(format!("looked-at.{what}")));
        for socket in [&control, &stub] {
            let _ = std::fs::remove_file(socket);
        }
        let sockets = Sockets::new(&tools.work, "second");
        let ports = [root_port(0), root_port(1)].concat();
        let options = |more: &[String]| [&ports, more].concat();
        let listening = ["-qmp", &listens(&control), "-gdb", &listens(&stub)].map(str::to_owned);
        let disk = Chain::new(&tools.work, root)?;
        let source = Spec { disks: vec![on(&disk.image(0))], more: options(&listening), ..spec.clone() };
        let incoming = [&sockets.options()[..], &sockets.stub_options()].concat();
        let second = Spec { taps: vec![(clones.name.clone(), false)], more: options(&incoming), ..spec };
        for (name, spec) in [("qemu, source", &source), (SECOND, &second)] {
            report.command(name, line(&tools.command(spec, "NAME")));
        }
        let mut guest = up(tools, &source, tap)?;
        let symbols = guest.run(&look_up(), PATIENCE)?;
        let mut source = Source::new(tools, guest, &control, sockets.clone(), PATIENCE)?;
        source.halt()?;
        let kernel = Kernel::new(&symbols, &mut Stub::connect(&stub, PATIENCE)?)?;
        Ok(Self { tools, source, second, sockets, store, kernel, tap, plugged, disk })
    }

    /// Has a clone of the source, which runs under load meanwhile, run a program.
    pub fn round(&mut self, round: usize, program: &Program, clock: &Clock) -> Result<Run> {
        self.source.go()?;
        let load = Load::start(self.tap)?;
        let clones = self.disk.next()?;
        let (active, overlay) = self.disk.names();
        let file = json!({ "driver": "file", "filename": self.disk.image(self.disk.last) });
        let node = json!({ "driver": "qcow2", "node-name": overlay, "file": file, "backing": null });
        self.source.qmp.execute("blockdev-add", node, PATIENCE)?;
        let script = program.script();
        let address = format!("{}/24", self.plugged.guest);
        let loader = format!("{FOLDER}/loader");
        let helper = Helper { device: "/dev/vdb", folder: FOLDER, argv: &[&loader, &address, &script] };
        let injection = Injection::prepare(self.tools, self.sockets.stub(), &self.kernel, &helper)?;
        let spec = Spec { disks: vec![on(&clones)], ..self.second.clone() };

        let (mark, call) = (clock.mark(), Instant::now());
        let mut second = self.source.second(&spec, format!("bench-second-{round}"))?;
        self.prepare(&mut second.qmp)?;
        let booted = Instant::now();
        let [stopped, resumed] = self.source.snapshot()?;
        let ran_on = Instant::now();
        let snapshot = json!({ "node": active, "overlay": overlay });
        self.source.qmp.execute("blockdev-snapshot", snapshot, PATIENCE)?;
        let loaded = second.runs(PATIENCE)?;
        plug(&mut second.qmp)?;
        let plugged = Instant::now();
        let gdb = injection.begin()?;
        let spoke = second.guest.wait(&format!("{}\r\n", program.0), PATIENCE);
        let stretch = clock.stretch(&mark)?;
        let (_, spoke) = spoke.map_err(|e| e.context(format!("the program in QEMU's clone; gdb: {}", gdb.said())))?;
        gdb.end(PATIENCE)?;
        load.finish()?;
        self.source.complete()?;
        let ram = u64::from(spec.memory_mib) << 20;
        let cost = memory::of(second.guest.pid()?, ram)?;
        complaints(&mut second.guest)?;
        drop(second);
        self.source.halt()?;
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3 / stretch;
        let at = [("boot", booted), ("snapshot", ran_on), ("load", loaded), ("plug", plugged), ("inject", spoke)];
        let mut last = call;
        let stages = at.map(|(name, at)| (name, ms(std::mem::replace(&mut last, at), at))).to_vec();
        let pause = resumed.happened.saturating_sub(stopped.happened).as_secs_f64() * 1e3 / stretch;
        let child_mib = (cost.own + cost.guest) as f64 / f64::from(1 << 20);
        Ok(Run { took: ms(call, spoke), pause, stages, child_mib })
    }

    /// What the clone's devices are made of.
    fn prepare(&self, qmp: &mut Qmp) -> Result<()> {
        let file = json!({ "driver": "file", "filename": self.store });
        qmp.execute("blockdev-add", json!({ "driver": "raw", "node-name": "store", "file": file }), PATIENCE)?;
        let tap = json!({ "type": "tap", "id": "own", "ifname": self.plugged.name, "script": "no", "downscript": "no", "vhost": false });
        qmp.execute("netdev_add", tap, PATIENCE).map(drop)
    }

    /// Fails if the source's kernel complained.
    pub fn finish(mut self) -> Result<()> {
        self.source.go()?;
        complaints(&mut self.source.guest)
    }
}

fn plug(qmp: &mut Qmp) -> Result<()> {
    let store = json!({ "driver": "virtio-blk-pci", "id": "store", "bus": "rp0", "drive": "store" });
    qmp.execute("device_add", store, PATIENCE)?;
    let card = json!({ "driver": "virtio-net-pci", "id": "own", "bus": "rp1", "netdev": "own", "mac": MAC });
    qmp.execute("device_add", card, PATIENCE).map(drop)
}

fn on(image: &Path) -> Disk {
    Disk { path: image.to_owned(), qcow2: true, read_only: false, aio: Aio::IoUring }
}

/// The images of the source's disk: each snapshot puts a new one on top, and its clone's is based on the one below.
struct Chain {
    work: PathBuf,
    bytes: u64,
    /// The number of the topmost.
    last: usize,
}

impl Chain {
    /// On an image that stays as it is.
    fn new(work: &Path, root: &Path) -> Result<Self> {
        let bytes = File::open(root).context("the root image")?.seek(SeekFrom::End(0))?;
        let this = Self { work: work.to_owned(), bytes, last: 0 };
        // Civic's source is based on it as well.
        this.create(&this.image(0), &unlocked(root, "raw"), "raw")?;
        Ok(this)
    }

    fn image(&self, n: usize) -> PathBuf {
        self.work.join(format!("looked-at-{n}.qcow2"))
    }

    /// Makes the next, and its clone's, which is returned. What is below is still written to, and its lock is not asked for.
    fn next(&mut self) -> Result<PathBuf> {
        let below = self.image(self.last);
        self.last += 1;
        self.create(&self.image(self.last), &below.to_string_lossy(), "qcow2")?;
        let clones = self.work.join("clone.qcow2");
        self.create(&clones, &unlocked(&below, "qcow2"), "qcow2")?;
        Ok(clones)
    }

    /// QEMU's names of the topmost but one, and the topmost.
    fn names(&self) -> (String, String) {
        let name = |n: usize| if n == 0 { "d0".to_owned() } else { format!("top{n}") };
        (name(self.last - 1), name(self.last))
    }

    fn create(&self, image: &Path, below: &str, format: &str) -> Result<()> {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", format]);
        said(command.arg(image).arg(self.bytes.to_string())).map(drop)
    }
}

/// What an image that somebody else has is called, for who bases one on it.
fn unlocked(image: &Path, format: &str) -> String {
    let block = image.metadata().is_ok_and(|about| about.file_type().is_block_device());
    let driver = if block { "host_device" } else { "file" };
    let file = json!({ "driver": driver, "filename": image, "locking": "off" });
    format!("json:{}", json!({ "driver": format, "file": file }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_snapshot_is_on_top_of_the_one_before() {
        let mut chain = Chain { work: "/w".into(), bytes: 1, last: 1 };
        assert_eq!(chain.names(), ("d0".to_owned(), "top1".to_owned()));
        chain.last = 2;
        assert_eq!(chain.names(), ("top1".to_owned(), "top2".to_owned()));
        assert_eq!(chain.image(2), Path::new("/w/looked-at-2.qcow2"));
        let said = unlocked(Path::new("/a \"b\""), "raw");
        let value: serde_json::Value = serde_json::from_str(said.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(value["file"]["filename"], "/a \"b\"");
        assert_eq!((&value["driver"], &value["file"]["driver"]), (&json!("raw"), &json!("file")));
    }
}
