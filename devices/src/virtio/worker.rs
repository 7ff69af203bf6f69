//! The thread on which a virtio device serves its queues.
//!
//! It waits for kicks, for the device's own descriptors and for commands. A fault of the driver's (a broken queue) stops
//! the serving for good: the driver is told through DEVICE_NEEDS_RESET and the thread waits for the reset.
//!
//! It takes no processor from a vCPU (see `courtesy`).
//!
//! While paused only commands are read: kicks and edge-triggered readiness stay pending in the epoll set, so nothing is
//! missed on resume. A thread that parks says where its queues stand, for whoever saves the device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use civic_confine::Kind;
use tracing::{debug, error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::courtesy::wait_for_turns;
use super::ring::Ring;
use super::{Activation, Interrupt, QueuePosition};

/// What the driver did that the device cannot go on from. The text names it for the log.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Fault(pub String);

impl From<virtio_queue::Error> for Fault {
    fn from(error: virtio_queue::Error) -> Self {
        Self(format!("broken virtqueue: {error}"))
    }
}

/// A device's work, run on its thread.
pub trait Handler: Send + 'static {
    /// Descriptors to watch beside the kicks, each with the token that [`Handler::ready`] gets. Watched for input and
    /// output, edge-triggered: `ready` must go on until the descriptor would block or remember that it did not.
    fn sources(&self) -> Vec<(RawFd, u16)> {
        Vec::new()
    }
    /// The driver kicked queue `position` (its place in the activation's list), or the worker has just started.
    fn kicked(&mut self, position: usize) -> Result<(), Fault>;
    /// The descriptor watched under `token` became readable or writable.
    fn ready(&mut self, _token: u16) -> Result<(), Fault> {
        Ok(())
    }
    /// Completes what is in flight, and leaves what the device is saved with where that is found; called before a pause takes
    /// effect, that with which a restored device begins too, and before the thread ends. What was taken from a ring but not begun
    /// is put back.
    fn drain(&mut self) {}
    /// The rings it serves: after [`Handler::drain`], where they stand is all there is to know of them.
    fn rings(&self) -> Vec<&Ring>;
}

enum Command {
    Pause(SyncSender<Vec<QueuePosition>>),
    Resume,
    Stop,
}

/// A running device thread. Dropping it stops the thread.
pub struct Worker {
    commands: SyncSender<Command>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
    /// Where its queues stand, while it is paused.
    parked: Option<Vec<QueuePosition>>,
}

const COMMAND: u64 = u64::MAX;
const SOURCE: u64 = 1 << 32;

impl Worker {
    /// Starts a thread called `name` that serves `kicks` with `handler`, paused if the activation says so.
    ///
    /// # Errors
    /// When the epoll set, the eventfd or the thread cannot be made.
    pub fn spawn<H: Handler>(
        name: &str,
        kicks: Vec<EventFd>,
        mut handler: H,
        activation: &Activation,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let watch = |fd: RawFd, events, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token));
        watch(wake.as_raw_fd(), EventSet::IN, COMMAND)?;
        for (position, kick) in kicks.iter().enumerate() {
            watch(kick.as_raw_fd(), EventSet::IN, position as u64)?;
        }
        for (fd, token) in handler.sources() {
            let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            watch(fd, events, SOURCE | u64::from(token))?;
        }
        let (commands, inbox) = sync_channel(4);
        // Before the first resume it may be saved again.
        let parked = activation.paused.then(|| {
            handler.drain();
            positions(&handler)
        });
        let thread = Loop {
            name: name.to_owned(),
            epoll,
            wake: wake.try_clone()?,
            inbox,
            kicks,
            handler,
            interrupt: Arc::clone(&activation.interrupt),
            faulted: false,
        };
        let paused = activation.paused;
        // The kernel keeps 15 bytes of a thread's name.
        let short = name.get(..15).unwrap_or(name).to_owned();
        let thread = std::thread::Builder::new().name(short).spawn(move || {
            civic_confine::thread(Kind::Device);
            thread.run(paused)
        })?;
        Ok(Self { commands, wake, thread: Some(thread), parked })
    }

    fn send(&self, command: Command) {
        // A thread that is gone has nothing left to stop; its end was logged.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }

    /// Asks the thread to park; the answer comes when it has.
    fn begin_pause(&self) -> Option<Receiver<Vec<QueuePosition>>> {
        self.parked.is_none().then(|| {
            let (done, wait) = sync_channel(1);
            self.send(Command::Pause(done));
            wait
        })
    }

    fn resume(&mut self) {
        if self.parked.take().is_some() {
            self.send(Command::Resume);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("a device thread panicked");
        }
    }
}

/// The threads of an active device, as one. None while it is inactive.
#[derive(Default)]
pub struct Workers(Vec<Worker>);

impl Workers {
    /// These threads.
    pub fn new(workers: Vec<Worker>) -> Self {
        Self(workers)
    }

    /// Returns when requests in flight are complete and no thread touches anything until [`Workers::resume`]; idempotent.
    pub fn pause(&mut self) {
        // All at once: each waits for its own requests.
        let waits: Vec<_> = self.0.iter().map(Worker::begin_pause).collect();
        for (worker, wait) in self.0.iter_mut().zip(waits) {
            if let Some(wait) = wait {
                worker.parked = Some(wait.recv().unwrap_or_default());
            }
        }
    }

    /// Undoes [`Workers::pause`].
    pub fn resume(&mut self) {
        self.0.iter_mut().for_each(Worker::resume);
    }

    /// Where the queues stand; none of a thread that runs.
    pub fn positions(&self) -> Vec<QueuePosition> {
        self.0.iter().filter_map(|worker| worker.parked.as_ref()).flatten().copied().collect()
    }
}

impl From<Worker> for Workers {
    fn from(worker: Worker) -> Self {
        Self(vec![worker])
    }
}

fn positions(handler: &impl Handler) -> Vec<QueuePosition> {
    handler.rings().into_iter().map(Ring::position).collect()
}

struct Loop<H> {
    name: String,
    epoll: Epoll,
    wake: EventFd,
    inbox: Receiver<Command>,
    kicks: Vec<EventFd>,
    handler: H,
    interrupt: Arc<dyn Interrupt>,
    faulted: bool,
}

impl<H: Handler> Loop<H> {
    fn run(mut self, paused: bool) {
        if let Err(e) = wait_for_turns() {
            debug!(device = %self.name, "cannot choose how to be scheduled: {e}");
        }
        if paused && !self.obey(true) {
            return;
        }
        // Kicks from before the worker existed went to nobody: look at every queue once.
        for position in 0..self.kicks.len() {
            let result = self.handler.kicked(position);
            self.check(result);
        }
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    error!(device = %self.name, "waiting for events failed: {e}");
                    self.interrupt.needs_reset();
                    return;
                }
            };
            // Commands first: after a pause no queue may be touched, and the events come again on resume.
            if events[..count].iter().any(|e| e.data() == COMMAND) {
                let _ = self.wake.read();
                if !self.obey(false) {
                    return;
                }
            }
            for event in &events[..count] {
                match event.data() {
                    COMMAND => {}
                    token if token & SOURCE != 0 => self.serve(|h| h.ready(token as u16)),
                    position => {
                        let position = position as usize;
                        let _ = self.kicks[position].read();
                        self.serve(|h| h.kicked(position));
                    }
                }
            }
        }
    }

    /// Obeys waiting commands; false when told to stop. Blocks while paused.
    fn obey(&mut self, mut paused: bool) -> bool {
        loop {
            let command = if paused {
                self.inbox.recv().ok()
            } else {
                match self.inbox.try_recv() {
                    Ok(command) => Some(command),
                    Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => None,
                }
            };
            match command {
                Some(Command::Pause(done)) => {
                    self.handler.drain();
                    paused = true;
                    let _ = done.send(positions(&self.handler));
                }
                Some(Command::Resume) => paused = false,
                Some(Command::Stop) | None => {
                    self.handler.drain();
                    return false;
                }
            }
        }
    }

    fn serve(&mut self, work: impl FnOnce(&mut H) -> Result<(), Fault>) {
        if !self.faulted {
            let result = work(&mut self.handler);
            self.check(result);
        }
    }

    fn check(&mut self, result: Result<(), Fault>) {
        if let Err(fault) = result
            && !self.faulted
        {
            warn!(device = %self.name, "{fault}: the driver must reset the device");
            self.faulted = true;
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    struct Ignore(AtomicUsize);
    impl Interrupt for Ignore {
        fn queue(&self, _: u16) {}
        fn config(&self) {}
        fn needs_reset(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct Probe {
        seen: mpsc::Sender<&'static str>,
        faulty: bool,
    }
    impl Handler for Probe {
        fn kicked(&mut self, _: usize) -> Result<(), Fault> {
            let _ = self.seen.send("kick");
            if self.faulty { Err(Fault("wrong".into())) } else { Ok(()) }
        }
        fn drain(&mut self) {
            let _ = self.seen.send("drain");
        }
        fn rings(&self) -> Vec<&Ring> {
            Vec::new()
        }
    }

    fn start(faulty: bool) -> (Workers, EventFd, mpsc::Receiver<&'static str>, Arc<Ignore>) {
        start_as(faulty, false)
    }

    fn start_as(faulty: bool, paused: bool) -> (Workers, EventFd, mpsc::Receiver<&'static str>, Arc<Ignore>) {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, log) = mpsc::channel();
        let interrupt = Arc::new(Ignore(AtomicUsize::new(0)));
        let kicks = vec![kick.try_clone().unwrap()];
        let ram = Arc::new(vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]).unwrap());
        let activation = Activation { ram, features: 0, queues: Vec::new(), interrupt: interrupt.clone(), paused };
        let worker = Worker::spawn("probe", kicks, Probe { seen, faulty }, &activation).unwrap();
        (worker.into(), kick, log, interrupt)
    }

    #[test]
    fn a_kick_during_a_pause_is_served_after_it() {
        let (mut worker, kick, log, _) = start(false);
        assert_eq!(log.recv(), Ok("kick"));
        worker.pause();
        assert_eq!(log.recv(), Ok("drain"));
        kick.write(1).unwrap();
        worker.pause();
        assert!(log.try_recv().is_err());
        worker.resume();
        assert_eq!(log.recv(), Ok("kick"));
        drop(worker);
        assert_eq!(log.recv(), Ok("drain"));
        assert!(log.recv().is_err());
    }

    #[test]
    fn a_worker_that_starts_paused_serves_nothing_until_it_may() {
        let (mut worker, kick, log, _) = start_as(false, true);
        assert_eq!(log.try_recv(), Ok("drain"));
        kick.write(1).unwrap();
        worker.pause();
        assert!(log.try_recv().is_err());
        worker.resume();
        assert_eq!((log.recv(), log.recv()), (Ok("kick"), Ok("kick")));
        drop(worker);
        let (worker, _kick, log, _) = start_as(false, true);
        drop(worker);
        assert_eq!(log.iter().collect::<Vec<_>>(), ["drain", "drain"]);
    }

    #[test]
    fn a_fault_is_told_once_and_ends_the_serving() {
        let (mut worker, kick, log, interrupt) = start(true);
        assert_eq!(log.recv(), Ok("kick"));
        kick.write(1).unwrap();
        worker.pause();
        worker.resume();
        drop(worker);
        assert_eq!(log.iter().collect::<Vec<_>>(), ["drain", "drain"]);
        assert_eq!(interrupt.0.load(Ordering::SeqCst), 1);
    }
}
