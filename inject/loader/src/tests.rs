//! Round trips of all messages, and bytes that are none.

use alloc::string::String;
use alloc::vec::Vec;
use core::net::Ipv4Addr;
use std::ffi::CString;

use proptest::prelude::*;

use super::*;

extern crate std;

/// What [`Launch`] borrows.
#[derive(Debug)]
struct Parts {
    argv: Vec<u8>,
    env: Vec<u8>,
    cwd: Option<CString>,
    store: Option<(String, bool)>,
    by_name: bool,
    down: Vec<Mac>,
}

fn parts() -> impl Strategy<Value = Parts> {
    let string = || prop::collection::vec(1..=u8::MAX, 0..50);
    (
        prop::collection::vec(string(), 1..20),
        prop::collection::vec(string(), 0..20),
        prop::option::of(string().prop_map(|s| CString::new(s).unwrap())),
        prop::option::of(("[a-z0-9-]{1,20}", any::<bool>())),
        any::<bool>(),
        prop::collection::vec(any::<Mac>(), 0..9),
    )
        .prop_map(|(argv, env, cwd, store, by_name, down)| {
            let (argv, env) = (pack(argv).unwrap(), pack(env).unwrap());
            Parts { argv, env, cwd, store, by_name, down }
        })
}

fn window_size() -> impl Strategy<Value = WindowSize> {
    any::<[u16; 4]>().prop_map(|[rows, columns, width, height]| WindowSize { rows, columns, width, height })
}

fn network() -> impl Strategy<Value = Network> {
    (any::<Mac>(), any::<Ipv4Addr>(), 0..=32u8, any::<Option<Ipv4Addr>>(), any::<Option<u16>>())
        .prop_map(|(mac, address, prefix, gateway, mtu)| Network { mac, address, prefix, gateway, mtu })
}

#[track_caller]
fn check_to_guest(message: ToGuest<'_>) {
    let mut encoded = Vec::new();
    message.encode(&mut encoded).unwrap();
    let (frame, len) = split(&encoded).unwrap().unwrap();
    assert_eq!(len, encoded.len());
    assert_eq!(ToGuest::decode(frame), Ok(message));
    (0..len).for_each(|len| assert_eq!(split(&encoded[..len]), Ok(None)));
}

#[track_caller]
fn check_from_guest(message: FromGuest<'_>) {
    let mut encoded = Vec::new();
    message.encode(&mut encoded).unwrap();
    let (frame, len) = split(&encoded).unwrap().unwrap();
    assert_eq!(len, encoded.len());
    assert_eq!(FromGuest::decode(frame), Ok(message));
    (0..len).for_each(|len| assert_eq!(split(&encoded[..len]), Ok(None)));
}

proptest! {
    #[test]
    fn launches_survive(
        parts in parts(),
        job in 0..4u8,
        tty in prop::option::of(window_size()),
        freeze in prop::sample::select(&[Freeze::None, Freeze::Stop, Freeze::Cgroup][..]),
        thaw_at_end: bool,
        tidy_up: bool,
        ids: [u32; 3],
        realtime in prop::option::of(1..=99u8),
        nice in prop::option::of(-20..=19i8),
        network in prop::option::of(network()),
    ) {
        let root = match &parts.store {
            None => Root::Guest,
            Some((name, read_only)) => {
                let disk = if parts.by_name { Disk::Name(name) } else { Disk::Serial(name) };
                Root::Store(Store { disk, read_only: *read_only })
            }
        };
        let [uid, gid, timeout_ms] = ids;
        check_to_guest(ToGuest::Launch(Launch {
            job: match (&parts.cwd, job) {
                (Some(path), 1) => Job::Pack(path),
                (Some(path), 2..) => Job::Unpack { path, rename: job == 2 },
                _ => Job::Run(Strings::new(&parts.argv).unwrap()),
            },
            env: Strings::new(&parts.env).unwrap(),
            cwd: parts.cwd.as_deref(),
            tty,
            freeze,
            thaw_at_end,
            tidy_up,
            root,
            uid,
            gid,
            realtime,
            nice,
            network,
            down: &parts.down,
            timeout_ms,
        }));
    }

    #[test]
    fn other_messages_survive(
        bytes: Vec<u8>, text: String, number: u32, byte: u8, tsc: u64, errno: i32, core: bool, version: u16, size in window_size(),
        stage in prop::sample::select(&[Stage::Started, Stage::Configured, Stage::Frozen, Stage::Mounted, Stage::NetworkUp, Stage::Execed, Stage::Exited][..]),
        step in prop::sample::select(&[Step::Protocol, Step::Freeze, Step::Namespace, Step::Store, Step::Root, Step::Network, Step::Terminal, Step::Process, Step::Exec][..]),
    ) {
        check_to_guest(ToGuest::Stdin(&bytes));
        check_to_guest(ToGuest::StdinEnd);
        check_to_guest(ToGuest::Signal(byte));
        check_to_guest(ToGuest::WindowSize(size));
        check_to_guest(ToGuest::Thaw);
        check_from_guest(FromGuest::Hello { version, credit: number });
        check_from_guest(FromGuest::Stage { stage, tsc });
        check_from_guest(FromGuest::Stdout(&bytes));
        check_from_guest(FromGuest::Stderr(&bytes));
        check_from_guest(FromGuest::Credit(number));
        check_from_guest(FromGuest::Exited(Exit::Code(byte)));
        check_from_guest(FromGuest::Exited(Exit::Signal { signal: byte, core }));
        check_from_guest(FromGuest::Failed { step, errno, text: &text });
        check_from_guest(FromGuest::Warning(&text));
    }

    /// Whatever is decoded at all is what its encoding decodes to.
    #[test]
    fn no_bytes_are_trusted(kind in 0..30u8, payload in prop::collection::vec(prop_oneof![0..4u8, any::<u8>()], 0..200)) {
        let mut bytes = Vec::from([kind, 0, 0, 0]);
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        let (frame, _) = split(&bytes).unwrap().unwrap();
        if let Ok(message) = ToGuest::decode(frame) {
            check_to_guest(message);
        }
        if let Ok(message) = FromGuest::decode(frame) {
            check_from_guest(message);
        }
    }

    #[test]
    fn no_stream_is_trusted(bytes: Vec<u8>) {
        if let Ok(Some((_, len))) = split(&bytes) {
            assert!(len <= bytes.len());
        }
    }
}

#[test]
fn headers_are_checked() {
    assert_eq!(split(&[17, 0, 1, 0, 0, 0, 0, 0]), Err(Malformed::Header));
    assert_eq!(split(&[17, 0, 0, 0, 1, 0, 1, 0]), Err(Malformed::TooLong(0x10001)));
    assert_eq!(split(&[17, 0, 0, 0, 0, 0, 1, 0]), Ok(None));
}

#[test]
fn frames_have_a_greatest_size() {
    let bytes = alloc::vec![0; MAX_PAYLOAD + 1];
    check_from_guest_len(&bytes[..MAX_PAYLOAD], Ok(()));
    check_from_guest_len(&bytes, Err(Full));
}

#[track_caller]
fn check_from_guest_len(bytes: &[u8], expected: Result<(), Full>) {
    assert_eq!(FromGuest::Stdout(bytes).encode(&mut Vec::new()), expected);
}

#[test]
fn launches_are_checked() {
    let argv = pack(["true"]).unwrap();
    let launch = Launch::new(Job::Run(Strings::new(&argv).unwrap()));
    for (wrong, field) in [
        (Launch { job: Job::Run(Strings::default()), ..launch }, "list of arguments"),
        (Launch { realtime: Some(0), ..launch }, "real-time priority"),
        (Launch { realtime: Some(100), ..launch }, "real-time priority"),
        (Launch { nice: Some(20), ..launch }, "niceness"),
        (Launch { root: store(Disk::Serial("")), ..launch }, "store"),
        (Launch { root: store(Disk::Serial("a serial that is too long")), ..launch }, "store"),
        (Launch { root: store(Disk::Name("../etc")), ..launch }, "store"),
    ] {
        let mut encoded = Vec::new();
        ToGuest::Launch(wrong).encode(&mut encoded).unwrap();
        let (frame, _) = split(&encoded).unwrap().unwrap();
        assert_eq!(ToGuest::decode(frame), Err(Malformed::Field(field)));
    }
}

fn store(disk: Disk<'_>) -> Root<'_> {
    Root::Store(Store { disk, read_only: true })
}

#[test]
fn lists_of_strings_are_checked() {
    assert_eq!(pack(["a\0b"]), None);
    assert_eq!(Strings::new(b"a"), Err(Malformed::Field("list of strings")));
    assert!(Strings::new(&[0; MAX_STRINGS]).is_ok_and(|strings| strings.iter().count() == MAX_STRINGS));
    assert!(Strings::new(&[0; MAX_STRINGS + 1]).is_err());
}
