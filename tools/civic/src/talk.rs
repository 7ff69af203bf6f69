//! Talking with a program in a fork, or with what copies files there.
//!
//! ```text
//!  input ─ credit ─► Stdin ─┐                    ┌─ Stdout, Stderr ─► output
//!  other frames ────────────┴─► program's stream ┤
//!                                                └─ Exited ─► Outcome
//! ```

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use civic_api::client::ConsoleStream;
use civic_loader::{Exit, FromGuest, Stage, Step, ToGuest, split};
use nix::errno::Errno;
use nix::libc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, mpsc};

/// The program is there, and cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
pub const NOT_THERE: u8 = 127;

/// How a program ended.
pub struct Outcome {
    /// As a shell tells it.
    pub status: u8,
    /// The signal that ended it.
    pub signal: Option<u8>,
    /// Whether there was a program that could be executed.
    pub executed: bool,
    /// When the first that it wrote was here.
    pub first_output: Option<Instant>,
    /// When the loader had come how far, by the guest's time stamp counter.
    pub stages: Vec<(Stage, u64)>,
}

/// What a program has written.
pub enum Output {
    /// To its standard output, or its terminal.
    Stdout(Vec<u8>),
    /// To its standard error.
    Stderr(Vec<u8>),
    /// What the loader says of it.
    Remark(String),
}

/// A conversation with a program.
pub struct Talk {
    from_guest: ReadHalf<ConsoleStream>,
    to_guest: mpsc::Sender<Vec<u8>>,
    credit: Arc<Semaphore>,
    output: mpsc::Sender<Output>,
}

/// A whole frame's bytes.
pub fn frame(frame: &ToGuest<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What we send is shorter than a frame may be.
    let _ = frame.encode(&mut bytes);
    bytes
}

impl Talk {
    /// Begins to send `input`, in pieces of at most 64 KiB, which is all the credit that there is.
    pub fn start(stream: ConsoleStream, input: mpsc::Receiver<Vec<u8>>, output: mpsc::Sender<Output>) -> Self {
        let (from_guest, write) = tokio::io::split(stream);
        let (to_guest, frames) = mpsc::channel(16);
        let credit = Arc::new(Semaphore::new(0));
        tokio::spawn(send_input(input, Arc::clone(&credit), to_guest.clone()));
        tokio::spawn(send(frames, write));
        Self { from_guest, to_guest, credit, output }
    }

    /// Where other frames go.
    pub fn to_guest(&self) -> mpsc::Sender<Vec<u8>> {
        self.to_guest.clone()
    }

    /// Takes what the guest says, until the last of it.
    pub async fn hear(self) -> Result<Outcome> {
        let Self { mut from_guest, credit, output, .. } = self;
        let (mut bytes, mut stages, mut first_output) = (Vec::new(), Vec::new(), None);
        loop {
            let mut done = 0;
            while let Some((frame, len)) = split(&bytes[done..]).context("the monitor makes no sense")? {
                let frame = FromGuest::decode(frame).context("the monitor makes no sense")?;
                if matches!(frame, FromGuest::Stdout(_) | FromGuest::Stderr(_)) {
                    first_output.get_or_insert_with(Instant::now);
                }
                match frame {
                    FromGuest::Hello { credit: more, .. } | FromGuest::Credit(more) => {
                        credit.add_permits(more as usize)
                    }
                    FromGuest::Stage { stage, tsc } => stages.push((stage, tsc)),
                    // Nobody reads: as with a pipe, the program is told when it is over.
                    FromGuest::Stdout(part) => drop(output.send(Output::Stdout(part.to_vec())).await),
                    FromGuest::Stderr(part) => drop(output.send(Output::Stderr(part.to_vec())).await),
                    FromGuest::Warning(text) => drop(output.send(Output::Remark(text.into())).await),
                    FromGuest::Exited(Exit::Code(status)) => {
                        return Ok(Outcome { status, signal: None, executed: true, first_output, stages });
                    }
                    FromGuest::Exited(Exit::Signal { signal, .. }) => {
                        return Ok(Outcome {
                            status: 128_u8.wrapping_add(signal),
                            signal: Some(signal),
                            executed: true,
                            first_output,
                            stages,
                        });
                    }
                    FromGuest::Failed { step, errno, text } => {
                        let (status, text) = failed(step, errno, text)?;
                        let _ = output.send(Output::Remark(text)).await;
                        return Ok(Outcome { status, signal: None, executed: false, first_output, stages });
                    }
                }
                done += len;
            }
            bytes.drain(..done);
            if from_guest.read_buf(&mut bytes).await.context("the connection to the monitor broke")? == 0 {
                bail!("the VM has ended, and the program with it");
            }
        }
    }
}

/// A program that cannot be executed is told as a shell does: the status, and why.
fn failed(step: Step, errno: i32, text: &str) -> Result<(u8, String)> {
    let text = match errno {
        0 => text.to_owned(),
        errno => format!("{text}: {}", Errno::from_raw(errno).desc()),
    };
    if step != Step::Exec {
        bail!("{text}");
    }
    Ok((if errno == libc::ENOENT { NOT_THERE } else { NOT_EXECUTABLE }, text))
}

async fn send_input(mut input: mpsc::Receiver<Vec<u8>>, credit: Arc<Semaphore>, to_guest: mpsc::Sender<Vec<u8>>) {
    while let Some(chunk) = input.recv().await {
        let Ok(permits) = credit.acquire_many(chunk.len() as u32).await else { return };
        permits.forget();
        if to_guest.send(frame(&ToGuest::Stdin(&chunk))).await.is_err() {
            return;
        }
    }
    let _ = to_guest.send(frame(&ToGuest::StdinEnd)).await;
}

async fn send(mut frames: mpsc::Receiver<Vec<u8>>, mut guest: WriteHalf<ConsoleStream>) {
    while let Some(frame) = frames.recv().await {
        if guest.write_all(&frame).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_executed_ends_as_in_a_shell() {
        let status = |step, errno| failed(step, errno, "x").map(|(status, _)| status).ok();
        assert_eq!(status(Step::Exec, libc::ENOENT), Some(127));
        assert_eq!(status(Step::Exec, libc::EACCES), Some(126));
        assert_eq!(status(Step::Store, libc::ENOENT), None);
    }
}
