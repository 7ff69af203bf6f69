//! What a guest's loader says, in any pieces, and what a client tells it: the monitor's end of a program.
//!
//! Whatever comes, the client gets whole frames that make sense, no more is kept than there is room for, and one that makes none ends it.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use arbitrary::{Result, Unstructured};
use civic_inject::wire::{Exit, FromGuest, Stage, Step, ToGuest, split};
use civic_vmm::programs::{Programs, ROOM, Session};

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let programs = Programs::default();
    let session = programs.begin(&[], Vec::new()).expect("it is the first");
    let _ = talk(&session, &mut Unstructured::new(bytes));
    take(&session);
    session.fail("it is over");
    assert!(session.hear(|_| Some(vec![1])) < 0, "one that is over hears more");
}

fn talk(session: &Session, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        let kind: u8 = input.arbitrary()?;
        let len = usize::from(input.arbitrary::<u16>()?);
        let bytes = input.bytes(len.min(input.len()))?;
        match kind % 4 {
            0 | 1 => {
                let heard = session.hear(|room| {
                    assert!(room <= ROOM, "room for {room}");
                    Some(bytes[..bytes.len().min(room)].to_vec())
                });
                assert!(heard < 0 || heard as usize <= bytes.len(), "{heard} of {} were heard", bytes.len());
            }
            2 => take(session),
            // As a client's connection does.
            _ => {
                if let Ok(Some((frame, _))) = split(bytes)
                    && let Ok(frame) = ToGuest::decode(frame)
                {
                    let mut again = Vec::new();
                    frame.encode(&mut again).expect("it fits, for it came so");
                    let (whole, len) = split(&again).expect("it is one").expect("it is whole");
                    assert_eq!((ToGuest::decode(whole).as_ref(), len), (Ok(&frame), again.len()));
                    session.tell(&frame);
                }
            }
        }
    }
    Ok(())
}

/// Takes what there is for the client.
fn take(session: &Session) {
    let mut next = pin!(session.next());
    let Poll::Ready(Ok(frames)) = next.as_mut().poll(&mut Context::from_waker(Waker::noop())) else { return };
    assert!(frames.len() <= ROOM, "{} bytes were kept", frames.len());
    let mut rest = &frames[..];
    while !rest.is_empty() {
        let (frame, len) = split(rest).expect("it was looked into").expect("it is whole");
        FromGuest::decode(frame).expect("it was looked into");
        rest = &rest[len..];
    }
}

/// A program's life, and frames to the guest.
pub fn seeds() -> Vec<Vec<u8>> {
    let said = [
        FromGuest::Hello { version: 1, credit: 65536 },
        FromGuest::Stage { stage: Stage::Execed, tsc: 7 },
        FromGuest::Stdout(b"out"),
        FromGuest::Stderr(b"err"),
        FromGuest::Credit(3),
        FromGuest::Warning("of something"),
        FromGuest::Exited(Exit::Signal { signal: 9, core: true }),
        FromGuest::Failed { step: Step::Exec, errno: 2, text: "there is no program" },
    ];
    let told = [ToGuest::Stdin(b"in"), ToGuest::StdinEnd, ToGuest::Signal(15), ToGuest::Thaw];
    let mut all = Vec::new();
    for frame in &said {
        frame.encode(&mut all).expect("a vector takes all");
    }
    let spoken = |kind: u8, bytes: &[u8]| [&[kind][..], &(bytes.len() as u16).to_le_bytes(), bytes].concat();
    let mut seeds = vec![spoken(0, &all), all.chunks(5).flat_map(|part| spoken(0, part)).collect()];
    seeds.extend(told.iter().map(|frame| {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).expect("a vector takes all");
        spoken(3, &bytes)
    }));
    seeds
}
