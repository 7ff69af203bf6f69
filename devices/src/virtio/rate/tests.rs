use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;

use super::*;

const MILLI: Picos = SECOND / 1000;

fn buckets(bytes_per_second: Option<u64>, operations_per_second: Option<u64>) -> Buckets {
    Buckets::new(RateLimit { bytes_per_second, operations_per_second }).unwrap()
}

/// Has one thread ask for requests of `sizes`, over and over, each time it is woken `late`; returns bytes and operations that
/// went ahead within `span`.
fn run(buckets: &mut Buckets, sizes: &[u64], late: Picos, span: Picos) -> (u64, u64) {
    let (mut now, mut turn, mut bytes, mut operations) = (0, Turn::default(), 0, 0);
    for &size in sizes.iter().cycle() {
        if let Some(wait) = turn.take(buckets, now, size) {
            now += wait + late;
            assert_eq!(turn.take(buckets, now, size), None);
        }
        if now >= span {
            break;
        }
        (bytes, operations) = (bytes + size, operations + 1);
    }
    (bytes, operations)
}

fn within(what: u64, of: u64, percent: u64) -> bool {
    what.abs_diff(of) * 100 <= of * percent
}

#[test]
fn keeps_rates_over_ten_seconds() {
    for late in [0, MILLI / 20, 7 * MILLI] {
        for (rate, sizes) in
            [(1_000_000, &[1514][..]), (100_000_000, &[65_562]), (20_000_000, &[60, 1 << 20, 512, 1514])]
        {
            let (bytes, _) = run(&mut buckets(Some(rate), None), sizes, late, 10 * SECOND);
            assert!(within(bytes, 10 * rate, 5), "{bytes} at {rate}, late by {late}");
        }
        let (_, operations) = run(&mut buckets(None, Some(1000)), &[1 << 40, 0], late, 10 * SECOND);
        assert!(within(operations, 10_000, 5), "{operations}");
        // The tighter of the two decides.
        let (bytes, operations) = run(&mut buckets(Some(1 << 20), Some(1000)), &[512], late, 10 * SECOND);
        assert!(within(operations, 10_000, 5) && bytes < 10 << 20);
        let (bytes, operations) = run(&mut buckets(Some(1 << 20), Some(1000)), &[8192], late, 10 * SECOND);
        assert!(within(bytes, 10 << 20, 5) && operations < 10_000);
    }
    let fast = buckets(Some(12_500_000_000), None);
    assert_eq!(fast.bytes.unwrap().cost(60), 4800, "small frames on a fast link cost what they should");
}

#[test]
fn idle_time_is_saved_up_to_the_burst_only() {
    let mut buckets = buckets(None, Some(1000));
    let mut turn = Turn::default();
    let now = 50 * SECOND;
    let passed = (0..1000).take_while(|_| turn.take(&mut buckets, now, 0).is_none()).count();
    assert_eq!(passed, 101);
}

#[test]
fn a_request_larger_than_the_bucket_passes_and_is_paid_for() {
    let mut buckets = buckets(Some(1000), None);
    let mut turn = Turn::default();
    assert_eq!(turn.take(&mut buckets, 0, 5000), None);
    // In debt: the next one waits until all but what a full bucket lacks has flowed in.
    assert_eq!(turn.take(&mut buckets, 0, 1), Some(5 * SECOND - BURST));
    assert_eq!(turn.take(&mut buckets, 4 * SECOND, 1), Some(SECOND - BURST));
    assert_eq!(turn.take(&mut buckets, 5 * SECOND - BURST, 1), None);
}

#[test]
fn the_largest_numbers_do_no_harm() {
    let mut buckets = buckets(Some(1), Some(1));
    let mut turn = Turn::default();
    for _ in 0..10 {
        turn.take(&mut buckets, SECOND, u64::MAX);
        turn.give_up(&mut buckets);
        buckets.settle(SECOND, 0, u64::MAX);
    }
    assert!(turn.take(&mut buckets, u128::from(u64::MAX) * 1000, 1).is_some());
}

#[test]
fn threads_get_their_turns_in_the_order_in_which_they_asked() {
    let mut buckets = buckets(Some(1_000_000), None);
    let sizes = [60, 1514, 65_562];
    let mut turns: Vec<(Turn, Picos, u64)> = sizes.iter().map(|_| (Turn::default(), 0, 0)).collect();
    let mut longest = 0;
    let mut now = 0;
    while now < 10 * SECOND {
        for ((turn, wake, passed), &size) in turns.iter_mut().zip(&sizes) {
            if *wake > now {
                continue;
            }
            // The first of them would take everything if it could.
            let wait = loop {
                match turn.take(&mut buckets, now, size) {
                    Some(wait) => break wait,
                    None => *passed += 1,
                }
            };
            longest = longest.max(wait);
            *wake = now + wait;
        }
        now = turns.iter().map(|(_, wake, _)| *wake).min().unwrap();
    }
    let total: u64 = turns.iter().zip(&sizes).map(|((_, _, passed), size)| passed * size).sum();
    assert!(within(total, 10_000_000, 5), "{total}");
    // One request of each of the others.
    assert!(longest <= (60 + 1514 + 65_562) * SECOND / 1_000_000 + SHORTEST_WAIT, "{longest}");
    let passed: Vec<_> = turns.iter().map(|(_, _, passed)| *passed).collect();
    assert!(passed[2] >= 100, "the large requests got {passed:?}");
}

#[test]
fn a_claim_given_up_is_paid_back_and_another_request_pays_its_own_cost() {
    let mut buckets = buckets(Some(1000), Some(1000));
    let (mut one, mut other) = (Turn::default(), Turn::default());
    assert_eq!(one.take(&mut buckets, 0, 1000), None);
    let free = buckets.open();
    assert_eq!(other.take(&mut buckets, 0, 4000), Some(free));
    assert_eq!(buckets.open(), free + 4 * SECOND);
    other.give_up(&mut buckets);
    assert_eq!(buckets.open(), free);
    other.give_up(&mut buckets);
    assert_eq!(buckets.open(), free);
    assert!(one.take(&mut buckets, 0, 500).is_some());
    assert_eq!(one.take(&mut buckets, free, 2000), None);
    assert_eq!(buckets.open(), free + 2 * SECOND);
    buckets.settle(free, 2000, 1000);
    assert_eq!(buckets.open(), free + SECOND);
}

#[test]
fn a_limit_of_zero_is_refused_and_none_is_none() {
    for (bytes, operations) in [(Some(0), None), (None, Some(0)), (Some(0), Some(5))] {
        let limit = RateLimit { bytes_per_second: bytes, operations_per_second: operations };
        assert_eq!(RateLimiter::new(limit).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    let mut free = RateLimiter::new(RateLimit::default()).unwrap();
    assert!((0..100_000).all(|_| free.take(u64::MAX)));
}

/// Takes `count` operations of `bytes`, sleeping on the descriptor whenever it is refused.
fn work(limiter: &mut RateLimiter, count: u64, bytes: u64) {
    for _ in 0..count {
        while !limiter.take(bytes) {
            let mut fds = [PollFd::new(limiter.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)), Ok(1), "the timer expires");
            limiter.expired();
        }
    }
}

#[test]
fn keeps_the_rate_in_real_time_on_two_threads() {
    let limit = RateLimit { bytes_per_second: Some(50_000_000), operations_per_second: None };
    let rate = SharedRate::new(limit).unwrap();
    let start = Instant::now();
    let threads = [1514, 65_562].map(|bytes: u64| {
        let mut limiter = rate.limiter().unwrap();
        std::thread::spawn(move || work(&mut limiter, 10_000_000 / bytes, bytes))
    });
    for thread in threads {
        thread.join().unwrap();
    }
    // 20 MB at 50 MB/s, of which 5 MB were there from the start.
    let took = start.elapsed();
    assert!(took > Duration::from_millis(290), "{took:?}");
    assert!(took < Duration::from_millis(1500), "{took:?}");
}

proptest! {
    #[test]
    fn no_pattern_of_requests_exceeds_the_rate(
        rate in 1_u64..1 << 34,
        asks in prop::collection::vec((0_usize..3, 0_u64..1 << 20, 0_u64..50_000_000), 1..200),
    ) {
        let mut buckets = buckets(Some(rate), None);
        let mut turns = [const { Turn(None) }; 3];
        let (mut now, mut passed, mut largest) = (0, 0, 0);
        for (thread, bytes, nanos) in asks {
            largest = largest.max(bytes);
            if turns[thread].take(&mut buckets, now, bytes).is_none() {
                passed += bytes;
            }
            now += Picos::from(nanos) * 1000;
            // Each thread may be a request ahead.
            let allowed = Picos::from(rate) * (now + BURST) / SECOND + Picos::from(4 * largest) + 1;
            prop_assert!(Picos::from(passed) <= allowed, "{passed} of {allowed}");
        }
    }
}
