//! Paths of the HTTP API and the console's upgrade protocol, for both ends.

/// `GET`: [`crate::VmInfo`].
pub const INFO: &str = "/v1/info";
/// `POST`: let a created VM run.
pub const START: &str = "/v1/start";
/// `POST`: hold a running VM.
pub const PAUSE: &str = "/v1/pause";
/// `POST`: let a paused VM go on.
pub const RESUME: &str = "/v1/resume";
/// `POST`: press the power button. Answers at once; the guest takes its time.
pub const STOP: &str = "/v1/stop";
/// `POST`: end the VM now, as if the plug were pulled.
pub const KILL: &str = "/v1/kill";
/// `POST` a [`crate::SaveRequest`]: save the VM. Answers with a [`crate::SaveReport`] when it is done.
pub const SAVE: &str = "/v1/save";
/// `POST` a [`crate::ForkRequest`]: fork the VM. Answers with a [`crate::ForkReport`] when the children run.
pub const FORK: &str = "/v1/fork";
/// `GET`: [`crate::BalloonInfo`]. `PUT` a [`crate::BalloonConfig`]: let the balloon take more or less from the guest.
pub const BALLOON: &str = "/v1/balloon";
/// `POST` a [`crate::DiskConfig`]: plug in a disk. Answers with a [`crate::PluggedDevice`].
pub const DISKS: &str = "/v1/devices/disks";
/// `POST` a [`crate::NetConfig`]: plug in a network card.
pub const NETS: &str = "/v1/devices/nets";
/// `POST` a [`crate::ConsoleConfig`]: plug in a console.
pub const CONSOLES: &str = "/v1/devices/consoles";
/// `GET`: [`crate::DeviceInfo`]. `DELETE`: remove a disk, network card or console.
pub const DEVICE: &str = "/v1/devices/{id}";
/// `GET`: [`crate::GuestKernel`].
pub const GUEST: &str = "/v1/guest";
/// `POST` a [`crate::ProgramRequest`]: start a program in a fork. Answers with a [`crate::StartedProgram`] when its loader runs.
pub const PROGRAMS: &str = "/v1/programs";
/// `GET` with `Upgrade: civic-program`: after `101 Switching Protocols` the connection carries the frames of `civic-loader`'s protocol, from the
/// guest and to it.
pub const PROGRAM: &str = "/v1/programs/{id}";
/// Name of the programs' protocol in `Upgrade`.
pub const PROGRAM_PROTOCOL: &str = "civic-program";
/// `GET`: Prometheus text.
pub const METRICS: &str = "/v1/metrics";
/// `GET`: the OpenAPI document.
pub const OPENAPI: &str = "/v1/openapi.json";
/// `GET` with `Upgrade: civic-console`: after `101 Switching Protocols` the connection carries the console's bytes both
/// ways, starting with what the port printed last.
pub const CONSOLE: &str = "/v1/console";
/// Name of the console's protocol in `Upgrade`.
pub const CONSOLE_PROTOCOL: &str = "civic-console";
/// Largest request body, in bytes.
pub const MAX_BODY_BYTES: usize = 64 << 10;
