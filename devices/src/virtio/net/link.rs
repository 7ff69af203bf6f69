//! What a network card is plugged into, and whether it is.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The features by which a driver says what may be left undone in the frames that it gets.
pub(super) const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// What the far side of a link may leave undone in the frames that it sends to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums. Without it nothing else.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
    /// Segmentation of TCP whose first segment alone carries CWR.
    pub ecn: bool,
    /// Segmentation of UDP over IPv4.
    pub uso4: bool,
    /// Segmentation of UDP over IPv6.
    pub uso6: bool,
}

impl Offloads {
    /// Those that a driver can cope with which has these `GUEST_…` features; one that rests on another only with that (§5.1.3.1).
    pub(super) fn of_guest(features: u64) -> Self {
        let has = |feature: u32| features & 1 << feature != 0;
        let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, tso6) = (checksum && has(VIRTIO_NET_F_GUEST_TSO4), checksum && has(VIRTIO_NET_F_GUEST_TSO6));
        Self {
            checksum,
            tso4,
            tso6,
            ecn: (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN),
            uso4: checksum && has(VIRTIO_NET_F_GUEST_USO4),
            uso6: checksum && has(VIRTIO_NET_F_GUEST_USO6),
        }
    }
}

/// Something that carries frames, each with a header of [`NET_HEADER`](super::NET_HEADER) bytes before it, one per read or
/// write. A card with several pairs of queues has one for each: different entrances to the same wire.
/// No frame is empty: to read nothing says that the far side was closed, and is not tried again until the descriptor tells of news.
pub trait FrameLink: Send + Sync {
    /// Its descriptor, non-blocking. EBADFD from it says that the interface is gone for good.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Says what the guest can cope with. For the whole wire.
    ///
    /// # Errors
    /// When the far side cannot be told.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Whether UDP may be left unsegmented, in both directions.
    fn segments_udp(&self) -> bool {
        false
    }

    /// The longest packet that the wire carries, if that is known.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// Whether there is a cable at all.
    fn carrier(&self) -> bool {
        true
    }

    /// Has frames for the guest come this way too, or not. Idempotent; an only entrance may ignore it.
    ///
    /// # Errors
    /// What the system says.
    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}

/// The cable of a card: in or out. Who holds it may pull it while the guest runs.
#[derive(Debug)]
pub struct LinkSwitch {
    /// As the guest reads it (§5.1.4): VIRTIO_NET_S_….
    status: AtomicU16,
    /// Whether the driver knows what ANNOUNCE means.
    announces: AtomicBool,
    /// Written when the driver is to read the status again.
    pub(super) changed: EventFd,
}

const UP: u16 = VIRTIO_NET_S_LINK_UP as u16;
const ANNOUNCE: u16 = VIRTIO_NET_S_ANNOUNCE as u16;

impl LinkSwitch {
    pub(super) fn new() -> io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { status: AtomicU16::new(UP), announces: AtomicBool::new(false), changed })
    }

    /// True when frames pass.
    pub fn is_up(&self) -> bool {
        self.status() & UP != 0
    }

    /// Puts the cable in or pulls it out: frames of both directions are then lost. The guest is told.
    pub fn set_up(&self, up: bool) {
        let old =
            if up { self.status.fetch_or(UP, Ordering::AcqRel) } else { self.status.fetch_and(!UP, Ordering::AcqRel) };
        if (old & UP != 0) != up {
            self.tell();
        }
    }

    /// Asks the guest to tell the network where its address is now, if its driver knows how.
    pub fn announce(&self) {
        if self.announces.load(Ordering::Acquire) {
            self.status.fetch_or(ANNOUNCE, Ordering::AcqRel);
            self.tell();
        }
    }

    pub(super) fn status(&self) -> u16 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn announced(&self) {
        self.status.fetch_and(!ANNOUNCE, Ordering::AcqRel);
    }

    /// A driver came, or went when it `announces` no more.
    pub(super) fn set_announces(&self, announces: bool) {
        self.announces.store(announces, Ordering::Release);
        if !announces {
            self.announced();
        }
    }

    fn tell(&self) {
        // Fails only when the counter is full, which is a wake-up too.
        let _ = self.changed.write(1);
    }
}
