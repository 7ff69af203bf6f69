//! Making forks of a VM.
//!
//! ```text
//!  prepare: page server, if there is none ─┐
//!           a monitor for each child ──────┴─ all at the same time ─▶ they wait at the source
//!  fork:    POST /v1/fork ─▶ those who waited are children
//! ```
//!
//! The source starts nothing: its children's monitors and its page server are started here.

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Context;
use civic_api::client::{Client, ClientError};
use civic_api::launch::{ForkConfig, LaunchRequest};
use civic_api::{DiskConfig, ErrorCode, ForkReport, ForkRequest, NewDevice, VmInfo};
use tokio::task::JoinSet;

use crate::cli::{ChildArgs, absolute};
use crate::explain;
use crate::jail::{JailSpec, is_jailed};
use crate::monitor::{Monitor, Until, start_page_server};
use crate::rundir::RunDir;

/// How long a source may take to say whose its page server is.
const SOON: Duration = Duration::from_secs(1);

/// How long others' forks may take, one after the other.
const OTHERS: Duration = Duration::from_secs(20);
/// Between two questions whether they are made.
const AGAIN: Duration = Duration::from_millis(10);

/// Children of a fork that is to be made. Until they are taken out, whatever goes wrong ends their monitors.
pub struct Birth {
    dir: RunDir,
    source: String,
    client: Client,
    names: Vec<String>,
    for_programs: bool,
    starting: JoinSet<anyhow::Result<(usize, Monitor)>>,
    monitors: Vec<Option<Monitor>>,
    /// If it was started by us.
    page_server: Option<Child>,
}

impl Birth {
    /// Of these names.
    pub fn new(dir: &RunDir, source: &str, names: Vec<String>) -> Self {
        let monitors = names.iter().map(|_| None).collect();
        let client = dir.client(source);
        Self {
            dir: dir.clone(),
            source: source.into(),
            client,
            names,
            for_programs: false,
            starting: JoinSet::new(),
            monitors,
            page_server: None,
        }
    }

    /// Programs will be started in them, with a store or without.
    pub fn for_programs(mut self) -> Self {
        self.for_programs = true;
        self
    }

    /// Starts the monitors, and the page server if there is none; returns when all children wait. Where this is given up, [`Birth::give_up`]
    /// sees to what was begun.
    pub async fn prepare(&mut self, args: &ChildArgs, until: Until) -> anyhow::Result<()> {
        let info = self.info().await?;
        let jail = args.jail.clone().or_else(|| is_jailed(&self.dir.vm(&self.source)).then(JailSpec::default));
        // Early, so that it prepares the fork while the monitors come.
        if !info.family.page_server {
            self.page_server = Some(start_page_server(&self.dir, &self.source, jail.as_ref())?);
        }
        for index in 0..self.names.len() {
            let request = self.request(args, &info, index)?;
            let (dir, jail) = (self.dir.clone(), jail.clone());
            let launch = async move { Ok((index, Monitor::launch(&dir, &request, until, jail.as_ref()).await?)) };
            self.starting.spawn(launch);
        }
        while let Some(launched) = self.starting.join_next().await {
            let (index, monitor) = launched.context("a monitor was not started")??;
            self.monitors[index] = Some(monitor);
        }
        // Asked again: one that was about to go when nobody waited yet is gone, and from now on it stays.
        if !self.info().await?.family.page_server {
            self.page_server = Some(start_page_server(&self.dir, &self.source, jail.as_ref())?);
        }
        Ok(())
    }

    /// Makes the fork; once the one is made that the source may be at for somebody else.
    pub async fn fork(&self, paused: bool) -> anyhow::Result<ForkReport> {
        let request = ForkRequest { children: self.names.clone(), paused };
        let deadline = Instant::now() + OTHERS;
        loop {
            let forked = self.client.fork(&request).await;
            let busy = |error: &ClientError| error.refusal().is_some_and(|body| body.code == ErrorCode::Busy);
            if Instant::now() >= deadline || !forked.as_ref().is_err_and(busy) {
                return forked.map_err(|error| explain(&self.dir, &self.source, error));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The monitors, in the order of the names, as far as there are any.
    pub fn monitors(mut self) -> impl Iterator<Item = Option<Monitor>> {
        std::mem::take(&mut self.monitors).into_iter()
    }

    /// Ends all of them; returns when they have ended.
    pub async fn give_up(&mut self) {
        self.starting.shutdown().await;
        self.monitors.clear();
        // It goes by itself when all have gone who waited, but one that comes only then would wait for others, for a minute.
        let Some(mut server) = self.page_server.take() else { return };
        if let Ok(Ok(info)) = tokio::time::timeout(SOON, self.client.info()).await
            && info.family.waiting.is_empty()
            && info.family.children.is_empty()
        {
            let _ = server.kill(); // It may have ended already.
            let _ = server.wait();
        }
    }

    async fn info(&self) -> anyhow::Result<VmInfo> {
        self.client.info().await.map_err(|error| explain(&self.dir, &self.source, error))
    }

    fn request(&self, args: &ChildArgs, info: &VmInfo, index: usize) -> anyhow::Result<LaunchRequest> {
        let taken = |id: &str| info.devices.iter().any(|device| device.id == id);
        let mut devices = args.devices.numbered(index + 1).configured(taken)?;
        if let Some(store) = &args.store {
            let disk = store.config(index + 1);
            devices.push(NewDevice::Disk(DiskConfig { path: absolute(&disk.path, "--store")?, ..disk }));
        }
        Ok(LaunchRequest::Fork(ForkConfig {
            name: self.names[index].clone(),
            fork_of: self.dir.vm(&self.source),
            overlay_dir: args.overlay_dir.clone(),
            source_net: args.source_net.into(),
            devices,
            for_programs: self.for_programs || args.store.is_some(),
            audit: {
                let asked = args.audit.as_deref().map(|path| absolute(path, "--audit")).transpose()?;
                own_log(asked, info.audit.clone(), &self.names, index)
            },
        }))
    }
}

/// A fork's audit log: what it writes there is its own word and no more, so that none writes to another's, nor to its source's.
fn own_log(asked: Option<PathBuf>, sources: Option<PathBuf>, names: &[String], index: usize) -> Option<PathBuf> {
    if names.len() == 1 && asked.is_some() {
        return asked;
    }
    let mut path = asked.or(sources)?.into_os_string();
    path.push(".");
    path.push(&names[index]);
    Some(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fork_has_a_log_of_its_own() {
        let names = |count: usize| (1..=count).map(|n| format!("web-{n}")).collect::<Vec<_>>();
        let log = |asked: Option<&str>, sources: Option<&str>, count, index| {
            own_log(asked.map(Into::into), sources.map(Into::into), &names(count), index)
                .map(|log| log.display().to_string())
        };
        assert_eq!(log(None, None, 1, 0), None);
        assert_eq!(log(None, Some("/a/web.audit"), 1, 0).unwrap(), "/a/web.audit.web-1");
        assert_eq!(log(Some("/b"), Some("/a"), 1, 0).unwrap(), "/b");
        assert_eq!(log(Some("/b"), Some("/a"), 2, 1).unwrap(), "/b.web-2");
    }
}
