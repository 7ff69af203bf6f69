//! Writes that go from page to page, as readahead knows reads: of such a one the next pages are let through before it gets there, the more the
//! longer it has lasted. Whoever writes here and there is let through to one page at a time.

/// Streams known at a time: a vCPU that copies has one, and there is somebody else too.
const STREAMS: usize = 8;
/// Pages let through at most, together with the one that was waited for: so many copies its writer waits for.
const LONGEST: u32 = 16;

/// A stream: the page that it comes to next, and how many it was let through to the last time.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    next: u32,
    len: u32,
}

/// Those known, the one that moved last in front.
#[derive(Debug, Default)]
pub struct Streams([Stream; STREAMS]);

impl Streams {
    /// A write waits for `page`. Returns how many pages to let it through to, that one included; [`Streams::let_through`] must follow.
    pub fn written(&mut self, page: u32) -> u32 {
        let known = self.0.iter().position(|stream| stream.len > 0 && stream.next == page);
        let len = known.map_or(1, |at| (self.0[at].len * 2).min(LONGEST));
        self.0[..=known.unwrap_or(STREAMS - 1)].rotate_right(1);
        self.0[0] = Stream { next: page + 1, len };
        len
    }

    /// It was let through up to here.
    pub fn let_through(&mut self, end: u32) {
        self.0[0].next = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(streams: &mut Streams, pages: &[u32]) -> Vec<u32> {
        let mut written = |page| {
            let len = streams.written(page);
            streams.let_through(page + len);
            len
        };
        pages.iter().map(|page| written(*page)).collect()
    }

    #[test]
    fn who_goes_on_is_let_through_to_more_and_who_jumps_is_not() {
        let mut streams = Streams::default();
        assert_eq!(lens(&mut streams, &[0, 1, 3, 7, 15, 31, 47, 63]), [1, 2, 4, 8, 16, 16, 16, 16]);
        assert_eq!(lens(&mut streams, &[500, 9, 77, 4]), [1; 4]);
        // Four others have not made it forgotten.
        assert_eq!(lens(&mut streams, &[79]), [16]);
        assert_eq!(lens(&mut streams, &(0..8).map(|n| 10_000 + 2 * n).collect::<Vec<_>>()), [1; 8]);
        assert_eq!(lens(&mut streams, &[95]), [1]);
    }

    #[test]
    fn who_was_stopped_early_goes_on_from_there() {
        let mut streams = Streams::default();
        lens(&mut streams, &[0, 1, 3]);
        assert_eq!(streams.written(7), 8);
        streams.let_through(9);
        assert_eq!(streams.written(9), 16);
    }
}
