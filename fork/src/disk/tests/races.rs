//! Writers, readers and generations that come and go, all at a time. Every sector says whose it is and which version, so a cluster
//! that is torn, or of another time than its generation, does not go unnoticed.

use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::testing::Random;

const CLUSTERS: u64 = 12;
/// Two of them to a cluster: several writers preserve the same one.
const UNIT: u64 = C / 2;
const UNITS: u64 = CLUSTERS * 2;
const SECTOR: u64 = 512;

/// Version 0 is zeroes.
fn sector(number: u64, version: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if version != 0 {
        for (n, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = (if n % 2 == 0 { number } else { version }).to_le_bytes();
        }
    }
    bytes
}

struct Child {
    frozen: FrozenFile,
    versions: Vec<u64>,
}

impl Child {
    /// Reads somewhere, and says whether it could. What it reads must be right.
    fn check(&self, random: &mut Random) -> Result<(), Lost> {
        let from = random.below(CLUSTERS * C / SECTOR);
        let count = (1 + random.below(3 * C / SECTOR)).min(CLUSTERS * C / SECTOR - from);
        let mut bytes = vec![0; (count * SECTOR) as usize];
        self.frozen.read_at(&mut bytes, from * SECTOR).map_err(|e| why(&e).unwrap())?;
        for (n, got) in (from..).zip(bytes.as_chunks::<{ SECTOR as usize }>().0) {
            let version = self.versions[(n * SECTOR / UNIT) as usize];
            assert!(*got == sector(n, version), "sector {n} is not of version {version}: {:x?}", &got[..16]);
        }
        Ok(())
    }
}

struct Arena {
    source: Source,
    /// Its lock is held by whoever writes the unit.
    versions: Vec<Mutex<u64>>,
    /// Written at a fork point only.
    drained: RwLock<()>,
    /// Readers hold a generation as long as they read.
    alive: RwLock<Vec<Arc<(Generation, Child)>>>,
    /// Of generations that may be gone.
    strays: RwLock<Vec<Arc<Child>>>,
    over: AtomicBool,
    reads: AtomicU64,
    losses: AtomicU64,
}

impl Arena {
    fn new(limit: u64) -> Self {
        Self {
            source: Source::new(CLUSTERS * C, limit),
            versions: (0..UNITS).map(|_| Mutex::default()).collect(),
            drained: RwLock::default(),
            alive: RwLock::default(),
            strays: RwLock::default(),
            over: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            losses: AtomicU64::new(0),
        }
    }

    fn going_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    fn write(&self, mut random: Random) {
        let mut version = 0;
        while self.going_on() {
            let unit = random.below(UNITS);
            let _in_flight = self.drained.read().unwrap();
            let mut current = locked(&self.versions[unit as usize]);
            let at = unit * UNIT;
            version += 1;
            if random.below(8) == 0 {
                self.source.punch(at, UNIT);
                *current = 0;
                continue;
            }
            *current = random.below(u64::MAX) << 16 | version;
            let bytes: Vec<u8> = (at / SECTOR..(at + UNIT) / SECTOR).flat_map(|n| sector(n, *current)).collect();
            let piece = (UNIT / (1 + random.below(4))).next_multiple_of(SECTOR) as usize;
            for (n, part) in bytes.chunks(piece).enumerate() {
                self.source.write(part, at + (n * piece) as u64);
            }
        }
    }

    fn read(&self, mut random: Random, may_lose: bool) {
        while self.going_on() {
            let alive = self.alive.read().unwrap().clone();
            let strays = self.strays.read().unwrap().clone();
            for _ in 0..10 {
                if let Some(one) = alive.get(random.below(8) as usize) {
                    match one.1.check(&mut random) {
                        Ok(()) => drop(self.reads.fetch_add(1, Ordering::Relaxed)),
                        Err(_) => assert!(may_lose && one.0.lost().is_some()),
                    }
                }
                if let Some(stray) = strays.get(random.below(8) as usize)
                    && stray.check(&mut random).is_err()
                {
                    self.losses.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn come_and_go(&self, mut random: Random) {
        while self.going_on() {
            std::thread::sleep(Duration::from_micros(random.below(4000)));
            if self.alive.read().unwrap().len() < 6 && random.below(2) == 0 {
                let _drained = self.drained.write().unwrap();
                let versions: Vec<u64> = self.versions.iter().map(|version| *locked(version)).collect();
                let generation = self.source.freezer.freeze().unwrap();
                let child = || Child { frozen: open(&generation), versions: versions.clone() };
                let (child, stray) = (child(), child());
                self.alive.write().unwrap().push(Arc::new((generation, child)));
                let mut strays = self.strays.write().unwrap();
                if strays.len() > 6 {
                    strays.remove(0);
                }
                strays.push(Arc::new(stray));
            } else {
                let mut alive = self.alive.write().unwrap();
                if !alive.is_empty() {
                    let which = random.below(alive.len() as u64) as usize;
                    let gone = alive.remove(which);
                    drop(alive);
                    drop(gone);
                }
            }
        }
    }

    fn run(&self, may_lose: bool) {
        let time = std::env::var("CIVIC_RACE_SECONDS").ok().and_then(|time| time.parse().ok()).unwrap_or(2.0);
        let end = Instant::now() + Duration::from_secs_f64(time);
        std::thread::scope(|scope| {
            /// Ends the others also when this thread fails.
            struct Over<'a>(&'a AtomicBool);
            impl Drop for Over<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            for seed in 1..=3 {
                scope.spawn(move || {
                    let _over = Over(&self.over);
                    self.write(Random(seed));
                });
                scope.spawn(move || {
                    let _over = Over(&self.over);
                    self.read(Random(seed + 100), may_lose);
                });
            }
            scope.spawn(|| {
                let _over = Over(&self.over);
                self.come_and_go(Random(77));
            });
            while self.going_on() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            self.over.store(true, Ordering::Relaxed);
        });
        let (reads, losses) = (self.reads.load(Ordering::Relaxed), self.losses.load(Ordering::Relaxed));
        println!("{reads} reads of living generations, {losses} of lost ones refused");
        assert!(reads > 100 && losses > 0);
        self.alive.write().unwrap().clear();
        assert_eq!(self.source.freezer.usage(), Usage { generations: 0, stored: 0 });
    }
}

#[test]
fn no_child_sees_a_byte_of_another_time() {
    let arena = Arena::new(1 << 30);
    arena.run(false);
    assert_eq!(arena.source.told(), []);
}

#[test]
fn also_when_generations_are_given_up() {
    let arena = Arena::new(2 * CLUSTERS * C);
    arena.run(true);
    assert!(!arena.source.told().is_empty());
}
