//! The audit log: who asked a VM's API for what, and what came of it. A line of JSON each, in a file that is only ever appended to.
//!
//! ```text
//!  {"time":…,"vm":"web","event":"began"}
//!  {"time":…,"vm":"web","event":"asked","id":7,"peer":{"uid":0,"gid":0,"pid":812},"method":"POST","path":"/v1/fork","request":{…}}
//!  {"time":…,"vm":"web","event":"answered","id":7,"status":200}
//!  {"time":…,"vm":"web","event":"ended","reason":…}
//! ```
//!
//! What changes nothing and shows nothing of the guest is left out: a plain GET. A request that cannot be written down is refused before it does
//! anything. The environment of a program may hold secrets: only how much there is of it is told. Whoever takes the monitor over can write
//! to its own log what it likes, so each VM has a file of its own; a fork's has its name.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use civic_api::{EndReason, ErrorBody, ErrorCode};
use nix::libc::O_NOFOLLOW;
use serde::Serialize;
use serde_json::Value;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Bytes of a request's body that are kept as they are; of a longer one only how long it is.
const MOST: usize = 16 << 10;

/// Who asks, as the kernel says (`SO_PEERCRED`, unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The process; none where it cannot be seen from the monitor's jail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

/// An open log.
pub struct Audit {
    vm: String,
    out: Mutex<Out>,
    last: AtomicU64,
}

struct Out {
    file: Box<dyn Write + Send>,
    /// The last line is not whole: the next begins on one of its own.
    torn: bool,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Began,
    Asked {
        id: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        peer: Option<Peer>,
        method: &'a str,
        path: &'a str,
        #[serde(skip_serializing_if = "Value::is_null")]
        request: Value,
    },
    Answered {
        id: u64,
        status: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
    },
    Ended {
        reason: &'a EndReason,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    vm: &'a str,
    #[serde(flatten)]
    event: Event<'a>,
}

impl Audit {
    /// Opens the log of the VM `vm`, made for the owner alone if it is not there, and says that it began.
    ///
    /// # Errors
    /// When it is no regular file, or cannot be written.
    pub fn open(path: &Path, vm: &str) -> Result<Self, ErrorBody> {
        let refused = |e: io::Error| {
            ErrorBody::new(ErrorCode::AuditFailed, format!("cannot write the audit log {}: {e}", path.display()))
                .with_hint(
                    "name a file in a folder that is there, and that this user may write; a link is not followed",
                )
        };
        let mut options = File::options();
        options.append(true).create(true).mode(0o600).custom_flags(O_NOFOLLOW);
        let file = options.open(path).map_err(refused)?;
        if !file.metadata().map_err(refused)?.is_file() {
            return Err(refused(io::Error::other("it is no regular file")));
        }
        let this = Self::to(Box::new(file), vm);
        this.write(Event::Began).map_err(refused)?;
        Ok(this)
    }

    fn to(file: Box<dyn Write + Send>, vm: &str) -> Self {
        Self { vm: vm.to_owned(), out: Mutex::new(Out { file, torn: false }), last: AtomicU64::new(0) }
    }

    /// A request is about to be obeyed: the number that its answer goes with.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn asked(&self, peer: Option<Peer>, method: &str, path: &str, body: &[u8]) -> Result<u64, ErrorBody> {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let event = Event::Asked { id, peer, method, path, request: told(body) };
        self.write(event).map(|()| id).map_err(|e| {
            ErrorBody::new(ErrorCode::AuditFailed, format!("the audit log cannot be written, so nothing was done: {e}"))
                .with_hint("make room where it is")
        })
    }

    /// What came of a request. It has been done, so that an error is the log's only.
    pub fn answered(&self, id: u64, status: u16, error: Option<&str>) {
        self.last_words(Event::Answered { id, status, error });
    }

    /// The VM has ended.
    pub fn ended(&self, reason: &EndReason) {
        self.last_words(Event::Ended { reason });
    }

    fn last_words(&self, event: Event<'_>) {
        if let Err(e) = self.write(event) {
            tracing::error!("the audit log lacks a line: {e}");
        }
    }

    fn write(&self, event: Event<'_>) -> io::Result<()> {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time)).map_err(io::Error::other)?;
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = if out.torn { b"\n".to_vec() } else { Vec::new() };
        serde_json::to_writer(&mut line, &Line { time, vm: &self.vm, event })?;
        line.push(b'\n');
        // One call, so that lines of several VMs in one file are not mixed.
        let written = out.file.write(&line);
        out.torn = match written {
            Ok(count) => count < line.len() && (count > 0 || out.torn),
            Err(_) => out.torn,
        };
        match written? {
            count if count == line.len() => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }
}

/// What of a body is kept.
fn told(body: &[u8]) -> Value {
    if body.len() > MOST {
        return serde_json::json!({ "bytes": body.len() });
    }
    let mut request = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(_) if body.is_empty() => Value::Null,
        Err(_) => Value::String(String::from_utf8_lossy(body).into_owned()),
    };
    if let Some(env) = request.get_mut("env") {
        *env = Value::from(env.as_array().map_or(0, Vec::len));
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn lines(text: &str) -> Vec<Value> {
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn each_request_has_two_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.audit");
        let peer = Peer { uid: 7, gid: 8, pid: None };
        for _ in 0..2 {
            let audit = Audit::open(&path, "web").unwrap();
            let body = br#"{"argv": ["ps"], "env": ["SECRET=x", "A=b"]}"#;
            let id = audit.asked(Some(peer), "POST", "/v1/programs", body).unwrap();
            audit.answered(id, 409, Some("it is no fork"));
            audit.ended(&EndReason::PoweredOff);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("SECRET"), "{text}");
        let lines = lines(&text);
        assert_eq!(lines.len(), 8, "{text}");
        assert!(
            lines.iter().all(|line| line["vm"] == "web" && line["time"].as_str().unwrap().ends_with('Z')),
            "{text}"
        );
        assert_eq!((&lines[0]["event"], &lines[3]["event"]), (&"began".into(), &"ended".into()));
        let asked = serde_json::json!({"argv": ["ps"], "env": 2});
        assert_eq!((&lines[1]["request"], &lines[1]["peer"]), (&asked, &serde_json::json!({"uid": 7, "gid": 8})));
        assert_eq!((&lines[2]["id"], &lines[2]["status"]), (&lines[1]["id"], &409.into()));
        assert_eq!(lines[2]["error"], "it is no fork");
    }

    #[test]
    fn only_a_file_is_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("file"), &link).unwrap();
        for path in [dir.path(), &link, Path::new("/dev/null"), Path::new("/no/such/file")] {
            let told = Audit::open(path, "web").map(|_| ()).unwrap_err();
            assert_eq!(told.code, ErrorCode::AuditFailed, "{told:?}");
        }
    }

    /// Takes so many bytes.
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            let count = bytes.len().min(disk.1);
            if count == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.1 -= count;
            disk.0.extend(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused_and_leaves_no_line_in_pieces() {
        let disk = Arc::new(Mutex::new((Vec::new(), 40)));
        let audit = Audit::to(Box::new(Disk(Arc::clone(&disk))), "web");
        for _ in 0..2 {
            let told = audit.asked(None, "POST", "/v1/pause", b"").unwrap_err();
            assert!(told.code == ErrorCode::AuditFailed && told.message.contains("nothing was done"), "{told:?}");
        }
        disk.lock().unwrap().1 = 1000;
        audit.asked(None, "POST", "/v1/pause", b"").unwrap();
        audit.answered(3, 204, None);
        let text = String::from_utf8(disk.lock().unwrap().0.clone()).unwrap();
        let (torn, whole) = text.split_once('\n').unwrap();
        assert_eq!(torn.len(), 40);
        assert_eq!(lines(whole).iter().map(|line| line["id"].clone()).collect::<Vec<_>>(), [3, 3], "{text}");
    }

    #[test]
    fn long_bodies_are_not_kept() {
        assert_eq!(told(&vec![b'x'; MOST + 1]), serde_json::json!({ "bytes": MOST + 1 }));
        assert_eq!((told(b""), told(b"{")), (Value::Null, Value::String("{".into())));
    }
}
