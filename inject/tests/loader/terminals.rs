//! Programs with a terminal.

use civic_inject::wire::{Exit, ToGuest, WindowSize};

use crate::guest::{End, Guest, Heard};

const SIZE: WindowSize = WindowSize { rows: 30, columns: 100, width: 0, height: 0 };

/// A guest where `script` runs on a terminal and has said `up`, the first line.
fn on_terminal(script: &str) -> (Guest, Heard) {
    let mut guest = Guest::start("");
    let mut heard = Heard::default();
    guest.launch(&["sh", "-c", script], |launch| launch.tty = Some(SIZE));
    guest.hear_until(&mut heard, |heard| heard.stdout.starts_with(b"up\r\n"));
    (guest, heard)
}

#[test]
fn a_terminal_has_a_size_that_changes() {
    let mut guest = Guest::start("");
    let mut heard = Heard::default();
    let script = "stty size; trap 'stty size; exit 4' WINCH; echo up; while :; do sleep 0.01; done";
    guest.launch(&["sh", "-c", script], |launch| launch.tty = Some(SIZE));
    guest.hear_until(&mut heard, |heard| heard.stdout == b"30 100\r\nup\r\n");
    guest.send(ToGuest::WindowSize(WindowSize { rows: 50, columns: 132, ..SIZE }));
    let heard = guest.hear_all(heard);
    heard.assert_code(4);
    assert_eq!(heard.stdout(), "30 100\r\nup\r\n50 132\r\n");
}

#[test]
fn a_typed_interrupt_reaches_the_program() {
    let (mut guest, heard) = on_terminal("trap 'exit 5' INT; echo up; while :; do sleep 0.01; done");
    guest.send(ToGuest::Stdin(&[3]));
    guest.hear_all(heard).assert_code(5);
}

#[test]
fn a_signal_reaches_the_program() {
    let (mut guest, heard) = on_terminal("echo up; exec sleep 1000");
    guest.send(ToGuest::Signal(2));
    assert_eq!(guest.hear_all(heard).end, Some(End::Exited(Exit::Signal { signal: 2, core: false })));
}

#[test]
fn what_is_typed_is_read_to_its_end() {
    let (mut guest, heard) = on_terminal("stty -echo; echo up; cat; echo end");
    guest.send(ToGuest::Stdin(b"one\ntwo\n"));
    guest.send(ToGuest::StdinEnd);
    let heard = guest.hear_all(heard);
    heard.assert_code(0);
    assert_eq!(heard.stdout(), "up\r\none\r\ntwo\r\nend\r\n");
}

#[test]
fn all_of_a_terminals_output_comes() {
    let (mut guest, heard) = on_terminal("echo up; stty -opost; head -c 300000 /dev/zero");
    let heard = guest.hear_all(heard);
    heard.assert_code(0);
    assert_eq!(heard.stdout.len(), 300_004);
}

#[test]
fn a_program_may_leave_its_terminal() {
    let (mut guest, heard) = on_terminal("echo up; exec <&- >&- 2>&-; sleep 0.2; exit 6");
    guest.hear_all(heard).assert_code(6);
}
