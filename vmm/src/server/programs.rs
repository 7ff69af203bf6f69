//! The routes of programs that are started in the guest.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use civic_api::routes::PROGRAM_PROTOCOL;
use civic_api::{ErrorBody, ErrorCode, ProgramRequest, StartedProgram};
use civic_inject::wire::{self, ToGuest};
use hyper::StatusCode;
use hyper::header::{CONNECTION, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Patience;
use super::routes::{Api, Failure, check_upgrade};
use crate::control::{Answer, Command};
use crate::programs::Session;

/// SIGHUP, which a program gets whose client has gone.
const HANGUP: u8 = 1;
/// How long a client has to begin after `101`.
const BEGIN: Duration = Duration::from_secs(10);

pub(super) fn documented() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(start_program)).routes(routes!(talk))
}

/// Starts a program in a fork, from outside, or copies files.
///
/// Nothing in the guest helps: a loader is brought into its kernel, and starts the program, or packs or unpacks the files itself. The answer comes when the loader runs; how the
/// program goes on is told by its stream, which nobody needs to take at once.
#[utoipa::path(post, path = "/v1/programs", request_body = ProgramRequest, responses(
    (status = 200, description = "Its loader runs", body = StartedProgram),
    (status = 400, description = "The request is none", body = ErrorBody),
    (status = 408, description = "The guest does not come to start it; the message says what its vCPUs do", body = ErrorBody),
    (status = 409, description = "The VM is no fork, or does not run, or has no store", body = ErrorBody),
    (status = 422, description = "The guest's kernel is not found, or is none in which that can be done", body = ErrorBody),
    (status = 503, description = "Too many programs run in the VM", body = ErrorBody),
))]
async fn start_program(
    State(api): State<Api>,
    Extension(patience): Extension<Patience>,
    request: Result<Json<ProgramRequest>, JsonRejection>,
) -> Result<Json<StartedProgram>, Failure> {
    let Json(request) = request.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let _patience = patience.hold();
    match api.control.command(Command::StartProgram(request)).await? {
        Answer::Started(program) => Ok(Json(program)),
        _ => Err(ErrorBody::internal("the start was answered with something else").into()),
    }
}

/// Talks with a program.
///
/// Send `Connection: upgrade` and `Upgrade: civic-program`. After `101` the connection carries frames of `civic-loader`'s protocol: what the
/// loader says, and for it Stdin, StdinEnd, Signal, WindowSize and Thaw. It ends with the loader. A program whose client goes before gets
/// SIGHUP, and what it says from then on is lost. Files are copied as if a program took or gave them: Stdin or Stdout is a tar stream.
#[utoipa::path(get, path = "/v1/programs/{id}", params(("id" = u64, Path, description = "Its number")), responses(
    (status = 101, description = "Frames follow"),
    (status = 400, description = "No upgrade to civic-program was asked for", body = ErrorBody),
    (status = 404, description = "There is no such program, or all of it was told", body = ErrorBody),
    (status = 503, description = "Somebody talks with it already", body = ErrorBody),
))]
async fn talk(
    State(api): State<Api>,
    id: Result<Path<u64>, PathRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let Path(id) = id.map_err(|error| ErrorBody::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let Some(session) = api.control.view().program(id) else {
        return Err(ErrorBody::new(ErrorCode::NotFound, format!("no program {id} runs in the VM")).into());
    };
    let (mut parts, _) = request.into_parts();
    check_upgrade(&parts.headers, PROGRAM_PROTOCOL)?;
    if !session.attend() {
        return Err(ErrorBody::new(ErrorCode::Busy, format!("somebody talks with program {id} already")).into());
    }
    let Some(upgrade) = parts.extensions.remove::<OnUpgrade>() else {
        return Err(ErrorBody::new(ErrorCode::InvalidRequest, "this connection cannot be upgraded").into());
    };
    tokio::spawn(async move {
        if let Ok(Ok(upgraded)) = tokio::time::timeout(BEGIN, upgrade).await {
            let (from_client, to_client) = tokio::io::split(TokioIo::new(upgraded));
            let told = tokio::spawn(told(Arc::clone(&session), from_client));
            relay(&session, to_client).await;
            told.abort();
        }
        // Where it has ended, this is of no consequence.
        session.tell(&ToGuest::Signal(HANGUP));
        session.abandon();
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, PROGRAM_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Passes on what the guest says, until its end or the client's.
async fn relay(session: &Session, mut to_client: impl AsyncWriteExt + Unpin) {
    loop {
        match session.next().await {
            Ok(frames) => {
                if to_client.write_all(&frames).await.is_err() {
                    return;
                }
            }
            Err(broken) => {
                if let Some(why) = broken {
                    let failed = wire::FromGuest::Failed { step: wire::Step::Protocol, errno: 0, text: &why };
                    let mut frame = Vec::new();
                    let _ = failed.encode(&mut frame);
                    let _ = to_client.write_all(&frame).await;
                }
                let _ = to_client.shutdown().await;
                return;
            }
        }
    }
}

/// Passes on what the client says, until its end or nonsense.
async fn told(session: Arc<Session>, mut from_client: impl AsyncReadExt + Unpin) {
    let mut bytes = Vec::new();
    while from_client.read_buf(&mut bytes).await.is_ok_and(|read| read > 0) {
        let mut done = 0;
        loop {
            let frame = match wire::split(&bytes[done..]) {
                Ok(Some((frame, len))) => ToGuest::decode(frame).map(|decoded| (decoded, &bytes[done..done + len])),
                Ok(None) => break,
                Err(_) => return,
            };
            match frame {
                // It is launched already.
                Ok((ToGuest::Launch(_), _)) | Err(_) => return,
                // More than there was credit for.
                Ok((_, frame)) if !session.pass_on(frame) => return,
                Ok((_, frame)) => done += frame.len(),
            }
        }
        bytes.drain(..done);
    }
}
