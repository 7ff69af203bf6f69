//! Waiting for a process that is not our child, without mistaking another that gets its id for it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How often to look. There is nothing to wait on without a pidfd, and nobody sees a tenth of a second.
const INTERVAL: Duration = Duration::from_millis(100);

/// A process, by its open `/proc/PID/stat`: once it is gone, reading that fails, whoever has the id by then.
pub struct Process {
    stat: File,
}

impl Process {
    /// The process that has this id now.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self { stat: File::open(format!("/proc/{pid}/stat"))? })
    }

    /// Whether it has ended; nobody need have waited for it.
    pub fn has_ended(&self) -> bool {
        let mut text = [0; 512];
        match self.stat.read_at(&mut text, 0) {
            Ok(len) => is_over(&text[..len]),
            Err(_) => true,
        }
    }

    /// Waits until it has ended: true, or false after `limit`.
    pub async fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.has_ended() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            tokio::time::sleep(left.min(INTERVAL)).await;
        }
        true
    }
}

/// Whether `/proc/PID/stat` says zombie or dead. The name before the state may contain anything, `)` too (proc_pid_stat(5)).
fn is_over(stat: &[u8]) -> bool {
    let Some(end) = stat.iter().rposition(|&b| b == b')') else { return true };
    matches!(stat.get(end + 2), None | Some(b'Z' | b'X' | b'x'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn states() {
        assert!(!is_over(b"1 (a) b) R 0"));
        assert!(is_over(b"1 (a) R) Z 0"));
        assert!(is_over(b""));
    }

    #[test]
    fn an_ended_process_is_noticed_before_and_after_it_is_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        assert!(!runtime.block_on(process.wait(Duration::from_millis(1))));
        child.kill().unwrap();
        assert!(runtime.block_on(process.wait(Duration::from_secs(20))));
        child.wait().unwrap();
        assert!(process.has_ended());
    }
}
