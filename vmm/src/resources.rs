//! What a machine is made from and what outlives its reboots: opened files, locks, taps, console ports.
//!
//! Everything that can fail because of what the user gave is opened here, before any memory is allocated, so that a wrong
//! path leaves nothing behind. Nothing is opened later.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use civic_api::launch::SourceNet;
use civic_api::{
    CONSOLE_PORT_HVC, CONSOLE_PORT_SERIAL, ConsoleConfig, DiskConfig, ErrorBody, NetConfig, NewDevice, VmConfig,
    VsockConfig,
};
use civic_devices::console_hub::ConsoleHub;
use civic_devices::isolated::IsolatedLink;
use civic_devices::mirror::MirrorLink;
use civic_devices::tap::{Tap, TapError};
use civic_devices::virtio::block::{Disk, DiskError, DiskOptions};
use civic_devices::virtio::net::FrameLink;
use civic_devices::virtio::vsock::{VsockError, VsockListener};

use crate::boot::{BootError, Kernel};
use crate::fork::BootFiles;
use crate::fork::disks::{DiskParts, LayeredDisk, image_format};

/// Bytes of console output kept for clients that attach later.
const HISTORY_BYTES: usize = 256 << 10;

/// Why a VM's resources could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The kernel cannot be opened or is none.
    #[error("cannot use the kernel {}", path.display())]
    Kernel {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: BootError,
    },
    /// The initial RAM disk does not open.
    #[error("cannot open the initrd {}", path.display())]
    Initrd {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk's image cannot be used.
    #[error("cannot use the image {} for disk '{id}'", path.display())]
    Disk {
        /// The disk.
        id: String,
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: DiskError,
    },
    /// A network card's tap cannot be used.
    #[error("cannot use tap '{tap}' for network card '{id}'")]
    Tap {
        /// The card.
        id: String,
        /// The interface.
        tap: String,
        /// Why.
        #[source]
        source: TapError,
    },
    /// The vsock's socket cannot be made.
    #[error("cannot make the socket of the vsock")]
    Vsock(#[source] VsockError),
    /// There is no place for what would be written over a disk's image.
    #[error("{}", .0.message)]
    Overlay(Box<ErrorBody>),
    /// A wire that leads nowhere cannot be made.
    #[error("cannot isolate a network card")]
    Isolated(#[source] io::Error),
    /// A console port could not be made.
    #[error("cannot make a console port")]
    Console(#[source] io::Error),
}

/// A VM's opened resources.
pub struct Resources {
    /// The kernel, recognised.
    pub kernel: Kernel,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// By position in the configuration.
    pub disks: Vec<OpenDisk>,
    /// By position in the configuration, the queues of each.
    pub taps: Vec<Vec<Arc<dyn FrameLink>>>,
    /// Where host programs reach into the guest.
    pub vsock: Option<Arc<VsockListener>>,
    /// The first UART.
    pub serial: Arc<ConsoleHub>,
    /// The virtio console.
    pub hvc: Arc<ConsoleHub>,
    /// The others, by position in the configuration.
    pub consoles: Vec<Arc<ConsoleHub>>,
    /// Where what is opened later is put.
    pub places: OpenIn,
}

/// Where devices keep what they need on the host.
#[derive(Clone, Debug)]
pub struct OpenIn {
    /// Consoles' logs.
    pub logs: PathBuf,
    /// What is written to disks whose image stays as it is.
    pub overlays: PathBuf,
}

/// A disk.
#[derive(Clone)]
pub struct OpenDisk {
    /// As its device has it.
    pub disk: Arc<Disk>,
    /// What it consists of, if it is a fork's or has an overlay.
    pub layers: Option<Arc<LayeredDisk>>,
}

/// A device's opened resource.
pub enum Opened {
    /// A disk's image.
    Disk(OpenDisk),
    /// The queues of a network card's wire.
    Net(Vec<Arc<dyn FrameLink>>),
    /// A console's port.
    Console(Arc<ConsoleHub>),
}

impl Opened {
    /// Opens what a device needs.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn new(device: &NewDevice, places: &OpenIn) -> Result<Self, ResourceError> {
        Ok(match device {
            NewDevice::Disk(disk) => Self::Disk(open_disk(disk, &places.overlays)?),
            NewDevice::Net(net) => Self::Net(open_tap(net)?),
            NewDevice::Console(console) => Self::Console(open_console(console, &places.logs)?),
        })
    }
}

impl Resources {
    /// Opens everything that `config` names; console logs go to `log_dir`.
    pub fn open(config: &VmConfig, log_dir: &Path) -> Result<Self, ResourceError> {
        let kernel = open_regular(&config.kernel).map_err(|e| kernel_unusable(config, BootError::Open(e)))?;
        let open_initrd =
            |path: &PathBuf| open_regular(path).map_err(|source| ResourceError::Initrd { path: path.clone(), source });
        let initrd = config.initrd.as_ref().map(open_initrd).transpose()?;
        let mut this = Self::open_but_disks_and_taps(config, log_dir, BootFiles { kernel, initrd })?;
        let overlays = &this.places.overlays;
        this.disks = config.disks.iter().map(|disk| open_disk(disk, overlays)).collect::<Result<_, _>>()?;
        this.taps = config.nets.iter().map(open_tap).collect::<Result<_, _>>()?;
        Ok(this)
    }

    /// Takes over what was opened for a device that is now the last of its kind in the configuration.
    pub fn add(&mut self, opened: Opened) {
        match opened {
            Opened::Disk(disk) => self.disks.push(disk),
            Opened::Net(tap) => self.taps.push(tap),
            Opened::Console(hub) => self.consoles.push(hub),
        }
    }

    /// Gives up what the device `id` of `config` has; none if that has no such device, or nothing was opened for it.
    pub fn remove(&mut self, config: &VmConfig, id: &str) -> Option<Opened> {
        let disk = config.disks.iter().position(|disk| disk.id == id);
        let net = config.nets.iter().position(|net| net.id == id);
        let console = config.consoles.iter().position(|console| console.id == id);
        if let Some(n) = disk.filter(|n| *n < self.disks.len()) {
            Some(Opened::Disk(self.disks.remove(n)))
        } else if let Some(n) = net.filter(|n| *n < self.taps.len()) {
            Some(Opened::Net(self.taps.remove(n)))
        } else {
            console.filter(|n| *n < self.consoles.len()).map(|n| Opened::Console(self.consoles.remove(n)))
        }
    }

    /// The same for a VM that is to be forked from another: its network cards are as `source_net` says, and its disks come later. With
    /// them, what the source is to feed them by.
    pub fn of_fork(
        config: &VmConfig,
        log_dir: &Path,
        source_net: SourceNet,
        boot: BootFiles,
    ) -> Result<(Self, Vec<MirrorEnds>), ResourceError> {
        let mut this = Self::open_but_disks_and_taps(config, log_dir, boot)?;
        let mut mirrors = Vec::new();
        for net in &config.nets {
            let (links, sockets) = wires(net, source_net)?;
            this.taps.push(links);
            if !sockets.is_empty() {
                mirrors.push(MirrorEnds { id: net.id.clone(), sockets });
            }
        }
        Ok((this, mirrors))
    }

    /// Has a fork's resources be those of `now`, where they were of `before`: its source's devices have changed while it waited. It may not
    /// open anything any more, so a console that came meanwhile has no log.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub fn follow(&mut self, before: &VmConfig, now: &VmConfig) -> Result<(), ResourceError> {
        let mut taps = Vec::new();
        for net in &now.nets {
            let known = before.nets.iter().position(|other| other.id == net.id && other.queues == net.queues);
            taps.push(match known.and_then(|n| self.taps.get(n)) {
                Some(links) => links.clone(),
                None => wires(net, SourceNet::Isolated)?.0,
            });
        }
        self.taps = taps;
        let mut hubs = Vec::new();
        for console in &now.consoles {
            let known = before.consoles.iter().position(|other| other.id == console.id);
            hubs.push(match known.and_then(|n| self.consoles.get(n)) {
                Some(hub) => Arc::clone(hub),
                None => ConsoleHub::new(&console.id, HISTORY_BYTES, None).map_err(ResourceError::Console)?,
            });
        }
        self.consoles = hubs;
        Ok(())
    }

    fn open_but_disks_and_taps(config: &VmConfig, log_dir: &Path, boot: BootFiles) -> Result<Self, ResourceError> {
        let kernel = Kernel::open(boot.kernel).map_err(|e| kernel_unusable(config, e))?;
        let bind = |vsock: &VsockConfig| VsockListener::bind(&vsock.uds).map(Arc::new).map_err(ResourceError::Vsock);
        let vsock = config.vsock.as_ref().map(bind).transpose()?;
        let consoles =
            config.consoles.iter().map(|console| open_console(console, log_dir)).collect::<Result<_, _>>()?;
        Ok(Self {
            kernel,
            initrd: boot.initrd,
            disks: Vec::new(),
            taps: Vec::new(),
            vsock,
            serial: open_hub(CONSOLE_PORT_SERIAL, &log_dir.join("serial.log"))?,
            hvc: open_hub(CONSOLE_PORT_HVC, &log_dir.join("hvc0.log"))?,
            consoles,
            places: OpenIn { logs: log_dir.to_owned(), overlays: config.forks.effective_dir().to_owned() },
        })
    }
}

fn kernel_unusable(config: &VmConfig, source: BootError) -> ResourceError {
    ResourceError::Kernel { path: config.kernel.clone(), source }
}

fn open_disk(disk: &DiskConfig, overlays: &Path) -> Result<OpenDisk, ResourceError> {
    let options = DiskOptions { read_only: !disk.writes_image(), format: image_format(disk), backing: disk.backing };
    let opened = Disk::open(&disk.path, options).map(Arc::new).map_err(|source| ResourceError::Disk {
        id: disk.id.clone(),
        path: disk.path.clone(),
        source,
    })?;
    if !disk.overlay {
        return Ok(OpenDisk { disk: opened, layers: None });
    }
    let (over, layers) =
        DiskParts::open_over(&opened, disk, overlays).map_err(|e| ResourceError::Overlay(Box::new(e)))?;
    Ok(OpenDisk { disk: Arc::new(over), layers: Some(layers) })
}

fn open_tap(net: &NetConfig) -> Result<Vec<Arc<dyn FrameLink>>, ResourceError> {
    let opened = Tap::open(&net.tap, net.queues.unwrap_or(1).into()).map_err(|source| ResourceError::Tap {
        id: net.id.clone(),
        tap: net.tap.clone(),
        source,
    })?;
    Ok(opened.into_iter().map(|queue| Arc::new(queue) as Arc<dyn FrameLink>).collect())
}

/// The far ends of a fork's network card, by which its source's card is to feed it.
#[derive(Debug)]
pub struct MirrorEnds {
    /// The card.
    pub id: String,
    /// One for each of its queues.
    pub sockets: Vec<OwnedFd>,
}

/// What the queues of a fork's network card are connected to, and the far ends of what is to be fed.
type Wires = (Vec<Arc<dyn FrameLink>>, Vec<OwnedFd>);

fn wires(net: &NetConfig, source_net: SourceNet) -> Result<Wires, ResourceError> {
    let (mut links, mut sockets): Wires = (Vec::new(), Vec::new());
    for _ in 0..net.queues.unwrap_or(1) {
        let link: io::Result<Arc<dyn FrameLink>> = match source_net {
            SourceNet::Isolated => IsolatedLink::new().map(|link| Arc::new(link) as _),
            SourceNet::Down => IsolatedLink::down().map(|link| Arc::new(link) as _),
            SourceNet::Mirror => MirrorLink::pair().map(|(link, far)| {
                sockets.push(far);
                Arc::new(link) as _
            }),
        };
        links.push(link.map_err(ResourceError::Isolated)?);
    }
    Ok((links, sockets))
}

fn open_console(console: &ConsoleConfig, log_dir: &Path) -> Result<Arc<ConsoleHub>, ResourceError> {
    open_hub(&console.id, &log_dir.join(format!("console-{}.log", console.id)))
}

fn open_hub(port: &str, log: &Path) -> Result<Arc<ConsoleHub>, ResourceError> {
    let log = File::create(log).map_err(ResourceError::Console)?;
    ConsoleHub::new(port, HISTORY_BYTES, Some(log)).map_err(ResourceError::Console)
}

/// Opens a file for reading. A FIFO or a device would make the reader wait, or never end.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}
