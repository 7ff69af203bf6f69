//! The loader as it is brought into guests, on this host: in namespaces of its own, over a socket. Needs root, a shell and `unshare`.
//!
//! Not here, because only a guest has it: a monitor at the port, disks with serial numbers, and being started by the kernel.

#[path = "loader/archives.rs"]
mod archives;
#[path = "loader/freezing.rs"]
mod freezing;
#[path = "loader/guest.rs"]
mod guest;
#[path = "loader/hypercalls.rs"]
mod hypercalls;
#[path = "loader/roots.rs"]
mod roots;
#[path = "loader/terminals.rs"]
mod terminals;

use civic_inject::wire::{Exit, Network, Stage, Step, ToGuest};
use guest::{End, Guest, Heard};
use nix::errno::Errno;

#[track_caller]
fn sh(script: &str) -> Heard {
    Guest::start("").run(&["sh", "-c", script], |_| ())
}

#[test]
fn a_program_has_arguments_environment_outputs_and_a_status() {
    let heard = Guest::start("").run(&["sh", "-c", "echo \"$1\" $FOO; echo wrong >&2; exit 7", "sh", "a  b"], |_| ());
    heard.assert_code(7);
    assert_eq!(heard.stdout(), "a  b bar\n");
    assert_eq!(heard.stderr, b"wrong\n");
    assert_eq!(heard.warnings, [""; 0]);
    let stages = [Stage::Started, Stage::Configured, Stage::Frozen, Stage::Mounted, Stage::NetworkUp, Stage::Execed];
    assert_eq!(heard.stages, [&stages[..], &[Stage::Exited]].concat());
}

#[test]
fn a_program_starts_as_programs_expect() {
    let heard = sh(
        "ls -l /proc/self/fd | grep -c -- '->'; umask; pwd; cat /proc/self/status | grep -E '^Sig(Blk|Ign|Cgt)'; id -u; \
        cat /proc/self/oom_score_adj; cut -d' ' -f5,6 /proc/$$/stat | tr ' ' '\\n' | grep -vx $$",
    );
    // Three, and ls's own.
    let signals: String = ["SigBlk", "SigIgn", "SigCgt"].map(|set| format!("{set}:\t{:016x}\n", 0)).concat();
    assert_eq!(heard.stdout(), format!("4\n0022\n/\n{signals}0\n0\n"));
}

#[test]
fn signals_end_programs_and_are_told() {
    let killed = |signal| Some(End::Exited(Exit::Signal { signal, core: false }));
    assert_eq!(sh("ulimit -c 0; kill -KILL $$").end, killed(9));
    assert_eq!(sh("ulimit -c 0; kill -SEGV $$").end, killed(11));

    let mut guest = Guest::start("");
    let mut heard = Heard::default();
    guest.launch(&["sh", "-c", "sleep 1000 & echo up; wait; echo never"], |_| ());
    guest.hear_until(&mut heard, |heard| heard.stdout == b"up\n");
    guest.send(ToGuest::Signal(15));
    assert_eq!(guest.hear_all(heard).end, killed(15));
}

#[test]
fn much_goes_in_and_out() {
    let input: Vec<u8> =
        (0..10_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[..1].to_vec()).collect();
    let mut guest = Guest::start("");
    let mut heard = Heard::default();
    guest.launch(&["cat"], |_| ());
    let mut rest = &input[..];
    while !rest.is_empty() {
        // Until nothing more may be sent, and nothing is read: then the loader, the pipes and the socket are full.
        while guest.credit > 0 && !rest.is_empty() {
            let chunk = rest.split_off(..rest.len().min(guest.credit).min(50_000)).unwrap();
            guest.send(ToGuest::Stdin(chunk));
            guest.credit -= chunk.len();
        }
        assert!(guest.hear(&mut heard), "{:?}", heard.end);
    }
    guest.send(ToGuest::StdinEnd);
    let heard = guest.hear_all(heard);
    heard.assert_code(0);
    assert!(heard.stdout == input, "{} bytes of {}", heard.stdout.len(), input.len());
}

#[test]
fn input_that_nobody_reads_is_credited() {
    let mut guest = Guest::start("");
    let mut heard = Heard::default();
    guest.launch(&["sh", "-c", "exec <&-; echo closed; sleep 1000"], |_| ());
    guest.hear_until(&mut heard, |heard| heard.stdout == b"closed\n");
    let all = guest.credit;
    guest.send(ToGuest::Stdin(&vec![0; all]));
    guest.credit = 0;
    while guest.credit < all {
        assert!(guest.hear(&mut heard));
    }
    guest.send(ToGuest::Signal(9));
    guest.hear_all(heard);
}

#[test]
fn nobody_waits_for_what_a_program_leaves_behind() {
    let heard = sh("sleep 1000 & echo done; exit 3");
    heard.assert_code(3);
    assert_eq!(heard.stdout(), "done\n");
}

#[test]
fn the_last_of_the_output_comes() {
    let heard = sh("head -c 300000 /dev/zero; exit 1");
    heard.assert_code(1);
    assert_eq!(heard.stdout.len(), 300_000);
}

#[test]
fn what_cannot_be_executed_is_said() {
    let setup = "cp /bin/true file; chmod 644 file; printf '#!/no/such\\n' > script; printf nonsense > text; chmod 755 script text; mkdir folder";
    let check = |program: &str, errno: Errno, text: &str| {
        let mut guest = Guest::start(setup);
        let dir = guest.dir.path().to_str().unwrap().to_owned();
        let heard = guest.run(&[&program.replace("DIR", &dir)], |_| ());
        assert_eq!(heard.assert_failed(Step::Exec, errno as i32), text.replace("DIR", &dir));
        assert!(!heard.stages.contains(&Stage::Execed));
    };
    check("/no/such/program", Errno::ENOENT, "there is no program /no/such/program");
    check("no-such-program", Errno::ENOENT, "there is no program no-such-program in the folders that PATH names");
    check("", Errno::ENOENT, "there is no program  in the folders that PATH names");
    check("DIR/file", Errno::EACCES, "DIR/file is not executable");
    check("DIR/folder", Errno::EACCES, "DIR/folder is a folder");
    check("DIR/script", Errno::ENOENT, "DIR/script needs an interpreter or dynamic loader that is not there");
    check("DIR/text", Errno::ENOEXEC, "DIR/text has no format that the guest's kernel executes");
}

#[test]
fn a_folder_that_is_not_there_is_said() {
    let heard = Guest::start("").run(&["true"], |launch| launch.cwd = Some(c"/no/such"));
    let text = heard.assert_failed(Step::Process, Errno::ENOENT as i32);
    assert_eq!(text, "the program cannot be started in the folder /no/such");
}

#[test]
fn users_priorities_and_folders_are_as_wanted() {
    // Priority, niceness if it is that, real-time priority, policy.
    let script = "id -u; id -g; id -G; pwd; cut -d' ' -f$1,40,41 /proc/$$/stat";
    let stat = |launch: &mut civic_inject::wire::Launch<'_>| {
        (launch.uid, launch.gid, launch.cwd) = (1234, 2345, Some(c"/proc"));
    };
    let nice = Guest::start("").run(&["sh", "-c", script, "sh", "18,19"], |launch| {
        stat(launch);
        launch.nice = Some(-5);
    });
    assert_eq!(nice.stdout(), "1234\n2345\n2345\n/proc\n15 -5 0 0\n");
    let realtime = Guest::start("").run(&["sh", "-c", script, "sh", "18"], |launch| {
        stat(launch);
        launch.realtime = Some(7);
    });
    if let Some(End::Failed { step: Step::Process, errno, .. }) = realtime.end {
        eprintln!("SKIPPED: this host allows no real-time processes: {}", Errno::from_raw(errno));
    } else {
        assert_eq!(realtime.stdout(), "1234\n2345\n2345\n/proc\n-8 7 1\n");
    }
}

#[test]
fn two_hundred_programs_run_one_after_another() {
    for n in 0..200 {
        let heard = Guest::start("").run(&["echo", &n.to_string()], |_| ());
        heard.assert_code(0);
        assert_eq!(heard.stdout(), format!("{n}\n"));
    }
}

#[test]
fn a_host_that_talks_nonsense_is_told_and_left() {
    let check = |bytes: &[u8], text: &str| {
        let mut guest = Guest::start("");
        guest.send_bytes(bytes);
        assert_eq!(guest.hear_all(Heard::default()).assert_failed(Step::Protocol, 0), text);
    };
    check(b"GET / HTTP/1.1\r\n\r\n", "the monitor sent what is not a message");
    check(&[17, 0, 0, 0, 255, 255, 255, 255], "the monitor sent what is not a message");
    check(&[99, 0, 0, 0, 0, 0, 0, 0], "the monitor sent a message of an unknown kind");
    check(&[21, 0, 0, 0, 0, 0, 0, 0], "the monitor sent a message without a valid launch");
    check(&[16, 0, 0, 0, 1, 0, 0, 0, 9], "the monitor sent a message without a valid job");
    check(&[16, 0, 0, 0, 3, 0, 0, 0, 0, 9, 9], "the monitor sent a message without a valid list of arguments");
}

#[test]
fn a_host_that_talks_nonsense_later_ends_the_program() {
    let check = |bytes: &[u8], text: &str| {
        let mut guest = Guest::start("");
        let mut heard = Heard::default();
        guest.launch(&["sh", "-c", "echo up; sleep 1000"], |_| ());
        guest.hear_until(&mut heard, |heard| heard.stdout == b"up\n");
        guest.send_bytes(bytes);
        assert_eq!(guest.hear_all(heard).assert_failed(Step::Protocol, 0), text);
    };
    check(&[0; 8], "the monitor sent a message of an unknown kind");
    check(&[19, 0, 0, 0, 1, 0, 0, 0, 0], "the monitor sent a message without a valid signal");
    check(&[19, 0, 0, 0, 1, 0, 0, 0, 65], "the monitor sent a message without a valid signal");
    let end = [18, 0, 0, 0, 0, 0, 0, 0];
    let input = [17, 0, 0, 0, 1, 0, 0, 0, 7];
    check(&[&end[..], &input].concat(), "the monitor sent input after the input's end");
    // More than the greatest buffer and the greatest pipe hold together: both grow if the first of it goes on before the second comes.
    let mut too_much = Vec::new();
    for _ in 0..16 {
        ToGuest::Stdin(&[0; 1 << 16]).encode(&mut too_much).unwrap();
    }
    check(&too_much, "the monitor sent more input than it had credit for");
}

#[test]
fn the_network_is_set_up() {
    let setup = "ip link add name new address 52:54:00:00:00:01 type veth peer name old address 52:54:00:00:00:02; ip link set old up";
    let mut guest = Guest::start(setup);
    let show = "ip -4 -o address show new | grep -o 'inet [^ ]*'; ip link show new | grep -o 'mtu [0-9]*'; \
        ip route show default; ip link show old | grep -o DOWN | head -1";
    let heard = guest.run(&["sh", "-c", show], |launch| {
        launch.down = &[[0x52, 0x54, 0, 0, 0, 2], [2; 6]];
        launch.network = Some(Network {
            mac: [0x52, 0x54, 0, 0, 0, 1],
            address: [10, 1, 2, 3].into(),
            prefix: 20,
            gateway: Some([10, 1, 0, 1].into()),
            mtu: Some(1400),
        });
    });
    assert_eq!(
        heard.stdout(),
        "inet 10.1.2.3/20\nmtu 1400\ndefault via 10.1.0.1 dev new linkdown \nDOWN\n",
        "{heard:?}"
    );
}

#[test]
fn a_network_card_that_does_not_come_is_said() {
    let heard = Guest::start("").run(&["true"], |launch| {
        launch.timeout_ms = 20;
        launch.network =
            Some(Network { mac: [2; 6], address: [10, 1, 2, 3].into(), prefix: 20, gateway: None, mtu: None });
    });
    let text = heard.assert_failed(Step::Network, Errno::ENODEV as i32);
    assert_eq!(text, "the guest's kernel has not found the new network card");
}
