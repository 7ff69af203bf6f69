//! The routes, and the OpenAPI document made from them.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{MatchedPath, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use civic_api::launch::{ForkConfig, RestoreConfig};
use civic_api::routes::{
    BALLOON, CONSOLE_PROTOCOL, CONSOLES, DISKS, FORK, GUEST, MAX_BODY_BYTES, NETS, PROGRAMS, SAVE,
};
use civic_api::{
    BalloonConfig, BalloonInfo, ErrorBody, ErrorCode, ForkReport, ForkRequest, GuestFiles, GuestKernel, NewDevice,
    SaveReport, SaveRequest, VmConfig, VmInfo, VmState, doctor,
};
use civic_devices::console_hub::ConsoleHub;
use hyper::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{HeaderMap, Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::metrics::{self, Requests};
use super::{Limits, Patience, devices, programs};
use crate::audit::{Audit, Peer};
use crate::control::{Answer, Command, Control, no_balloon};

/// The document's frame; the paths come from the routes. Beside what they use, it has the types of `civic run`'s
/// configuration and of `civic doctor --json`.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Civic monitor",
        description = "One VM's monitor, over HTTP/1.1 on the unix socket `api.sock` in the VM's directory. \
            Every answer that is not a success has an `ErrorBody`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(VmConfig, RestoreConfig, ForkConfig, NewDevice, doctor::Report))
)]
struct Frame;

#[derive(Clone)]
pub(super) struct Api {
    pub(super) control: Control,
    limits: Limits,
    requests: Requests,
    audit: Option<Arc<Audit>>,
}

/// An [`ErrorBody`] as a response.
pub(super) struct Failure(ErrorBody);

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

fn documented() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Frame::openapi())
        .routes(routes!(info))
        .routes(routes!(start))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(stop))
        .routes(routes!(kill))
        .routes(routes!(save))
        .routes(routes!(fork))
        .routes(routes!(balloon, set_balloon))
        .routes(routes!(vm_metrics))
        .routes(routes!(guest, guest_with_files))
        .routes(routes!(openapi_json))
        .routes(routes!(console))
        .merge(devices::documented())
        .merge(programs::documented())
}

/// The OpenAPI document of the API, as `GET /v1/openapi.json` gives it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    documented().split_for_parts().1
}

pub(super) fn router(control: Control, limits: Limits, audit: Option<Arc<Audit>>) -> Router {
    let api = Api { control, limits, requests: Requests::default(), audit };
    let (router, _) = documented().split_for_parts();
    router
        .fallback(async || {
            Failure(ErrorBody::new(ErrorCode::NotFound, "no such route").with_hint("see GET /v1/openapi.json"))
        })
        .method_not_allowed_fallback(async || {
            let error = ErrorBody::new(ErrorCode::MethodNotAllowed, "the route does not take this method");
            Failure(error.with_hint("see GET /v1/openapi.json"))
        })
        // The last layer is the outermost.
        .layer(middleware::from_fn_with_state(api.clone(), write_down))
        .layer(middleware::from_fn_with_state(api.clone(), check_body))
        .layer(middleware::from_fn_with_state(api.clone(), count))
        .with_state(api)
}

/// Counts requests by route, method and status.
async fn count(State(api): State<Api>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let response = next.run(request).await;
    api.requests.count(&route, &method, response.status());
    response
}

/// Reads the body within limits. Where the route takes none it must be absent or an empty object, for what is not known must not
/// look obeyed.
async fn check_body(State(api): State<Api>, request: Request, next: Next) -> Result<Response, Failure> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}

    let takes_body = matches!(
        (request.method(), request.uri().path()),
        (&Method::POST, SAVE | FORK | DISKS | NETS | CONSOLES | PROGRAMS | GUEST) | (&Method::PUT, BALLOON)
    );
    let (parts, body) = request.into_parts();
    let body = match tokio::time::timeout(api.limits.body, axum::body::to_bytes(body, MAX_BODY_BYTES)).await {
        Ok(Ok(body)) => body,
        // Too long, or the connection broke: then nobody reads this.
        Ok(Err(_)) => {
            let message = format!("the body is longer than {MAX_BODY_BYTES} bytes");
            return Err(ErrorBody::new(ErrorCode::TooLarge, message).into());
        }
        Err(_) => return Err(ErrorBody::new(ErrorCode::Timeout, "the body did not come in time").into()),
    };
    if takes_body {
        return Ok(next.run(Request::from_parts(parts, Body::from(body))).await);
    }
    if !body.is_empty() {
        serde_json::from_slice::<Nothing>(&body)
            .map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, format!("the body: {error}")))?;
    }
    Ok(next.run(Request::from_parts(parts, Body::empty())).await)
}

/// Has what is asked be in the audit log before it is done, and what came of it after. A plain GET changes nothing.
async fn write_down(
    State(api): State<Api>,
    Extension(peer): Extension<Option<Peer>>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let plain = request.method() == Method::GET && !request.headers().contains_key(UPGRADE);
    let Some(audit) = api.audit.filter(|_| !plain) else {
        return Ok(next.run(request).await);
    };
    let (parts, body) = request.into_parts();
    // It was read before, within its limits.
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES).await.unwrap_or_default();
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str());
    let id = audit.asked(peer, parts.method.as_str(), path, &body)?;
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    let status = response.status();
    if status.is_success() || status.is_informational() {
        audit.answered(id, status.as_u16(), None);
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES).await.unwrap_or_default();
    let error = serde_json::from_slice::<ErrorBody>(&body).ok();
    audit.answered(id, status.as_u16(), error.as_ref().map(|error| error.message.as_str()));
    Ok(Response::from_parts(parts, Body::from(body)))
}

/// The VM as it is now.
#[utoipa::path(get, path = "/v1/info", responses((status = 200, body = VmInfo)))]
async fn info(State(api): State<Api>) -> Json<VmInfo> {
    Json(api.control.view().info())
}

/// Lets a created VM run.
#[utoipa::path(post, path = "/v1/start", responses(
    (status = 204, description = "It runs"),
    (status = 409, description = "It was started before", body = ErrorBody),
))]
async fn start(State(api): State<Api>) -> Result<StatusCode, Failure> {
    command(api, Command::Start).await
}

/// Holds a running VM.
///
/// The answer comes when no vCPU runs and no device touches its memory.
#[utoipa::path(post, path = "/v1/pause", responses(
    (status = 204, description = "It is paused"),
    (status = 409, description = "It does not run", body = ErrorBody),
))]
async fn pause(State(api): State<Api>) -> Result<StatusCode, Failure> {
    command(api, Command::Pause).await
}

/// Lets a paused VM go on.
#[utoipa::path(post, path = "/v1/resume", responses(
    (status = 204, description = "It runs"),
    (status = 409, description = "It is not paused", body = ErrorBody),
))]
async fn resume(State(api): State<Api>) -> Result<StatusCode, Failure> {
    command(api, Command::Resume).await
}

/// Presses the ACPI power button.
///
/// Answers at once; the guest decides what to do and when. Its monitor ends, and with it this API, once the guest has
/// powered off.
#[utoipa::path(post, path = "/v1/stop", responses(
    (status = 204, description = "The button is pressed"),
    (status = 409, description = "It does not run", body = ErrorBody),
))]
async fn stop(State(api): State<Api>) -> Result<StatusCode, Failure> {
    command(api, Command::Stop).await
}

/// Ends the VM now.
///
/// As if the plug were pulled: what the guest has not written to its disks is lost.
#[utoipa::path(post, path = "/v1/kill", responses((status = 204, description = "It has ended")))]
async fn kill(State(api): State<Api>) -> Result<StatusCode, Failure> {
    command(api, Command::Kill).await
}

/// Saves the VM to a directory.
///
/// The guest stands still meanwhile. The answer comes when everything is on the disk, or when it cannot be: then the VM is as it was
/// before and nothing is left in the directory. The save goes on if the client hangs up. A VM that is killed meanwhile is not saved.
#[utoipa::path(post, path = "/v1/save", request_body = SaveRequest, responses(
    (status = 200, description = "It is saved", body = SaveReport),
    (status = 400, description = "The request is none, or the path is not absolute", body = ErrorBody),
    (status = 409, description = "It was never started, or is being saved", body = ErrorBody),
    (status = 422, description = "The directory cannot be written or is not empty", body = ErrorBody),
))]
async fn save(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    request: Result<Json<SaveRequest>, JsonRejection>,
) -> Result<Json<SaveReport>, Failure> {
    let Json(request) = request.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    // As long as it takes: every byte of memory goes to a disk.
    let _patience = patience.hold();
    match api.control.command(Command::Save(request)).await? {
        Answer::Saved(report) => Ok(Json(report)),
        _ => Err(ErrorBody::internal("the save was answered with something else").into()),
    }
}

/// Forks the VM: it runs on, and each of the children goes on from the same moment, with the same memory and disks.
///
/// The children are monitors that wait for it (a `ForkConfig` is what they are started with), and the VM needs a page server; `civic fork`
/// starts them all. The answer comes when the children run, or cannot: then the VM runs on as if nothing had been. A VM that is paused
/// may be forked, and stays paused. The fork goes on if the client hangs up.
#[utoipa::path(post, path = "/v1/fork", request_body = ForkRequest, responses(
    (status = 200, description = "Children run", body = ForkReport),
    (status = 400, description = "The request is none, or names no children, or too many, or one twice", body = ErrorBody),
    (status = 404, description = "No such child waits", body = ErrorBody),
    (status = 409, description = "It was never started, or is being saved", body = ErrorBody),
    (status = 422, description = "The page server, a child or a device is in the way", body = ErrorBody),
    (status = 503, description = "It is being forked", body = ErrorBody),
))]
async fn fork(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    request: Result<Json<ForkRequest>, JsonRejection>,
) -> Result<Json<ForkReport>, Failure> {
    let Json(request) = request.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let _patience = patience.hold();
    match api.control.command(Command::Fork(request)).await? {
        Answer::Forked(report) => Ok(Json(report)),
        _ => Err(ErrorBody::internal("the fork was answered with something else").into()),
    }
}

/// The VM's balloon as it is now, and what the guest tells about its memory.
#[utoipa::path(get, path = "/v1/balloon", responses(
    (status = 200, body = BalloonInfo),
    (status = 404, description = "It has none", body = ErrorBody),
))]
async fn balloon(State(api): State<Api>) -> Result<Json<BalloonInfo>, Failure> {
    let view = api.control.view();
    let info = view.info();
    let before = info.balloon.ok_or_else(no_balloon)?;
    if !matches!(info.state, VmState::Running | VmState::Stopping) {
        return Ok(Json(before));
    }
    view.ask_balloon();
    let mut balloon = view.info().balloon.ok_or_else(no_balloon)?;
    // A guest that has a driver answers at once; without, what it last told is all there is.
    let deadline = Instant::now() + api.limits.statistics;
    while balloon.reports == before.reports && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
        balloon = view.info().balloon.ok_or_else(no_balloon)?;
    }
    Ok(Json(balloon))
}

/// Lets the balloon take more or less memory from the guest.
///
/// The answer comes when the guest is asked; it gives when it can.
#[utoipa::path(put, path = "/v1/balloon", request_body = BalloonConfig, responses(
    (status = 204, description = "The guest is asked"),
    (status = 400, description = "Not whole pages, or too little would be left", body = ErrorBody),
    (status = 404, description = "The VM has no balloon", body = ErrorBody),
))]
async fn set_balloon(
    State(api): State<Api>,
    request: Result<Json<BalloonConfig>, JsonRejection>,
) -> Result<StatusCode, Failure> {
    let Json(request) = request.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let info = api.control.view().info();
    if info.balloon.is_none() {
        return Err(no_balloon().into());
    }
    let hint = "take less, and whole pages of 4096 bytes";
    request.check(info.memory_bytes).map_err(|error| ErrorBody::from(error).with_hint(hint))?;
    command(api, Command::SetBalloon(request.target_bytes)).await
}

async fn command(api: Api, command: Command) -> Result<StatusCode, Failure> {
    match tokio::time::timeout(api.limits.command, api.control.command(command)).await {
        Ok(answer) => drop(answer?),
        Err(_) => {
            let message = format!("the machine did not answer within {} s", api.limits.command.as_secs());
            let hint = "see vmm.log in the VM's directory; `civic kill` ends a VM that hangs";
            return Err(ErrorBody::new(ErrorCode::Timeout, message).with_hint(hint).into());
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Counters and gauges of the VM, its vCPUs, devices and monitor, as OpenMetrics (Prometheus) text.
#[utoipa::path(get, path = "/v1/metrics", responses(
    (status = 200, content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8", body = String),
))]
async fn vm_metrics(State(api): State<Api>) -> Result<Response, Failure> {
    let view = api.control.shared_view();
    // One that does not answer is told of by what is missing.
    let sharing = tokio::task::spawn_blocking(move || view.sharing()).await.ok().flatten();
    let text = metrics::encode(&api.control.view().info(), sharing.as_ref(), &api.requests)
        .map_err(|error| ErrorBody::internal(format!("cannot write the metrics: {error}")))?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// The guest's kernel.
///
/// Found in the guest's memory and its vCPUs' registers alone, for which they stand still for a moment: nothing in the guest helps, or
/// notices.
#[utoipa::path(get, path = "/v1/guest", responses(
    (status = 200, body = GuestKernel),
    (status = 409, description = "It was never started", body = ErrorBody),
    (status = 422, description = "No kernel was found", body = ErrorBody),
))]
async fn guest(State(api): State<Api>, Extension(patience): Extension<Patience>) -> Result<Json<GuestKernel>, Failure> {
    let _patience = patience.hold();
    examine(&api, GuestFiles::default()).await
}

/// The guest's kernel, with the help of files.
///
/// As GET, for a kernel whose memory does not say enough: built without its symbols.
#[utoipa::path(post, path = "/v1/guest", request_body = GuestFiles, responses(
    (status = 200, body = GuestKernel),
    (status = 400, description = "A file cannot be read", body = ErrorBody),
    (status = 409, description = "It was never started", body = ErrorBody),
    (status = 422, description = "No kernel was found, or a file is another kernel's", body = ErrorBody),
))]
async fn guest_with_files(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    files: Result<Json<GuestFiles>, JsonRejection>,
) -> Result<Json<GuestKernel>, Failure> {
    let Json(files) = files.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let _patience = patience.hold();
    examine(&api, files).await
}

async fn examine(api: &Api, files: GuestFiles) -> Result<Json<GuestKernel>, Failure> {
    match api.control.command(Command::Examine(files)).await? {
        Answer::Examined(kernel) => Ok(Json(*kernel)),
        _ => Err(ErrorBody::internal("the examination was answered with something else").into()),
    }
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, content_type = "application/json", body = Object)))]
async fn openapi_json() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ConsoleQuery {
    /// Name of the port, one of `consoles` in the VM's info.
    #[serde(default = "serial")]
    #[param(default = "serial", required = false)]
    port: String,
}

fn serial() -> String {
    civic_api::CONSOLE_PORT_SERIAL.to_owned()
}

/// Attaches to a console port.
///
/// Send `Connection: upgrade` and `Upgrade: civic-console`. After `101` the connection carries
/// raw bytes: from the server what the port printed last, then what it prints; from the client what is typed. Closing it
/// detaches; shutting down the client's writing half ends the input only.
#[utoipa::path(get, path = "/v1/console", params(ConsoleQuery), responses(
    (status = 101, description = "The console follows"),
    (status = 400, description = "No upgrade to civic-console was asked for", body = ErrorBody),
    (status = 404, description = "The VM has no such port", body = ErrorBody),
    (status = 503, description = "The port has too many clients", body = ErrorBody),
))]
async fn console(
    State(api): State<Api>,
    query: Result<Query<ConsoleQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let Some(hub) = api.control.view().console(&query.port) else {
        let ports = api.control.view().info().consoles.join(", ");
        let error = ErrorBody::new(ErrorCode::NotFound, format!("the VM has no console port '{}'", query.port));
        return Err(error.with_hint(format!("it has: {ports}")).into());
    };
    let (mut parts, _) = request.into_parts();
    check_upgrade(&parts.headers, CONSOLE_PROTOCOL)?;
    hub.has_room().map_err(console_refused)?;
    let Some(upgrade) = parts.extensions.remove::<hyper::upgrade::OnUpgrade>() else {
        return Err(ErrorBody::new(ErrorCode::InvalidRequest, "this connection cannot be upgraded").into());
    };
    tokio::spawn(async move {
        let given = match tokio::time::timeout(Duration::from_secs(10), upgrade).await {
            Ok(Ok(upgraded)) => give_to(&hub, upgraded),
            Ok(Err(error)) => Err(io::Error::other(error)),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        if let Err(error) = given {
            tracing::debug!(%error, "api: a console did not attach");
        }
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Whether the client wants to go on with this protocol.
pub(super) fn check_upgrade(headers: &HeaderMap, protocol: &str) -> Result<(), ErrorBody> {
    let asked = |name, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(word))
    };
    if asked(CONNECTION, "upgrade") && asked(UPGRADE, protocol) {
        return Ok(());
    }
    let message = format!("this needs 'Connection: upgrade' and 'Upgrade: {protocol}'");
    Err(ErrorBody::new(ErrorCode::InvalidRequest, message))
}

fn console_refused(error: io::Error) -> ErrorBody {
    let code = match error.kind() {
        io::ErrorKind::ResourceBusy => ErrorCode::Busy,
        io::ErrorKind::NotConnected => ErrorCode::WrongState,
        _ => ErrorCode::Internal,
    };
    ErrorBody::new(code, error.to_string())
}

/// Hands the connection's own socket to the hub: from here on no thread of ours copies its bytes.
fn give_to(hub: &Arc<ConsoleHub>, upgraded: Upgraded) -> io::Result<()> {
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| io::Error::other("the upgraded connection is no unix socket"))?;
    hub.adopt(parts.io.into_inner().into_std()?, parts.read_buf.into())
}
