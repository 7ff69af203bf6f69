use super::*;
use crate::virtio::testing::{Attached, Driver, Part, count};

#[test]
fn fills_buffers_up_to_its_bound() {
    let mut rng = Attached::new(Rng::new());
    let mut driver = Driver::new(&[QUEUE_SIZE]);
    rng.activate(driver.activation(RING_FEATURES)).unwrap();
    let queue = &mut driver.queues[0];
    let ask = |queue: &mut crate::virtio::testing::DriverQueue, parts: &[Part<'_>]| {
        let offered = queue.offer(parts);
        queue.kick();
        let (head, len) = queue.await_used();
        assert_eq!(head, offered.head);
        (len, offered)
    };
    let (len, offered) = ask(queue, &[Part::Room(1000), Part::Room(3)]);
    assert_eq!(len, 1003);
    let bytes = queue.bytes(offered.parts[0]);
    assert!((0..=255_u8).filter(|value| bytes.contains(value)).count() > 200, "not random: {bytes:?}");
    assert_eq!(ask(queue, &[Part::Room(100 << 10)]).0, 64 << 10);
    // Nothing to write to.
    assert_eq!(ask(queue, &[Part::Say(b"hello")]).0, 0);
    let counters = rng.counters();
    assert_eq!((count(&*counters, "requests"), count(&*counters, "bytes")), (3, 1003 + (64 << 10)));
}
