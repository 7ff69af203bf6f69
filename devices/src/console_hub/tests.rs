use super::*;
use std::sync::Condvar;
use std::thread;

/// A guest that takes 1 to 16 bytes at a time into a buffer of that room, and reads it on another thread.
#[derive(Default)]
struct Guest {
    state: Mutex<GuestState>,
    arrived: Condvar,
}

#[derive(Default)]
struct GuestState {
    waiting: Vec<u8>,
    room: usize,
    refused: u64,
}

impl ConsoleInput for Guest {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock().unwrap();
        let n = bytes.len().min(state.room.saturating_sub(state.waiting.len()));
        state.waiting.extend(&bytes[..n]);
        state.refused += u64::from(n < bytes.len());
        self.arrived.notify_one();
        n
    }
}

impl Guest {
    /// Reads `count` bytes as a slow guest would, telling `hub` whenever there is room.
    fn read(&self, hub: &ConsoleHub, count: usize) -> Vec<u8> {
        let mut got = Vec::new();
        let mut room = 0;
        while got.len() < count {
            room = room % 16 + 1;
            let mut state = self.state.lock().unwrap();
            state.room = room;
            got.append(&mut state.waiting);
            drop(state);
            if got.len() >= count {
                break;
            }
            hub.input_ready();
            let state = self.state.lock().unwrap();
            let limit = Duration::from_secs(20);
            let arrived = self.arrived.wait_timeout_while(state, limit, |state| state.waiting.is_empty()).unwrap();
            assert!(!arrived.1.timed_out(), "input stuck after {} of {count} bytes", got.len());
        }
        got
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed).collect()
}

fn hub(history_bytes: usize) -> Arc<ConsoleHub> {
    ConsoleHub::new("serial", history_bytes, None).unwrap()
}

fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn counter(hub: &ConsoleHub, name: &str) -> u64 {
    hub.read().into_iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn no_input_is_lost_in_a_sink_of_a_few_bytes() {
    let hub = hub(1024);
    let guest = Arc::new(Guest::default());
    hub.connect_input(guest.clone());
    let sent = pattern(1 << 20, 0);
    let mut client = hub.attach().unwrap();
    let writer = thread::spawn({
        let sent = sent.clone();
        // Dropped when written: what is still in the socket must arrive all the same.
        move || client.write_all(&sent).unwrap()
    });
    assert!(guest.read(&hub, sent.len()) == sent, "input differs");
    writer.join().unwrap();
    assert!(guest.state.lock().unwrap().refused > 0, "the sink was never full: the test shows nothing");
    // The hub knows how much was taken only once the sink has it.
    wait_until("all input is counted", || counter(&hub, "input_bytes") == 1 << 20);
    wait_until("the client is forgotten", || counter(&hub, "clients") == 0);
}

#[test]
fn input_waits_for_a_sink_and_survives_its_replacement() {
    let hub = hub(1024);
    let mut client = hub.attach().unwrap();
    client.write_all(b"before any sink, ").unwrap();
    let first = Arc::new(Guest::default());
    first.state.lock().unwrap().room = 7;
    hub.connect_input(first.clone());
    wait_until("the first sink is full", || first.state.lock().unwrap().waiting.len() == 7);
    client.write_all(b"and after a reset").unwrap();
    let second = Arc::new(Guest::default());
    hub.connect_input(second.clone());
    assert_eq!(second.read(&hub, 27), b"any sink, and after a reset");
    assert_eq!(first.state.lock().unwrap().waiting, b"before ");
}

#[test]
fn every_client_sees_all_output() {
    const LEN: usize = 1 << 20;
    let hub = hub(2 << 20);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let mut client = hub.attach().unwrap();
            thread::spawn(move || read_exactly(&mut client, LEN))
        })
        .collect();
    let output = pattern(LEN, 7);
    for part in output.chunks(333) {
        hub.guest_output(part);
    }
    for reader in readers {
        assert!(reader.join().unwrap() == output, "output differs");
    }
    assert_eq!(counter(&hub, "lost_bytes"), 0);
}

#[test]
fn history_comes_first() {
    let hub = hub(8);
    hub.guest_output(b"0123456789");
    let mut client = hub.attach().unwrap();
    hub.guest_output(b"live");
    assert_eq!(read_exactly(&mut client, 12), b"23456789live");
    hub.guest_output(b"!");
    assert_eq!(read_exactly(&mut client, 1), b"!");
    assert_eq!(counter(&hub, "lost_bytes"), 0);
}

#[test]
fn a_slow_reader_loses_the_oldest_and_is_told() {
    let hub = hub(0);
    let mut slow = hub.attach().unwrap();
    let output = pattern(4 << 20, 3);
    let start = Instant::now();
    for part in output.chunks(1000) {
        hub.guest_output(part);
    }
    // Generous: it is a copy of 4 MiB. A hub that waited for the reader would never get here.
    assert!(start.elapsed() < Duration::from_secs(5));
    hub.guest_output(b"the end");
    let hub_clone = hub.clone();
    let finisher = thread::spawn(move || hub_clone.finish(Duration::from_secs(20)));
    let mut got = Vec::new();
    slow.read_to_end(&mut got).unwrap();
    finisher.join().unwrap();
    assert!(got.len() < output.len());
    assert!(got.ends_with(b"the end"));
    let text = String::from_utf8_lossy(&got);
    assert!(text.contains("bytes of output lost here]"));
    let lost = counter(&hub, "lost_bytes") as usize;
    let notices: usize = text.match_indices("\r\n[civic: ").count();
    let overhead: usize = text.match_indices("[civic: ").map(|(at, _)| text[at..].find("]\r\n").unwrap() + 5).sum();
    assert!(notices >= 1);
    assert_eq!(got.len() - overhead + lost, output.len() + 7, "every byte is delivered or counted as lost");
}

#[test]
fn clients_come_and_go() {
    let hub = hub(64);
    for round in 0..200 {
        let mut client = hub.attach().unwrap_or_else(|error| panic!("round {round}: {error}"));
        hub.guest_output(b"x");
        read_exactly(&mut client, 1);
        drop(client);
        wait_until("the client is forgotten", || counter(&hub, "clients") == 0);
    }
    let all: Vec<_> = (0..MAX_CLIENTS).map(|_| hub.attach().unwrap()).collect();
    assert_eq!(hub.attach().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    drop(all);
    wait_until("clients are forgotten", || counter(&hub, "clients") == 0);
}

#[test]
fn a_client_that_stops_writing_still_reads() {
    let hub = hub(64);
    let guest = Arc::new(Guest::default());
    hub.connect_input(guest.clone());
    let mut client = hub.attach().unwrap();
    client.write_all(b"ls\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.read(&hub, 3), b"ls\n");
    hub.guest_output(b"bin etc");
    assert_eq!(read_exactly(&mut client, 7), b"bin etc");
}

#[test]
fn a_hub_sleeps_while_input_of_a_closed_client_waits() {
    let hub = ConsoleHub::new("sleepy", 64, None).unwrap();
    let mut client = hub.attach().unwrap();
    hub.guest_output(b"x");
    read_exactly(&mut client, 1);
    client.write_all(b"nobody takes this").unwrap();
    drop(client);
    let half_open = hub.attach().unwrap();
    half_open.shutdown(std::net::Shutdown::Write).unwrap();
    thread::sleep(Duration::from_millis(50));
    let before = cpu_ticks("con-sleepy");
    thread::sleep(Duration::from_millis(500));
    let used = cpu_ticks("con-sleepy") - before;
    assert!(used < 10, "the hub spins: {used} of 50 ticks");
    drop(half_open);
    let guest = Arc::new(Guest::default());
    hub.connect_input(guest.clone());
    assert_eq!(guest.read(&hub, 17), b"nobody takes this");
    wait_until("both clients are forgotten", || counter(&hub, "clients") == 0);
}

/// CPU time of this process's thread of that name, in ticks of 10 ms.
fn cpu_ticks(name: &str) -> u64 {
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        if let Some((_, fields)) = stat.split_once(&format!("({name}) ")) {
            let fields: Vec<&str> = fields.split(' ').collect();
            return fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    panic!("no thread {name}");
}

#[test]
fn the_log_gets_all_output() {
    let mut file = tempfile::tempfile().unwrap();
    let hub = ConsoleHub::new("serial", 64, Some(file.try_clone().unwrap())).unwrap();
    hub.guest_output(b"Linux version ");
    hub.guest_output(b"6.12\r\n");
    hub.finish(Duration::from_secs(20));
    hub.finish(Duration::from_secs(20));
    hub.guest_output(b"too late");
    assert_eq!(hub.attach().unwrap_err().kind(), io::ErrorKind::NotConnected);
    file.rewind().unwrap();
    let mut log = String::new();
    file.read_to_string(&mut log).unwrap();
    assert_eq!(log, "Linux version 6.12\r\n");
}

#[test]
fn finish_gives_up_on_a_reader_that_does_not_read() {
    let hub = hub(1 << 20);
    let client = hub.attach().unwrap();
    hub.guest_output(&pattern(1 << 20, 0));
    let start = Instant::now();
    hub.finish(Duration::from_millis(50));
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(client);
}

#[test]
fn dropping_the_hub_closes_its_clients() {
    let hub = hub(64);
    let mut client = hub.attach().unwrap();
    drop(hub);
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
}
