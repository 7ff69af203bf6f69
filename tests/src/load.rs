//! An open-loop load: requests go out on a schedule, whatever becomes of those before, and each is timed from the moment it was due. A
//! server that stands still for a second is thus seen by all that were due in that second, not by one.
//!
//! What is asked for is a page of nginx's `stub_status`, whose count of requests is a number that no two answers share and that only
//! grows: an answer that comes twice, or from a state that is past, is told from a good one.

pub mod served;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};

/// How long an answer may take before the request is lost. TCP tries again for longer than any pause.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What became of one request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// When it was to be sent.
    pub due: Instant,
    /// How long after that the whole answer was here.
    pub took: Duration,
    /// Its number, or why there is none.
    pub number: Result<u64, String>,
}

/// Requests that go out.
pub struct Load {
    stop: watch::Sender<bool>,
    told: Arc<Told>,
    thread: JoinHandle<Result<Vec<Answer>>>,
}

/// What the load tells while it runs.
#[derive(Default)]
struct Told {
    highest: AtomicU64,
    on_their_way: AtomicU64,
}

impl Load {
    /// So many requests a second to this server, from now on.
    pub fn start(server: SocketAddr, rate: f64) -> Result<Self> {
        ensure!(rate > 0.0, "{rate} requests a second");
        let (stop, stopped) = watch::channel(false);
        let told = Arc::new(Told::default());
        let tells = Arc::clone(&told);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let send = move || runtime.block_on(all(server, Duration::from_secs_f64(1.0 / rate), &tells, stopped));
        let thread = std::thread::Builder::new().name("load".into()).spawn(send)?;
        Ok(Self { stop, told, thread })
    }

    /// The highest number that was answered so far.
    pub fn highest(&self) -> u64 {
        self.told.highest.load(Ordering::SeqCst)
    }

    /// How many requests were sent and are not answered.
    pub fn on_their_way(&self) -> u64 {
        self.told.on_their_way.load(Ordering::SeqCst)
    }

    /// Sends no more, and waits for those on their way. All answers, in the order in which they were due; no number came twice.
    pub fn finish(self) -> Result<Vec<Answer>> {
        let _ = self.stop.send(true);
        let answers = self.thread.join().map_err(|_| anyhow!("the load's thread panicked"))??;
        let numbers: Vec<_> = answers.iter().filter_map(|answer| answer.number.clone().ok()).collect();
        let different: BTreeSet<_> = numbers.iter().collect();
        ensure!(different.len() == numbers.len(), "{} answers had a number twice", numbers.len() - different.len());
        Ok(answers)
    }
}

async fn all(
    server: SocketAddr,
    period: Duration,
    told: &Arc<Told>,
    mut stopped: watch::Receiver<bool>,
) -> Result<Vec<Answer>> {
    let answers = Arc::new(Mutex::new(Vec::new()));
    let mut requests = tokio::task::JoinSet::new();
    let mut due = Instant::now();
    loop {
        tokio::select! {
            biased;
            _ = stopped.changed() => break,
            () = sleep_until(due.into()) => {}
        }
        let (answers, told) = (Arc::clone(&answers), Arc::clone(told));
        told.on_their_way.fetch_add(1, Ordering::SeqCst);
        requests.spawn(async move {
            let number = match timeout(PATIENCE, one(server, &told.highest)).await {
                Ok(number) => number.map_err(|e| format!("{e:#}")),
                Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            told.on_their_way.fetch_sub(1, Ordering::SeqCst);
            let answer = Answer { due, took: due.elapsed(), number };
            answers.lock().unwrap_or_else(|e| e.into_inner()).push(answer);
        });
        while requests.try_join_next().is_some() {}
        // Never skipped, however late: what is late goes out at once, and has its delay counted.
        due += period;
    }
    requests.join_all().await;
    let mut answers = std::mem::take(&mut *answers.lock().unwrap_or_else(|e| e.into_inner()));
    answers.sort_by_key(|answer| answer.due);
    Ok(answers)
}

/// One request on a connection of its own.
async fn one(server: SocketAddr, highest: &AtomicU64) -> Result<u64> {
    let past = highest.load(Ordering::SeqCst);
    let mut stream = TcpStream::connect(server).await.context("cannot connect")?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.context("cannot send")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.context("the answer broke off")?;
    let number = number(&String::from_utf8_lossy(&answer))?;
    ensure!(number > past, "number {number} came after {past} had been answered: a state that is past");
    highest.fetch_max(number, Ordering::SeqCst);
    Ok(number)
}

/// Asks once, outside of any load.
pub fn ask(server: SocketAddr) -> Result<u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { timeout(PATIENCE, one(server, &AtomicU64::new(0))).await })?
}

/// How many requests nginx has had, this one included, by its answer: the third number of the line below
/// `server accepts handled requests` (`ngx_http_stub_status_module`).
pub fn number(answer: &str) -> Result<u64> {
    let mut lines = answer.lines().skip_while(|line| line.trim() != "server accepts handled requests");
    let Some(counts) = lines.nth(1) else { bail!("nginx served {answer:?}") };
    let number = counts.split_whitespace().nth(2).with_context(|| format!("nginx counts {counts:?}"))?;
    Ok(number.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn page(requests: u64) -> String {
        format!(
            "HTTP/1.1 200 OK\r\n\r\nActive connections: 1 \nserver accepts handled requests\n 7 7 {requests} \nReading: 0\n"
        )
    }

    /// Serves a number for each connection, after `pause` before the connection `slow`.
    fn serve(numbers: Vec<u64>, slow: usize, pause: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for (n, number) in numbers.into_iter().enumerate() {
                if n == slow {
                    std::thread::sleep(pause);
                }
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 18];
                stream.read_exact(&mut request).unwrap();
                stream.write_all(page(number).as_bytes()).unwrap();
            }
        });
        address
    }

    #[test]
    fn a_standstill_is_seen_by_all_that_were_due_in_it() {
        let server = serve((1..=10_000).collect(), 20, Duration::from_millis(500));
        let load = Load::start(server, 100.0).unwrap();
        std::thread::sleep(Duration::from_millis(1200));
        let answers = load.finish().unwrap();
        assert!(answers.len() > 90, "{}", answers.len());
        assert!(answers.iter().all(|answer| answer.number.is_ok()));
        let slow = answers.iter().filter(|answer| answer.took > Duration::from_millis(100)).count();
        // About forty were due in the first four fifths of it.
        assert!(slow >= 30, "{slow}");
    }

    #[test]
    fn what_comes_from_the_past_or_not_at_all_is_no_answer() {
        let server = serve(vec![5, 4], 9, Duration::ZERO);
        let highest = AtomicU64::new(0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        assert_eq!(runtime.block_on(one(server, &highest)).unwrap(), 5);
        assert!(runtime.block_on(one(server, &highest)).unwrap_err().to_string().contains("past"));
        assert!(runtime.block_on(one(server, &highest)).is_err());
        assert_eq!(number(&page(42)).unwrap(), 42);
        assert!(number("HTTP/1.1 200 OK\r\n\r\nhello").is_err());
    }
}
