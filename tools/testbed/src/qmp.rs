//! QEMU's machine protocol: one JSON object a line (`docs/interop/qmp-spec.rst`).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to answer. It answers from its main loop, which long TCG work can hold up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a running QEMU. Commands are answered in order, so they are sent one at a time.
pub struct Qmp {
    stream: Mutex<(UnixStream, Receiver<Value>)>,
    deleted: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Qmp {
    /// Takes over a fresh connection: reads the greeting and leaves negotiation mode.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let deleted = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let (answers, answered) = channel();
        let (events, lines) = (deleted.clone(), BufReader::new(stream.try_clone()?));
        std::thread::spawn(move || {
            for line in lines.lines() {
                let Ok(Ok(value)) = line.map(|l| serde_json::from_str::<Value>(&l)) else { break };
                if value["event"] == "DEVICE_DELETED" {
                    if let Some(id) = value["data"]["device"].as_str() {
                        events.0.lock().unwrap_or_else(PoisonError::into_inner).push(id.to_owned());
                        events.1.notify_all();
                    }
                } else if value.get("event").is_none() && answers.send(value).is_err() {
                    break;
                }
            }
        });
        answered.recv_timeout(PATIENCE).context("QEMU does not greet")?;
        let qmp = Self { stream: Mutex::new((stream, answered)), deleted };
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    pub fn command(&self, name: &str, arguments: Value) -> Result<Value> {
        let mut held = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, answered) = &mut *held;
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        stream.write_all(line.as_bytes()).with_context(|| format!("QEMU is gone ({name})"))?;
        let answer = match answered.recv_timeout(PATIENCE) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => bail!("QEMU does not answer {name}"),
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU is gone ({name})"),
        };
        if let Some(error) = answer.get("error") {
            bail!("QEMU refuses {name}: {}", error["desc"].as_str().unwrap_or("?"));
        }
        Ok(answer["return"].clone())
    }

    /// Waits until the guest let go of a device. False if it did not in time.
    pub fn wait_deleted(&self, id: &str, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let (list, more) = &*self.deleted;
        let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = list.iter().position(|d| d == id) {
                list.remove(at);
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            list = more.wait_timeout(list, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
