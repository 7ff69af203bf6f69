//! The devices, each with the far side of it in the fuzzer's hands, and a request of which it is known how it must end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use civic_devices::console_hub::ConsoleInput;
use civic_devices::virtio::balloon::{Balloon, BalloonControl, PAGE, PageRelease};
use civic_devices::virtio::block::{Block, BlockOptions, Disk, DiskError, DiskOptions, SECTOR};
use civic_devices::virtio::console::Console;
use civic_devices::virtio::net::{FrameLink, LinkSwitch, Mac, NET_HEADER, Net, NetOptions, Offloads};
use civic_devices::virtio::rng::Rng;
use civic_devices::virtio::state::VirtioPciStateV1;
use civic_devices::virtio::vsock::{Vsock, VsockListener};
use civic_devices::virtio::{GuestRam, VirtioDevice};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::host::{hub, scratch};

/// How many sorts there are.
pub const KINDS: u8 = 7;

/// Feature bits of a balloon (§5.5.3).
const BALLOON_STATS: u32 = 1;
const BALLOON_REPORTING: u32 = 5;
/// Pairs of queues of a network card.
const PAIRS: usize = 2;

/// Sectors of a disk.
pub const SECTORS: u64 = 64;

/// A part of a request.
pub enum Part {
    /// For the device.
    Say(Vec<u8>),
    /// Room for its answer.
    Room(u32),
}

/// A request whose end is known.
pub struct Known {
    /// What has to come in for it.
    pub feed: &'static [u8],
    /// The queue that it goes to.
    pub queue: u16,
    /// Its chain.
    pub parts: Vec<Part>,
    /// How much of the answer is written: at least and at most.
    pub answer: (u32, u32),
}

/// A device's far side: it outlives the device, as a tap or a disk does.
pub enum Far {
    /// A disk.
    Disk(Arc<Disk>),
    /// A network: for each pair of queues a link to the device and the other end of that; and the device's cable.
    Net { links: Vec<Arc<Link>>, ends: Vec<OwnedFd>, switch: Option<Arc<LinkSwitch>> },
    /// Nothing: entropy comes from the host.
    Rng,
    /// A console port that somebody types at.
    Console(Option<Arc<dyn ConsoleInput>>),
    /// Who wants memory of the guest.
    Balloon(Option<BalloonControl>),
    /// Programs with unix sockets.
    Vsock { listener: Arc<VsockListener>, programs: Mutex<Programs> },
}

/// Programs on the host that talk with the guest.
pub struct Programs {
    path: PathBuf,
    /// Serves port [`SERVED`].
    server: UnixListener,
    /// Those that connected, to the guest and from it.
    connected: Vec<UnixStream>,
}

/// The port of the host that the guest finds a program at.
pub const SERVED: u32 = 52;
/// The guest's address.
pub const CID: u64 = 3;
/// Connections held at a time.
const MAX_CONNECTED: usize = 32;

impl Programs {
    fn act(&mut self, how: u8, bytes: &[u8]) {
        let room = self.connected.len() < MAX_CONNECTED;
        match (how % 8, self.connected.last_mut()) {
            (0 | 1, _) if room => {
                if let Ok(mut stream) = UnixStream::connect(&self.path) {
                    stream.set_nonblocking(true).expect("a socket can be");
                    if how % 8 == 1 {
                        let _ = stream.write(b"CONNECT 1024\n");
                    }
                    let _ = stream.write(bytes);
                    self.connected.push(stream);
                }
            }
            (2 | 3, Some(stream)) => drop(stream.write(bytes)),
            (4, Some(stream)) => drop(stream.shutdown(Shutdown::Write)),
            (5, Some(_)) => drop(self.connected.pop()),
            (6, Some(stream)) => drop(stream.read(&mut [0; 4096])),
            (7, _) => {
                if let Ok((stream, _)) = self.server.accept() {
                    stream.set_nonblocking(true).expect("a socket can be");
                    self.connected.insert(0, stream);
                    self.connected.truncate(MAX_CONNECTED);
                }
                let turn = 1.min(self.connected.len());
                self.connected.rotate_left(turn);
            }
            _ => {}
        }
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(served(&self.path));
    }
}

fn served(path: &std::path::Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{SERVED}"));
    name.into()
}

fn vsock() -> Far {
    // A fuzzer that is killed leaves one of each at most.
    let path = scratch("vsock");
    let _ = std::fs::remove_file(served(&path));
    let listener = Arc::new(VsockListener::bind(&path).expect("a new socket can be bound"));
    let server = UnixListener::bind(served(&path)).expect("a new socket can be bound");
    server.set_nonblocking(true).expect("a socket can be");
    Far::Vsock { listener, programs: Mutex::new(Programs { path, server, connected: Vec::new() }) }
}

/// A header of a packet from the guest (virtio 1.2 §5.10.6) that is no more than a header.
pub fn packet(op: u16, from: u32, to: u32) -> Vec<u8> {
    let ports = [CID.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    let rest = [from.to_le_bytes(), to.to_le_bytes(), [0; 4]].concat();
    let kinds = [1_u16.to_le_bytes(), op.to_le_bytes(), [0; 2], [0; 2]].concat();
    [ports, rest, kinds, 0x1_0000_u32.to_le_bytes().to_vec(), vec![0; 4]].concat()
}

/// Takes pages and does nothing with them, for a snapshot cannot tell that from a device that writes where it may not.
struct Pages(GuestRam);

impl PageRelease for Pages {
    fn release(&self, gpa: u64, len: u64) -> io::Result<bool> {
        assert!(gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE), "{gpa:#x}+{len:#x} are not whole pages");
        assert!(self.0.check_range(GuestAddress(gpa), len as usize), "{gpa:#x}+{len:#x} are not RAM");
        // Some are kept.
        Ok((gpa / PAGE).is_multiple_of(2))
    }
}

/// One end of a socket pair, as a tap.
pub struct Link(OwnedFd);

impl FrameLink for Link {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

impl Far {
    /// The far side of a device of sort `kind` (below [`KINDS`]).
    pub fn new(kind: u8) -> Self {
        match kind {
            0 | 1 => Self::Disk(Arc::new(disk(kind == 1))),
            2 => {
                let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
                let pair =
                    |_| socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).expect("the host has sockets");
                let (links, ends): (Vec<_>, _) = (0..PAIRS).map(pair).unzip();
                Self::Net { links: links.into_iter().map(|link| Arc::new(Link(link))).collect(), ends, switch: None }
            }
            3 => Self::Rng,
            4 => Self::Console(None),
            5 => vsock(),
            _ => Self::Balloon(None),
        }
    }

    /// A device before it.
    pub fn device(&mut self, ram: &GuestRam) -> Box<dyn VirtioDevice> {
        match self {
            Self::Disk(disk) => {
                let options = BlockOptions { queues: 2, ..BlockOptions::default() };
                Box::new(Block::new("disk", Arc::clone(disk), options).expect("the options are good"))
            }
            Self::Net { links, switch, .. } => {
                let links = links.iter().map(|link| Arc::clone(link) as _).collect();
                let net =
                    Net::new("net", links, NetOptions::new(Mac([2, 0, 0, 0, 0, 1]))).expect("the options are good");
                *switch = Some(net.switch());
                Box::new(net)
            }
            Self::Balloon(control) => {
                let balloon = Balloon::new(Arc::new(Pages(Arc::clone(ram))), 0).expect("the host has eventfds");
                *control = Some(balloon.control());
                Box::new(balloon)
            }
            Self::Rng => Box::new(Rng::new()),
            Self::Console(input) => {
                let console = Console::new(hub()).expect("the host has eventfds");
                *input = Some(console.input());
                Box::new(console)
            }
            Self::Vsock { listener, .. } => {
                Box::new(Vsock::new(CID, Arc::clone(listener)).expect("a guest may have this address"))
            }
        }
    }

    /// Whether an active device in this state serves queue `index`: most serve all that are enabled.
    pub fn serves(&self, index: usize, state: &VirtioPciStateV1) -> bool {
        let enabled = |index: usize| state.queues.get(index).is_some_and(|queue| queue.enabled);
        let has = |feature: u32| state.accepted & 1 << feature != 0;
        let meant = match self {
            // §5.1.2: the pairs in order, as far as they are there, and control after the last that the driver knows of.
            Self::Net { .. } => {
                let most = if has(VIRTIO_NET_F_MQ) { PAIRS } else { 1 };
                let pairs = (0..most).take_while(|pair| enabled(2 * pair) && enabled(2 * pair + 1)).count();
                index < 2 * pairs || has(VIRTIO_NET_F_CTRL_VQ) && index == 2 * most
            }
            // §5.5.2 and, for reports, wherever drivers look for them.
            Self::Balloon(_) => {
                let statistics = has(BALLOON_STATS);
                let reporting = [4, 3, 2].into_iter().find(|index| enabled(*index) && !(*index == 2 && statistics));
                let reporting = reporting.filter(|_| has(BALLOON_REPORTING));
                index < 2 || index == 2 && statistics || Some(index) == reporting
            }
            _ => true,
        };
        meant && enabled(index)
    }

    /// Something comes in from there.
    pub fn feed(&self, how: u8, bytes: &[u8]) {
        match self {
            Self::Vsock { programs, .. } => lock(programs).act(how, bytes),
            Self::Net { switch: Some(switch), .. } if how % 8 == 6 => switch.set_up(!switch.is_up()),
            Self::Net { switch: Some(switch), .. } if how % 8 == 7 => switch.announce(),
            // No tap has an empty frame: to read nothing says that the far side was closed.
            Self::Net { .. } if bytes.is_empty() => {}
            Self::Net { ends, .. } => {
                // A full socket drops it, as a network does.
                let _ = send(ends[usize::from(how) % PAIRS].as_raw_fd(), bytes, MsgFlags::empty());
            }
            Self::Balloon(Some(control)) if how % 8 == 1 => control.request_statistics(),
            Self::Balloon(Some(control)) => control.set_target(bytes.first().copied().unwrap_or_default().into()),
            Self::Console(Some(input)) => drop(input.offer(bytes)),
            _ => {}
        }
    }

    /// Takes what the device sent: the length of the last frame from the first pair.
    pub fn drain(&self) -> Option<usize> {
        let Self::Net { ends, .. } = self else { return None };
        let mut frame = [0; 70_000];
        let mut take =
            |end: &OwnedFd| std::iter::from_fn(|| recv(end.as_raw_fd(), &mut frame, MsgFlags::empty()).ok()).last();
        let last: Vec<_> = ends.iter().map(&mut take).collect();
        last[0]
    }

    /// Requests that a device which was reset must answer.
    pub fn known(&self) -> Vec<Known> {
        match self {
            Self::Disk(_) => {
                let header = [0_u32.to_le_bytes(), [0; 4], 1_u32.to_le_bytes(), [0; 4]].concat();
                let parts = vec![Part::Say(header), Part::Room(SECTOR as u32), Part::Room(1)];
                vec![Known { feed: &[], queue: 0, parts, answer: (513, 513) }]
            }
            Self::Net { switch, .. } => {
                self.drain();
                if let Some(switch) = switch {
                    switch.set_up(true);
                }
                let frame = Part::Say(vec![0; NET_HEADER + 60]);
                vec![
                    Known { feed: &[], queue: 1, parts: vec![frame], answer: (0, 0) },
                    // There may be larger ones before it.
                    Known { feed: &[0; 72], queue: 0, parts: vec![Part::Room(66_000)], answer: (13, 66_000) },
                ]
            }
            Self::Rng => vec![Known { feed: &[], queue: 0, parts: vec![Part::Room(64)], answer: (64, 64) }],
            Self::Console(_) => {
                vec![
                    Known { feed: &[], queue: 1, parts: vec![Part::Say(b"ping".to_vec())], answer: (0, 0) },
                    Known { feed: b"pong", queue: 0, parts: vec![Part::Room(4096)], answer: (1, 4096) },
                ]
            }
            Self::Balloon(_) => {
                let page = Part::Say(4_u32.to_le_bytes().to_vec());
                vec![Known { feed: &[], queue: 0, parts: vec![page], answer: (0, 0) }]
            }
            Self::Vsock { .. } => {
                // Nobody is there.
                let request = Part::Say(packet(1, 1025, SERVED + 1));
                vec![
                    Known { feed: &[], queue: 1, parts: vec![request], answer: (0, 0) },
                    Known { feed: &[], queue: 0, parts: vec![Part::Room(4096)], answer: (44, 44) },
                ]
            }
        }
    }

    /// That what [`Far::known`] asked for has arrived.
    pub fn check_known(&self) {
        if let Self::Net { .. } = self {
            assert_eq!(self.drain(), Some(NET_HEADER + 60), "the frame did not come through");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn disk(read_only: bool) -> Disk {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).expect("the host has memory"));
    file.set_len(SECTORS * SECTOR).expect("the host has memory");
    let opened = open(&file, DiskOptions { read_only, ..DiskOptions::default() });
    opened.expect("a new file can be opened")
}

/// A disk in a file that has no name.
pub fn open(file: &File, options: DiskOptions) -> Result<Disk, DiskError> {
    Disk::open(&PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())), options)
}
