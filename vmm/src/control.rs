//! The seam between the API's thread and the machine's supervisor.
//!
//! ```text
//!  API thread ── Request{command, reply} ──► supervisor thread: owns the machine, changes its state
//!      │
//!      └── View: reads what may be read without asking (atomics, short locks)
//! ```
//!
//! Invariants:
//! * the API never touches the machine: it sends a [`Command`] and waits for the reply, or reads through [`View`];
//! * a [`View`] never waits for the supervisor, a vCPU or a device's I/O: it is called on the API's only thread, but for
//!   [`View::sharing`], which asks another process;
//! * a supervisor that ends without answering drops the reply, and the client gets an error, not silence.

use std::sync::Arc;

use civic_api::{
    DeviceInfo, ErrorBody, ErrorCode, ForkReport, ForkRequest, GuestFiles, GuestKernel, NewDevice, ProgramRequest,
    SaveReport, SaveRequest, StartedProgram, VmInfo,
};
use civic_devices::console_hub::ConsoleHub;
use tokio::sync::oneshot;

use crate::fork::family::Sharing;
use crate::programs::Session;

/// What a client may ask of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Created → running.
    Start,
    /// Running → paused; answered once no vCPU runs.
    Pause,
    /// Paused → running.
    Resume,
    /// Presses the power button; answered at once, the guest decides.
    Stop,
    /// Any state → stopped.
    Kill,
    /// The balloon is to take so many bytes; answered when the guest is asked.
    SetBalloon(u64),
    /// Running or paused → paused, then what the request says; answered when it is done.
    Save(SaveRequest),
    /// Running, stopping or paused → the same; answered when the children run.
    Fork(ForkRequest),
    /// The guest's kernel is to be found in its memory; answered when it is.
    Examine(GuestFiles),
    /// A program is to be started in the guest; answered when its loader runs there.
    StartProgram(ProgramRequest),
    /// A device is to be plugged in; answered when it is. What the guest makes of it, the view tells.
    Plug(NewDevice),
    /// A device is to be removed; answered when it is closed, however long the guest takes.
    Unplug {
        /// Which.
        id: String,
        /// Whether the guest needs not agree.
        force: bool,
    },
}

/// The answer to a command that was obeyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is nothing more to say.
    Done,
    /// To [`Command::Save`].
    Saved(SaveReport),
    /// To [`Command::Fork`].
    Forked(ForkReport),
    /// To [`Command::StartProgram`].
    Started(StartedProgram),
    /// To [`Command::Examine`].
    Examined(Box<GuestKernel>),
}

/// What is said of the balloon of a VM that has none.
pub fn no_balloon() -> ErrorBody {
    ErrorBody::new(ErrorCode::NotFound, "the VM has no balloon").with_hint("start it with --balloon")
}

/// Where an answer goes; dropping it is answered to the client as a fault of ours.
pub type Reply = oneshot::Sender<Result<Answer, ErrorBody>>;

/// A command and where its answer goes.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Takes the answer.
    pub reply: Reply,
}

/// What the API may read without asking the supervisor.
pub trait View: Send + Sync + 'static {
    /// The VM as it is now. Must not block.
    fn info(&self) -> VmInfo;
    /// One of its devices. Must not block.
    fn device(&self, id: &str) -> Option<DeviceInfo> {
        self.info().devices.into_iter().find(|device| device.id == id)
    }
    /// Asks the guest for new statistics of its memory, if there is a balloon to tell them. Must not block.
    fn ask_balloon(&self);
    /// What the page server tells of its forks, if there is one. Waits for that: not for the API's own thread.
    fn sharing(&self) -> Option<Sharing>;
    /// The program of this number, if it is there.
    fn program(&self, id: u64) -> Option<Arc<Session>>;
    /// The console port of this name, if the VM has one.
    fn console(&self, port: &str) -> Option<Arc<ConsoleHub>>;
}

/// The API's handle on a machine.
#[derive(Clone)]
pub struct Control {
    send: Arc<dyn Fn(Request) + Send + Sync>,
    view: Arc<dyn View>,
}

impl Control {
    /// `send` hands a request to the supervisor without blocking, or drops it when there is none any more.
    pub fn new(send: impl Fn(Request) + Send + Sync + 'static, view: Arc<dyn View>) -> Self {
        Self { send: Arc::new(send), view }
    }

    /// Sends `command` and waits for the answer. [`ErrorCode::Internal`] if the supervisor is gone.
    pub async fn command(&self, command: Command) -> Result<Answer, ErrorBody> {
        let (reply, answer) = oneshot::channel();
        (self.send)(Request { command, reply });
        answer.await.unwrap_or_else(|_| {
            Err(ErrorBody::new(ErrorCode::Internal, "the machine ended before it answered")
                .with_hint("see vmm.log in the VM's directory"))
        })
    }

    /// What may be read without asking.
    pub fn view(&self) -> &dyn View {
        &*self.view
    }

    /// The same, for another thread.
    pub fn shared_view(&self) -> Arc<dyn View> {
        Arc::clone(&self.view)
    }
}
