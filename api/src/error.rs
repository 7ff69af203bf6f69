//! Errors as the API says them.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of error it is, for programs. A code this version does not know is read as [`ErrorCode::Internal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// Not HTTP, not JSON, or not what the route takes.
    InvalidRequest,
    /// The VM's configuration is wrong.
    InvalidConfig,
    /// No such VM, route, port or device.
    NotFound,
    /// The route exists, not with this method.
    MethodNotAllowed,
    /// A VM of this name runs already.
    NameInUse,
    /// The VM cannot do this in its present state.
    WrongState,
    /// The kernel or initrd cannot be read or is not of a kind that boots here.
    KernelUnusable,
    /// A disk image cannot be opened or is not of a known format.
    ImageUnusable,
    /// Another process uses the disk image.
    ImageLocked,
    /// A saved VM is cut short, altered, of another version, or does not fit its disks or this host.
    StateInvalid,
    /// The directory to save to cannot be written or is not empty.
    SaveFailed,
    /// The VM cannot be forked: its page server, a child or a device is in the way.
    ForkFailed,
    /// The guest's kernel is not found, or is not one that this can be done to.
    GuestUnusable,
    /// The tap interface does not exist, is taken, or may not be used.
    TapUnavailable,
    /// A unix socket cannot be made where it should: the path is taken, too long, or may not be written.
    SocketUnavailable,
    /// The VM's bus has no free slot for another device.
    NoSlot,
    /// `/dev/kvm` is missing, may not be opened or lacks a capability.
    KvmUnavailable,
    /// KVM is there but this host's KVM cannot run stock kernels.
    KvmCannotRunLinux,
    /// The host cannot have the jail that was asked for.
    JailUnavailable,
    /// The audit log cannot be written: nothing was done.
    AuditFailed,
    /// The host has not the memory.
    OutOfMemory,
    /// The request is larger than the server takes.
    TooLarge,
    /// The other side did not send or do it in time.
    Timeout,
    /// Too many connections.
    Busy,
    /// A fault of Civic's own; the log says more.
    #[serde(other)]
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with this code.
    pub fn http_status(self) -> u16 {
        match self {
            Self::InvalidRequest | Self::InvalidConfig => 400,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::Timeout => 408,
            Self::NameInUse | Self::WrongState | Self::ImageLocked | Self::NoSlot => 409,
            Self::TooLarge => 413,
            Self::KernelUnusable
            | Self::ImageUnusable
            | Self::StateInvalid
            | Self::SaveFailed
            | Self::ForkFailed
            | Self::GuestUnusable
            | Self::SocketUnavailable
            | Self::TapUnavailable => 422,
            Self::Internal => 500,
            Self::Busy | Self::KvmUnavailable | Self::KvmCannotRunLinux | Self::JailUnavailable | Self::AuditFailed => {
                503
            }
            Self::OutOfMemory => 507,
        }
    }
}

/// The body of every response that is not a success, and the monitor's answer when it cannot make a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
pub struct ErrorBody {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what is wrong. No final stop, no line break.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ErrorBody {
    /// An error without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// The same error with advice.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A fault of Civic's own.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }

    /// `code` with `error` and all its sources as the message.
    pub fn from_error(code: ErrorCode, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::new(code, message)
    }
}

impl fmt::Display for ErrorBody {
    /// The message, then the hint on a line of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n{hint}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_snake_case_and_unknown_ones_are_internal() {
        let body = ErrorBody::new(ErrorCode::KvmCannotRunLinux, "no").with_hint("use the testbed");
        let json = serde_json::to_string(&body).unwrap();
        assert_eq!(json, r#"{"code":"kvm_cannot_run_linux","message":"no","hint":"use the testbed"}"#);
        assert_eq!(serde_json::from_str::<ErrorBody>(&json).unwrap(), body);
        assert_eq!(body.to_string(), "no\nuse the testbed");
        let newer = serde_json::from_str::<ErrorBody>(r#"{"code":"from_the_future","message":"m"}"#).unwrap();
        assert_eq!(newer.code, ErrorCode::Internal);
    }

    #[test]
    fn an_error_is_told_with_its_sources() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the kernel")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("no such file"));
        assert_eq!(
            ErrorBody::from_error(ErrorCode::KernelUnusable, &error).message,
            "cannot open the kernel: no such file"
        );
    }
}
