//! Audit logs: what is asked of a VM and of its fork is written down by each, before it is done, and what came of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use civic_api::client::{Client, ClientError};
use civic_api::{ErrorCode, ProgramRequest};
use civic_tests::bare::vm::{Setup, Vm};
use serde_json::{Value, json};

use crate::pausing::hammer;

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What was asked, and what came of it.
fn asked(lines: &[Value]) -> Vec<(&str, u64)> {
    let asked = lines.iter().filter(|line| line["event"] == "asked");
    let answer = |line: &Value| {
        let mut answers = lines.iter().filter(|other| other["event"] == "answered" && other["id"] == line["id"]);
        let status = answers.next().unwrap()["status"].as_u64().unwrap();
        assert!(answers.next().is_none(), "{line} has two answers");
        status
    };
    asked.map(|line| (line["path"].as_str().unwrap(), answer(line))).collect()
}

fn audited() -> (Vm, std::path::PathBuf) {
    let mut setup = Setup::new(&hammer());
    let log = setup.root().join("audit");
    // As `civic run` makes it: a jail shows what is there.
    fs::write(&log, "").unwrap();
    setup.config.audit = Some(log.clone());
    (setup.boot(), log)
}

#[test]
fn what_is_asked_is_written_down_by_who_does_it() {
    let (source, log) = audited();
    source.until("it runs", |vm| vm.printed() > 0);
    source.info();
    source.pause();
    source.resume();
    let program = ProgramRequest { argv: vec!["ps".into()], env: vec!["KEY=secret".into()], ..Default::default() };
    let refused = source.api(|client: Client| async move { client.start_program(&program).await });
    assert!(matches!(&refused, Err(ClientError::Refused(body)) if body.code == ErrorCode::WrongState), "{refused:?}");
    let (_, mut children) = source.fork(vec![source.waiting("one")], false);
    let child = children.remove(0);
    child.pause();
    child.kill();

    let sources = lines(&log);
    let console = ("/v1/console?port=serial", 101);
    let changes =
        [("/v1/start", 204), ("/v1/pause", 204), ("/v1/resume", 204), ("/v1/programs", 409), ("/v1/fork", 200)];
    assert_eq!(asked(&sources), [&[console], &changes[..]].concat(), "{sources:#?}");
    assert_eq!(sources[0]["event"], "began");
    assert!(sources.iter().all(|line| line["vm"] == "bare"), "{sources:#?}");
    let of = |path: &str| sources.iter().find(|line| line["path"] == path).unwrap();
    assert_eq!(of("/v1/fork")["request"]["children"], json!(["one"]));
    assert_eq!(
        (&of("/v1/programs")["request"]["argv"], &of("/v1/programs")["request"]["env"]),
        (&json!(["ps"]), &json!(1))
    );
    assert!(!fs::read_to_string(&log).unwrap().contains("secret"));
    let peer = &of("/v1/pause")["peer"];
    assert_eq!(peer["uid"], fs::metadata("/proc/self").unwrap().uid(), "{peer}");

    let childs = lines(&log.with_file_name("audit.one"));
    assert_eq!(asked(&childs), [console, ("/v1/pause", 204), ("/v1/kill", 204)], "{childs:#?}");
    assert!(childs.iter().all(|line| line["vm"] == "one"), "{childs:#?}");
}

#[test]
fn an_end_is_written_down() {
    let (mut source, log) = audited();
    source.until("it runs", |vm| vm.printed() > 0);
    source.kill();
    source.ended();
    let lines = lines(&log);
    let last = lines.last().unwrap();
    assert_eq!((&last["event"], &last["vm"]), (&json!("ended"), &json!("bare")), "{lines:#?}");
}

#[test]
fn a_vm_whose_log_cannot_be_written_does_not_start() {
    let mut setup = Setup::new(&hammer());
    setup.config.audit = Some(setup.root().join("no/such/folder/audit"));
    let refused = setup.refused();
    assert_eq!(refused.code, ErrorCode::AuditFailed, "{refused:?}");
    assert!(refused.message.contains("no/such/folder/audit"), "{refused:?}");
}
