//! QEMU's ways to a second guest.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::{Fork, GRACE, LOOK, PATIENCE, look, ms};
use crate::bench::clock::Clock;
use crate::bench::guest::{Guest, said};
use crate::bench::machine::{Spec, Tools};
use crate::bench::peer::clone::{Second, Sockets, Source};
use crate::bench::qmp::Event;
use crate::bench::stillness::Tracer;

/// The node of the image that `savevm` writes to.
const NODE: &str = "saved";
const IMAGE_BYTES: &str = "1G";

/// QEMU's options for an image that no device of the guest's has: what `savevm` writes to.
pub fn image(tools: &Tools) -> Result<Vec<String>> {
    let path = tools.work.join("saved.qcow2");
    let mut make = std::process::Command::new("qemu-img");
    said(make.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(IMAGE_BYTES))?;
    let file = format!("driver=file,node-name={NODE}-file,filename={}", path.display());
    let node = format!("driver=qcow2,node-name={NODE},file={NODE}-file");
    Ok(["-blockdev", &file, "-blockdev", &node].map(str::to_owned).into())
}

fn pause([stopped, resumed]: &[Event; 2]) -> f64 {
    ms(resumed.happened.saturating_sub(stopped.happened))
}

/// A source that goes on, and what a second QEMU is started with.
pub struct Qemu<'a> {
    tools: &'a Tools,
    source: Source<'a>,
    second: Spec,
    /// What reads a file.
    reader: (Sockets, Spec),
}

impl<'a> Qemu<'a> {
    /// Has a guest that is up stand still.
    pub fn new(tools: &'a Tools, mut source: Source<'a>, second: Spec, reader: (Sockets, Spec)) -> Result<Self> {
        source.halt()?;
        Ok(Self { tools, source, second, reader })
    }

    /// A snapshot of memory that is taken while the guest goes on, streamed into the second.
    pub fn snapshot(&mut self, round: usize, clock: &Clock, tracer: Option<&Tracer>) -> Result<Fork> {
        self.source.go()?;
        let before = self.source.guest.run(LOOK, PATIENCE)?;
        let mut second = self.source.second(&self.second, format!("bench-second-{round}"))?;
        tracer.map_or(Ok(()), Tracer::begin)?;
        let (mark, call) = (clock.mark(), Instant::now());
        let paused = self.source.snapshot()?;
        // Its vCPUs come after its word.
        std::thread::sleep(GRACE);
        tracer.map_or(Ok(()), Tracer::end)?;
        let running = second.runs(PATIENCE)? - call;
        let stretch = clock.stretch(&mark)?;
        let answers = look(&mut second.guest, &before, call)?;
        let still = tracer.map(|tracer| tracer.longest(self.source.guest.pid()?)).transpose()?;
        self.source.complete()?;
        drop(second);
        self.source.halt()?;
        Ok(Fork {
            pause: Some(pause(&paused)),
            still,
            running: Some(ms(running) / stretch),
            answers: Some(ms(answers)),
        })
    }

    /// A file that the second reads when it is whole. The source goes on before that.
    pub fn file(&mut self, round: usize, clock: &Clock) -> Result<Fork> {
        self.source.go()?;
        let before = self.source.guest.run(LOOK, PATIENCE)?;
        let (sockets, spec) = &self.reader;
        let mut reader = Second::deferred(self.tools, spec, sockets, format!("bench-reader-{round}"), PATIENCE)?;
        let file = self.tools.work.join("saved");
        let (mark, call) = (clock.mark(), Instant::now());
        let paused = self.source.save(&file)?;
        reader.take_saved(&file, PATIENCE)?;
        let running = reader.go(PATIENCE)? - call;
        let stretch = clock.stretch(&mark)?;
        let answers = look(&mut reader.guest, &before, call)?;
        drop(reader);
        std::fs::remove_file(&file)?;
        self.source.halt()?;
        let (running, answers) = (Some(ms(running) / stretch), Some(ms(answers)));
        Ok(Fork { pause: Some(pause(&paused)), still: None, running, answers })
    }

    /// An image's internal snapshot. Another QEMU cannot have that image meanwhile.
    pub fn savevm(&mut self) -> Result<Fork> {
        self.source.go()?;
        self.source.guest.run("true", PATIENCE)?;
        let snapshot = json!({ "job-id": "save", "tag": "bench", "vmstate": NODE, "devices": [NODE] });
        self.source.qmp.execute("snapshot-save", snapshot, PATIENCE)?;
        let paused = [self.source.qmp.event("STOP", PATIENCE)?, self.source.qmp.event("RESUME", PATIENCE)?];
        self.source.qmp.conclude("save", PATIENCE)?;
        let remove = json!({ "job-id": "remove", "tag": "bench", "devices": [NODE] });
        self.source.qmp.execute("snapshot-delete", remove, PATIENCE)?;
        self.source.qmp.conclude("remove", PATIENCE)?;
        self.source.halt()?;
        Ok(Fork { pause: Some(pause(&paused)), ..Fork::default() })
    }
}

/// A guest that is given on: who has it is the source of the next.
pub struct Relay<'a> {
    tools: &'a Tools,
    now: Second<'a>,
    /// What those that take it are started with, in turn.
    takers: [(Sockets, Spec); 2],
}

impl<'a> Relay<'a> {
    /// Has a guest that is up stand still, which has the second's sockets.
    pub fn new(tools: &'a Tools, guest: Guest<'a>, sockets: [Sockets; 2], specs: [Spec; 2]) -> Result<Self> {
        let mut now = Second::attach(guest, &sockets[1], PATIENCE)?;
        now.halt(PATIENCE)?;
        let [one, other] = sockets;
        let [first, second] = specs;
        Ok(Self { tools, now, takers: [(one, first), (other, second)] })
    }

    /// Gives it on. The taker is not started beforehand: it has to be told what to take first.
    pub fn fork(&mut self, round: usize, clock: &Clock) -> Result<Fork> {
        self.now.go(PATIENCE)?;
        let before = self.now.guest.run(LOOK, PATIENCE)?;
        let (sockets, spec) = &self.takers[round % 2];
        let mut taker = Second::deferred(self.tools, spec, sockets, format!("bench-taker-{round}"), PATIENCE)?;
        let (mark, call) = (clock.mark(), Instant::now());
        self.now.give_on_demand(&mut taker, sockets, PATIENCE)?;
        let running = taker.go(PATIENCE)? - call;
        let stretch = clock.stretch(&mark)?;
        let answers = look(&mut taker.guest, &before, call)?;
        self.now.given(PATIENCE)?;
        self.now = taker;
        self.now.halt(PATIENCE)?;
        Ok(Fork { running: Some(ms(running) / stretch), answers: Some(ms(answers)), ..Fork::default() })
    }
}
