//! The routes of devices that come and go.

use std::time::{Duration, Instant};

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::{Extension, Json};
use civic_api::{
    ConsoleConfig, DEVICE_WAIT_MS, DeviceInfo, DiskConfig, ErrorBody, ErrorCode, GuestAnswer, MAX_DEVICE_WAIT_MS,
    NetConfig, NewDevice, PluggedDevice, VmState,
};
use hyper::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Patience;
use super::routes::{Api, Failure};
use crate::control::Command;

/// Between two looks at what the guest has done.
const LOOK: Duration = Duration::from_millis(2);

pub(super) fn documented() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(add_disk))
        .routes(routes!(add_net))
        .routes(routes!(add_console))
        .routes(routes!(device, remove))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct Wait {
    /// How long to wait for the guest, in milliseconds: at most 600000.
    #[serde(default = "usual_wait")]
    #[param(default = 10_000, required = false, maximum = 600_000)]
    wait_ms: u64,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct Removal {
    /// As where a device is plugged in.
    #[serde(default = "usual_wait")]
    #[param(default = 10_000, required = false, maximum = 600_000)]
    wait_ms: u64,
    /// Take it away without asking the guest, which loses what it has not written yet. What it has given to the device is written.
    #[serde(default)]
    #[param(default = false, required = false)]
    force: bool,
}

fn usual_wait() -> u64 {
    DEVICE_WAIT_MS
}

/// Plugs in a disk.
///
/// The answer comes when the guest has a driver that uses it; after `wait_ms` at the latest, and then it says how far the guest has come.
/// At once, while the guest is paused or was never started. In any case the device is plugged in, and stays so over resets.
#[utoipa::path(post, path = "/v1/devices/disks", request_body = DiskConfig, params(Wait), responses(
    (status = 200, description = "It is plugged in", body = PluggedDevice),
    (status = 400, description = "It is none, or its id, image or address is another device's", body = ErrorBody),
    (status = 409, description = "The image is in use, the bus is full, or nobody in the guest listens", body = ErrorBody),
    (status = 422, description = "The image cannot be used", body = ErrorBody),
))]
async fn add_disk(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    wait: Result<Query<Wait>, QueryRejection>,
    disk: Result<Json<DiskConfig>, JsonRejection>,
) -> Result<Json<PluggedDevice>, Failure> {
    plug(&api, &patience, wait, disk.map(|Json(disk)| NewDevice::Disk(disk))).await
}

/// Plugs in a network card.
///
/// As for a disk.
#[utoipa::path(post, path = "/v1/devices/nets", request_body = NetConfig, params(Wait), responses(
    (status = 200, description = "It is plugged in", body = PluggedDevice),
    (status = 400, description = "It is none, or its id, tap or address is another device's", body = ErrorBody),
    (status = 409, description = "The bus is full, or nobody in the guest listens", body = ErrorBody),
    (status = 422, description = "The tap cannot be used", body = ErrorBody),
))]
async fn add_net(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    wait: Result<Query<Wait>, QueryRejection>,
    net: Result<Json<NetConfig>, JsonRejection>,
) -> Result<Json<PluggedDevice>, Failure> {
    plug(&api, &patience, wait, net.map(|Json(net)| NewDevice::Net(net))).await
}

/// Plugs in a console.
///
/// As for a disk. Its port is attached to as any other, by its id.
#[utoipa::path(post, path = "/v1/devices/consoles", request_body = ConsoleConfig, params(Wait), responses(
    (status = 200, description = "It is plugged in", body = PluggedDevice),
    (status = 400, description = "It is none, or its id is another device's", body = ErrorBody),
    (status = 409, description = "The bus is full, or nobody in the guest listens", body = ErrorBody),
))]
async fn add_console(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    wait: Result<Query<Wait>, QueryRejection>,
    console: Result<Json<ConsoleConfig>, JsonRejection>,
) -> Result<Json<PluggedDevice>, Failure> {
    plug(&api, &patience, wait, console.map(|Json(console)| NewDevice::Console(console))).await
}

async fn plug(
    api: &Api,
    patience: &Patience,
    wait: Result<Query<Wait>, QueryRejection>,
    device: Result<NewDevice, JsonRejection>,
) -> Result<Json<PluggedDevice>, Failure> {
    let Query(Wait { wait_ms }) = wait.map_err(|e| ErrorBody::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let device = device.map_err(|e| ErrorBody::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let wait = checked(wait_ms)?;
    let _patience = patience.hold();
    let id = device.id().to_owned();
    let begun = Instant::now();
    api.control.command(Command::Plug(device)).await?;
    loop {
        let info = api.control.view().info();
        let gone = || ErrorBody::new(ErrorCode::NotFound, format!("the device '{id}' was removed again"));
        let found = info.devices.into_iter().find(|device| device.id == id);
        let DeviceInfo { address, driver, guest, .. } = found.ok_or_else(gone)?;
        let driver = driver.unwrap_or_default();
        let waits = matches!(info.state, VmState::Running | VmState::Stopping);
        if driver || guest == GuestAnswer::Refused || !waits || begun.elapsed() >= wait {
            let (address, waited_us) = (address.unwrap_or_default(), begun.elapsed().as_micros() as u64);
            return Ok(Json(PluggedDevice { id, address, guest, driver, waited_us }));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn checked(wait_ms: u64) -> Result<Duration, ErrorBody> {
    if wait_ms > MAX_DEVICE_WAIT_MS {
        let message = format!("{wait_ms} ms are too long to wait: at most {MAX_DEVICE_WAIT_MS}");
        return Err(ErrorBody::new(ErrorCode::InvalidRequest, message));
    }
    Ok(Duration::from_millis(wait_ms))
}

fn unknown(id: &str) -> ErrorBody {
    ErrorBody::new(ErrorCode::NotFound, format!("the VM has no device '{id}'")).with_hint("see GET /v1/info")
}

/// A device as it is now.
#[utoipa::path(get, path = "/v1/devices/{id}", params(("id" = String, Path, description = "Its id")), responses(
    (status = 200, body = DeviceInfo),
    (status = 404, description = "There is none", body = ErrorBody),
))]
async fn device(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<DeviceInfo>, Failure> {
    Ok(Json(api.control.view().device(&id).ok_or_else(|| unknown(&id))?))
}

/// Removes a disk, network card or console.
///
/// The guest is asked to give it up, and the answer comes when it has, everything that it wrote is on the host's storage, and the image or
/// tap is free (an image that a fork reads, when that has ended). A guest that does not within `wait_ms` may still do so afterwards.
#[utoipa::path(delete, path = "/v1/devices/{id}", params(("id" = String, Path, description = "Its id"), Removal), responses(
    (status = 204, description = "It is removed"),
    (status = 400, description = "It is one that stays", body = ErrorBody),
    (status = 404, description = "There is none", body = ErrorBody),
    (status = 408, description = "The guest has not given it up in time", body = ErrorBody),
    (status = 409, description = "The guest refuses, or nobody in it listens", body = ErrorBody),
    (status = 422, description = "It is removed, but not all that was written could be kept", body = ErrorBody),
))]
async fn remove(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    Path(id): Path<String>,
    removal: Result<Query<Removal>, QueryRejection>,
) -> Result<StatusCode, Failure> {
    let Query(Removal { wait_ms, force }) =
        removal.map_err(|e| ErrorBody::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let wait = checked(wait_ms)?;
    let _patience = patience.hold();
    let begun = Instant::now();
    let removed = api.control.command(Command::Unplug { id: id.clone(), force });
    tokio::pin!(removed);
    loop {
        match tokio::time::timeout(LOOK, &mut removed).await {
            Ok(answer) => return Ok(answer.map(|_| StatusCode::NO_CONTENT)?),
            // It is gone, or nobody in the guest is waited for, and it is being closed: that takes as long as it takes.
            Err(_) if force || api.control.view().device(&id).is_none() => {}
            Err(_) => check_asked(&api, &id, begun.elapsed() >= wait)?,
        }
    }
}

fn check_asked(api: &Api, id: &str, late: bool) -> Result<(), ErrorBody> {
    let view = api.control.view();
    let force = "--force takes it away all the same, and loses what the guest has not written yet";
    let asked = view.device(id).filter(|device| device.leaving);
    if asked.is_some_and(|device| device.guest == GuestAnswer::Refused) {
        return Err(ErrorBody::new(ErrorCode::WrongState, format!("the guest keeps '{id}'")).with_hint(force));
    }
    if !late {
        return Ok(());
    }
    let (why, hint) = match view.info().state {
        VmState::Paused => ("the guest is paused", "resume it: then it hears of it"),
        _ => ("the guest has not given it up in time", force),
    };
    Err(ErrorBody::new(ErrorCode::Timeout, format!("'{id}' is still there: {why}")).with_hint(hint))
}
