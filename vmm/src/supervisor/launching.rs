//! What a loader is told to do, made of what a client has asked for, or why that cannot be.

use std::ffi::CString;
use std::ops::RangeInclusive;

use civic_api::{
    CopyDirection, CopyRequest, ErrorBody, ErrorCode, Freeze, MIN_MTU, NetConfig, ProgramNetwork, ProgramRequest,
    ProgramRoot, STORE_ID, VmConfig,
};
use civic_inject::wire::archive::MAX_NAME;
use civic_inject::wire::{self, Disk, Job, Launch, Mac, Network, Root, Store, Strings, ToGuest, WindowSize, pack};

use crate::machine::effective_mac;

/// Priorities of real-time processes (sched(7)).
const REALTIME: RangeInclusive<u8> = 1..=99;
/// What a process's niceness can be.
const NICE: RangeInclusive<i8> = -20..=19;

/// The loader's first frame.
pub(super) fn launch(request: &ProgramRequest, config: &VmConfig) -> Result<Vec<u8>, ErrorBody> {
    let invalid = |message: &str| ErrorBody::new(ErrorCode::InvalidRequest, message);
    let strings =
        |strings: &[String], what: &str| pack(strings).ok_or_else(|| invalid(&format!("{what} contains a zero byte")));
    let path = request.copy.as_ref().map(|copy| copied_path(request, copy)).transpose()?;
    if request.argv.is_empty() && path.is_none() {
        return Err(invalid("there is no program"));
    }
    let (argv, env) = (strings(&request.argv, "an argument")?, strings(&request.env, "the environment")?);
    let cwd = request.cwd.as_deref().map(CString::new).transpose();
    let cwd = cwd.map_err(|_| invalid("the working directory contains a zero byte"))?;
    let store = config.disks.iter().find(|disk| disk.id == STORE_ID);
    let root = match (request.root, store) {
        (Some(ProgramRoot::Guest), _) | (None, None) => Root::Guest,
        (Some(ProgramRoot::Store) | None, Some(disk)) => {
            Root::Store(Store { disk: Disk::Serial(&disk.id), read_only: disk.read_only })
        }
        (Some(ProgramRoot::Store), None) => {
            let error = ErrorBody::new(ErrorCode::WrongState, "the VM has no store");
            return Err(error.with_hint("give it one: 'civic fork --store IMAGE'"));
        }
    };
    if request.realtime.is_some_and(|priority| !REALTIME.contains(&priority)) {
        return Err(invalid("a real-time priority is 1 to 99"));
    }
    if request.nice.is_some_and(|nice| !NICE.contains(&nice)) {
        return Err(invalid("a niceness is -20 to 19"));
    }
    let (network, down) = match &request.network {
        Some(network) => cards(network, config).map(|(network, down)| (Some(network), down))?,
        None => (None, Vec::new()),
    };
    let long = |_| invalid("too many arguments or variables");
    let job = match (&request.copy, path.as_deref()) {
        (Some(CopyRequest { direction: CopyDirection::In, rename, .. }), Some(path)) => {
            Job::Unpack { path, rename: *rename }
        }
        (Some(CopyRequest { direction: CopyDirection::Out, .. }), Some(path)) => Job::Pack(path),
        _ => Job::Run(Strings::new(&argv).map_err(long)?),
    };
    let launch = Launch {
        env: Strings::new(&env).map_err(long)?,
        cwd: cwd.as_deref(),
        tty: request.tty.map(|size| WindowSize { rows: size.rows, columns: size.columns, width: 0, height: 0 }),
        freeze: match request.freeze {
            Freeze::None => wire::Freeze::None,
            Freeze::Stop => wire::Freeze::Stop,
            Freeze::Cgroup => wire::Freeze::Cgroup,
        },
        thaw_at_end: true,
        tidy_up: request.tidy_up,
        root,
        uid: request.uid,
        gid: request.gid,
        realtime: request.realtime,
        nice: request.nice,
        network,
        down: &down,
        timeout_ms: u32::try_from(request.wait_ms).unwrap_or(u32::MAX),
        ..Launch::new(job)
    };
    let mut bytes = Vec::new();
    ToGuest::Launch(launch).encode(&mut bytes).map_err(|_| invalid("the arguments and variables are too long"))?;
    Ok(bytes)
}

/// A card to be set up, and those to be taken down.
fn cards(network: &ProgramNetwork, config: &VmConfig) -> Result<(Network, Vec<Mac>), ErrorBody> {
    let (wanted, others): (Vec<_>, Vec<_>) = config.nets.iter().partition(|net| net.id == network.id);
    let Some(card) = wanted.first() else {
        let error = ErrorBody::new(ErrorCode::NotFound, format!("the VM has no network card '{}'", network.id));
        let ids: Vec<_> = config.nets.iter().map(|net| net.id.as_str()).collect();
        return Err(match ids.as_slice() {
            [] => error.with_hint("give it one: 'civic fork --net', 'civic device add --net'"),
            ids => error.with_hint(format!("it has: {}", ids.join(", "))),
        });
    };
    if network.mtu.is_some_and(|mtu| mtu < MIN_MTU) {
        return Err(ErrorBody::new(ErrorCode::InvalidRequest, format!("an MTU is at least {MIN_MTU}")));
    }
    let mac = |net: &NetConfig| effective_mac(config, net).0;
    let down = others.into_iter().filter(|_| !network.keep_others).map(mac).collect();
    let (address, prefix) = (network.address.addr(), network.address.prefix_len());
    Ok((Network { mac: mac(card), address, prefix, gateway: network.gateway, mtu: network.mtu }, down))
}

/// The path of what is copied, if nothing is asked for that belongs to programs.
fn copied_path(request: &ProgramRequest, copy: &CopyRequest) -> Result<CString, ErrorBody> {
    let invalid = |message: String| ErrorBody::new(ErrorCode::InvalidRequest, message);
    let others = [
        ("arguments", !request.argv.is_empty()),
        ("an environment", !request.env.is_empty()),
        ("a working directory", request.cwd.is_some()),
        ("a terminal", request.tty.is_some()),
    ];
    if let Some((what, _)) = others.iter().find(|(_, given)| *given) {
        return Err(invalid(format!("what is copied has no use for {what}")));
    }
    if copy.rename && copy.direction == CopyDirection::Out {
        return Err(invalid("what is copied out of the guest is renamed by who gets it".into()));
    }
    if !copy.path.starts_with('/') {
        return Err(invalid(format!("the path '{}' is not absolute", copy.path)));
    }
    if copy.path.len() > MAX_NAME {
        return Err(invalid(format!("a path of {} bytes is too long: at most {MAX_NAME}", copy.path.len())));
    }
    CString::new(copy.path.as_str()).map_err(|_| invalid("the path contains a zero byte".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        let mut config: VmConfig =
            serde_json::from_str(r#"{"name":"web-1","kernel":"/k","memory_bytes":134217728,"cpus":1}"#).unwrap();
        config.nets = vec![NetConfig::new("net0", "tap0"), NetConfig::new("own", "tap1")];
        config
    }

    fn network(id: &str) -> ProgramNetwork {
        let address = "10.0.0.2/24".parse().unwrap();
        ProgramNetwork { id: id.into(), address, gateway: None, mtu: None, keep_others: false }
    }

    #[test]
    fn the_forks_other_cards_are_taken_down() {
        let config = config();
        let mac = |n: usize| effective_mac(&config, &config.nets[n]).0;
        let (card, down) = cards(&network("own"), &config).unwrap();
        assert_eq!((card.mac, card.prefix, down), (mac(1), 24, vec![mac(0)]));
        let kept = ProgramNetwork { keep_others: true, ..network("own") };
        assert_eq!(cards(&kept, &config).unwrap().1, Vec::<Mac>::new());
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_placed() {
        let request = |json: &str| serde_json::from_str::<ProgramRequest>(json).unwrap();
        let refused = |json: &str| launch(&request(json), &config()).unwrap_err();
        let unknown = refused(r#"{"argv":["a"],"network":{"id":"net9","address":"10.0.0.2/24"}}"#);
        assert_eq!(unknown.code, ErrorCode::NotFound);
        assert!(unknown.hint.unwrap().contains("net0, own"));
        let small = r#"{"argv":["a"],"network":{"id":"own","address":"10.0.0.2/24","mtu":67}}"#;
        for json in [r#"{"argv":[]}"#, r#"{"argv":["a"],"realtime":100}"#, r#"{"argv":["a"],"nice":20}"#, small] {
            assert_eq!(refused(json).code, ErrorCode::InvalidRequest, "{json}");
        }
        assert_eq!(refused(r#"{"argv":["a"],"root":"store"}"#).code, ErrorCode::WrongState);
        launch(&request(r#"{"argv":["a"],"realtime":1,"nice":-20}"#), &config()).unwrap();
    }

    fn copy(path: &str) -> ProgramRequest {
        let text = format!(r#"{{"copy": {{"direction": "in", "path": "{path}"}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn what_is_copied_has_a_path_and_nothing_else() {
        let check = |request: ProgramRequest, expected: &str| {
            let copy = request.copy.clone().unwrap();
            let told = copied_path(&request, &copy).map_err(|error| error.message);
            assert_eq!(told.map(|path| path.into_string().unwrap()).unwrap_or_else(|told| told), expected);
        };
        check(copy("/etc/"), "/etc/");
        check(copy("etc"), "the path 'etc' is not absolute");
        check(copy(""), "the path '' is not absolute");
        check(copy("/a\\u0000b"), "the path contains a zero byte");
        check(copy(&format!("/{}", "x".repeat(4095))), "a path of 4096 bytes is too long: at most 4095");
        check(ProgramRequest { argv: vec!["ls".into()], ..copy("/") }, "what is copied has no use for arguments");
        check(ProgramRequest { env: vec!["A=b".into()], ..copy("/") }, "what is copied has no use for an environment");
        check(
            ProgramRequest { cwd: Some("/".into()), ..copy("/") },
            "what is copied has no use for a working directory",
        );
        let tty = Some(civic_api::TerminalSize { rows: 1, columns: 1 });
        check(ProgramRequest { tty, ..copy("/") }, "what is copied has no use for a terminal");
        let out = CopyRequest { direction: CopyDirection::Out, path: "/".into(), rename: true };
        let out = ProgramRequest { copy: Some(out), ..copy("/") };
        check(out, "what is copied out of the guest is renamed by who gets it");
    }
}
