//! What the user is told when a VM cannot be made: a code, the chain of causes, a way out.

use std::io;

use civic_api::{ErrorBody, ErrorCode};
use civic_devices::tap::TapError;
use civic_devices::virtio::block::DiskError;
use civic_devices::virtio::vsock::VsockError;
use civic_fork::image;

use crate::boot::BootError;
use crate::cpu::cpuid::CpuidError;
use crate::kvm::KvmError;
use crate::machine::BuildError;
use crate::machine::state::RestoreError;
use crate::memory::MemoryError;
use crate::resources::ResourceError;
use crate::saved::SavedError;
use crate::state::StateError;

impl From<ResourceError> for ErrorBody {
    fn from(error: ResourceError) -> Self {
        if let ResourceError::Overlay(body) = error {
            return *body;
        }
        let (code, hint) = match &error {
            ResourceError::Kernel { .. } => (
                ErrorCode::KernelUnusable,
                Some("give a bzImage (a distribution's vmlinuz) or an uncompressed vmlinux"),
            ),
            ResourceError::Initrd { .. } => (ErrorCode::ImageUnusable, None),
            ResourceError::Disk { source, .. } => disk(source),
            ResourceError::Tap { source, .. } => tap(source),
            ResourceError::Vsock(VsockError::InUse(_) | VsockError::Taken(_)) => {
                (ErrorCode::SocketUnavailable, Some("give each VM a path of its own"))
            }
            ResourceError::Vsock(_) => (ErrorCode::SocketUnavailable, None),
            ResourceError::Console(_) | ResourceError::Isolated(_) | ResourceError::Overlay(_) => {
                (ErrorCode::Internal, None)
            }
        };
        told(code, &error, hint)
    }
}

fn disk(error: &DiskError) -> (ErrorCode, Option<&'static str>) {
    match error {
        DiskError::Locked { .. } => (
            ErrorCode::ImageLocked,
            Some("stop whoever uses it, or give it to every VM as 'ro': a writable image has one user at a time"),
        ),
        DiskError::Permission { .. } => (ErrorCode::ImageUnusable, Some("let this user open it, or give it as 'ro'")),
        DiskError::Image { .. } => {
            (ErrorCode::ImageUnusable, Some("'qemu-img check' says what is wrong with an image"))
        }
        DiskError::Backing { .. } => (
            ErrorCode::ImageUnusable,
            Some(
                "add 'backing' to the disk if you trust whoever made the image: it names which of the host's files the guest reads",
            ),
        ),
        DiskError::Size { .. } => (ErrorCode::ImageUnusable, Some("give a raw image; 'truncate -s' pads one")),
        _ => (ErrorCode::ImageUnusable, None),
    }
}

fn tap(error: &TapError) -> (ErrorCode, Option<&'static str>) {
    let hint = match error {
        TapError::Absent(_) => "make it first: 'ip tuntap add dev NAME mode tap', then 'ip link set NAME up'",
        TapError::Permission { .. } => {
            "run as root or with CAP_NET_ADMIN, or give the tap to this user ('ip tuntap add … user NAME')"
        }
        TapError::SingleQueue(_) => {
            "give the card one queue, or make the tap anew: 'ip tuntap add dev NAME mode tap multi_queue'"
        }
        TapError::MultiQueue(_) => {
            "give the card several queues, or make the tap anew without: 'ip tuntap add dev NAME mode tap'"
        }
        TapError::Busy(_) => "another process has it: give each VM a tap of its own",
        _ => "'civic doctor' shows what this host can do",
    };
    (ErrorCode::TapUnavailable, Some(hint))
}

impl From<SavedError> for ErrorBody {
    fn from(error: SavedError) -> Self {
        let (code, hint) = match &error {
            SavedError::NotEmpty(_) => {
                (ErrorCode::SaveFailed, Some("name a directory that is empty or does not exist"))
            }
            SavedError::Save(image::SaveError::Write { source, .. }) | SavedError::Io { source, .. }
                if source.raw_os_error() == Some(nix::libc::ENOSPC) =>
            {
                (ErrorCode::SaveFailed, Some("make room, or save to another file system: the VM is as it was before"))
            }
            SavedError::Save(_) | SavedError::Io { .. } => (ErrorCode::SaveFailed, None),
            SavedError::DiskChanged { .. } => (
                ErrorCode::StateInvalid,
                Some(
                    "give the image as it was when the VM was saved; --allow-changed-disks restores all the same, and the file system \
                     on it will be damaged unless it is a copy made at that moment",
                ),
            ),
            SavedError::State { source: StateError::Version { .. } | StateError::Format { .. }, .. } => {
                (ErrorCode::StateInvalid, Some("restore it with the version of Civic that saved it"))
            }
            _ => (ErrorCode::StateInvalid, None),
        };
        told(code, &error, hint)
    }
}

impl From<RestoreError> for ErrorBody {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Build(error) => error.into(),
            _ => told(ErrorCode::StateInvalid, &error, None),
        }
    }
}

impl From<BuildError> for ErrorBody {
    fn from(error: BuildError) -> Self {
        let (code, hint) = match &error {
            BuildError::Boot(BootError::KernelTooLarge { .. } | BootError::InitrdTooLarge { .. }) => {
                (ErrorCode::KernelUnusable, Some("give the VM more --memory, or a smaller kernel or initrd"))
            }
            BuildError::Boot(_) => (ErrorCode::KernelUnusable, None),
            BuildError::Layout(_) | BuildError::Net { .. } => (ErrorCode::InvalidConfig, None),
            BuildError::Memory(MemoryError::Allocate { .. } | MemoryError::Map { .. }) => (
                ErrorCode::OutOfMemory,
                Some("give the VM less --memory, or raise the limit (ulimit -v, -f) of this process"),
            ),
            BuildError::Cpuid(CpuidError::OtherVendor | CpuidError::Lost(_)) => {
                (ErrorCode::StateInvalid, Some("restore it on a host whose processor has what the saved one had"))
            }
            BuildError::Kvm(KvmError::Open(e)) => (ErrorCode::KvmUnavailable, Some(kvm_open(e))),
            BuildError::Kvm(_) => (ErrorCode::KvmUnavailable, Some("'civic doctor' shows what this host's KVM can do")),
            BuildError::Slot(_) => (
                ErrorCode::NoSlot,
                Some(
                    "remove a device first; the slot of one that was removed by force is free when the guest has noticed, or reset",
                ),
            ),
            _ => (ErrorCode::Internal, None),
        };
        told(code, &error, hint)
    }
}

/// The way out when `/dev/kvm` does not open.
pub fn kvm_open(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "load the module (modprobe kvm_amd or kvm_intel) and switch virtualisation on in the firmware; in a VM, ask for nested \
             virtualisation"
        }
        io::ErrorKind::PermissionDenied => {
            "run as root, or join the group that owns /dev/kvm (usually 'kvm') and log in again"
        }
        _ => "'civic doctor' says more",
    }
}

fn told(code: ErrorCode, error: &(dyn std::error::Error + 'static), hint: Option<&str>) -> ErrorBody {
    let body = ErrorBody::from_error(code, error);
    match hint {
        Some(hint) => body.with_hint(hint),
        None => body,
    }
}
