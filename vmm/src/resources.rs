//! What a machine is made from and what outlives its reboots: opened files, locks, taps, console ports.
//!
//! Everything that can fail because of what the user gave is opened here, before any memory is allocated, so that a wrong
//! path leaves nothing behind. Nothing is opened later.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use civic_api::{CONSOLE_PORT_SERIAL, VmConfig, VsockConfig};
use civic_devices::console_hub::ConsoleHub;
use civic_devices::isolated::IsolatedLink;
use civic_devices::tap::{Tap, TapError};
use civic_devices::virtio::block::{Disk, DiskError, DiskFormat, DiskOptions};
use civic_devices::virtio::net::FrameLink;
use civic_devices::virtio::vsock::{VsockError, VsockListener};

use crate::boot::{BootError, Kernel};
use crate::fork::disks::ForkedDisk;

/// Bytes of console output kept for clients that attach later.
const HISTORY_BYTES: usize = 256 << 10;
/// The virtio console's port.
pub const CONSOLE_PORT_HVC: &str = "hvc0";

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
    pub disks: Vec<Arc<Disk>>,
    /// The same of a fork: what they consist of. Of a VM that is none, empty.
    pub forked_disks: Vec<Arc<ForkedDisk>>,
    /// By position in the configuration, the queues of each.
    pub taps: Vec<Vec<Arc<dyn FrameLink>>>,
    /// Where host programs reach into the guest.
    pub vsock: Option<Arc<VsockListener>>,
    /// The first UART.
    pub serial: Arc<ConsoleHub>,
    /// The virtio console.
    pub hvc: Arc<ConsoleHub>,
}

impl Resources {
    /// Opens everything that `config` names; console logs go to `log_dir`.
    pub fn open(config: &VmConfig, log_dir: &Path) -> Result<Self, ResourceError> {
        let mut this = Self::open_but_disks_and_taps(config, log_dir)?;
        this.disks = open_disks(config)?;
        this.taps = open_taps(config)?;
        Ok(this)
    }

    /// The same for a VM that is to be forked from another: its network cards are on wires that lead nowhere, and its disks come later.
    pub fn of_fork(config: &VmConfig, log_dir: &Path) -> Result<Self, ResourceError> {
        let mut this = Self::open_but_disks_and_taps(config, log_dir)?;
        for net in &config.nets {
            let queue = |_| IsolatedLink::new().map(|link| Arc::new(link) as Arc<dyn FrameLink>);
            let queues: io::Result<Vec<_>> = (0..net.queues.unwrap_or(1)).map(queue).collect();
            this.taps.push(queues.map_err(ResourceError::Isolated)?);
        }
        Ok(this)
    }

    fn open_but_disks_and_taps(config: &VmConfig, log_dir: &Path) -> Result<Self, ResourceError> {
        let kernel = open_regular(&config.kernel)
            .map_err(BootError::Open)
            .and_then(Kernel::open)
            .map_err(|source| ResourceError::Kernel { path: config.kernel.clone(), source })?;
        let open_initrd =
            |path: &PathBuf| open_regular(path).map_err(|source| ResourceError::Initrd { path: path.clone(), source });
        let initrd = config.initrd.as_ref().map(open_initrd).transpose()?;
        let bind = |vsock: &VsockConfig| VsockListener::bind(&vsock.uds).map(Arc::new).map_err(ResourceError::Vsock);
        let vsock = config.vsock.as_ref().map(bind).transpose()?;
        let hub = |port: &str| {
            let log = File::create(log_dir.join(format!("{port}.log"))).map_err(ResourceError::Console)?;
            ConsoleHub::new(port, HISTORY_BYTES, Some(log)).map_err(ResourceError::Console)
        };
        Ok(Self {
            kernel,
            initrd,
            disks: Vec::new(),
            forked_disks: Vec::new(),
            taps: Vec::new(),
            vsock,
            serial: hub(CONSOLE_PORT_SERIAL)?,
            hvc: hub(CONSOLE_PORT_HVC)?,
        })
    }
}

fn open_disks(config: &VmConfig) -> Result<Vec<Arc<Disk>>, ResourceError> {
    let mut disks = Vec::new();
    for disk in &config.disks {
        let format = match disk.format {
            civic_api::DiskFormat::Raw => DiskFormat::Raw,
            civic_api::DiskFormat::Qcow2 => DiskFormat::Qcow2,
        };
        let options = DiskOptions { read_only: disk.read_only, format, backing: disk.backing };
        let opened = Disk::open(&disk.path, options).map_err(|source| ResourceError::Disk {
            id: disk.id.clone(),
            path: disk.path.clone(),
            source,
        })?;
        disks.push(Arc::new(opened));
    }
    Ok(disks)
}

fn open_taps(config: &VmConfig) -> Result<Vec<Vec<Arc<dyn FrameLink>>>, ResourceError> {
    let mut taps = Vec::new();
    for net in &config.nets {
        let opened = Tap::open(&net.tap, net.queues.unwrap_or(1).into()).map_err(|source| ResourceError::Tap {
            id: net.id.clone(),
            tap: net.tap.clone(),
            source,
        })?;
        taps.push(opened.into_iter().map(|queue| Arc::new(queue) as Arc<dyn FrameLink>).collect());
    }
    Ok(taps)
}

/// Opens a file for reading. A FIFO or a device would make the reader wait, or never end.
fn open_regular(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}
