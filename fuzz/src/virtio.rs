//! Virtio devices behind their PCI transport, driven by a guest that now and then does wrong, while input comes in from the far side.
//!
//! The input is a program: the device, whether the guest acts while the device runs, and then operations of a byte each with their
//! operands. Most do what a driver would, so that a run gets deep; some do anything. After each, [`oracle`] judges. In the end the
//! device, whatever was done to it, must work again once it was reset.

mod chains;
mod devices;
mod driver;
mod memory;
mod oracle;
pub mod qcow2;
mod rig;

use arbitrary::{Result, Unstructured};

use self::devices::{KINDS, SERVED, packet};
use self::driver::{Driver, Plan};
use self::memory::{END, REGIONS};
use self::rig::Rig;

/// Bytes of a chain's readable part that come from the input, at most.
const SAID: u32 = 80;
/// Lengths of buffers that matter to some device.
const LENGTHS: [u32; 16] = [0, 1, 2, 4, 8, 11, 12, 13, 16, 44, 64, 512, 513, 1526, 4096, 65_562];
/// Operations of one run, at most: a run has to end.
const MOST: usize = 200;
const RACING: u8 = 1;
const RECOVERS: u8 = 2;

/// Runs one program.
pub fn run(program: &[u8]) {
    let mut input = Unstructured::new(program);
    let _ = play(&mut input);
}

fn play(input: &mut Unstructured<'_>) -> Result<()> {
    let (kind, flags) = (input.arbitrary::<u8>()? % KINDS, input.arbitrary::<u8>()?);
    let rig = Rig::new(kind, flags & RACING != 0);
    let mut driver = Driver::new(&rig);
    go_on(input, rig, &mut driver, flags & RECOVERS != 0)
}

/// The operations, and the end.
fn go_on(input: &mut Unstructured<'_>, mut rig: Rig, driver: &mut Driver, recovers: bool) -> Result<()> {
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        operate(input, &mut rig, driver)?;
    }
    rig.calm();
    if recovers {
        driver.bring_up(&mut rig, Plan::GOOD);
        for known in rig.far.known() {
            driver.ask(&mut rig, &known);
        }
        rig.far.check_known();
    }
    Ok(())
}

/// Runs a program as [`run`] does, but on a function that comes out of a state: after the device, the state's length in two bytes
/// and, in postcard's encoding, the state.
pub fn run_restored(program: &[u8]) {
    let mut input = Unstructured::new(program);
    let _ = play_restored(&mut input);
}

fn play_restored(input: &mut Unstructured<'_>) -> Result<()> {
    let (kind, len) = (input.arbitrary::<u8>()? % KINDS, input.arbitrary::<u16>()?);
    let state = input.bytes(input.len().min(len.into()))?;
    let Ok(state) = postcard::from_bytes(state) else { return Ok(()) };
    let Some(rig) = Rig::restored(kind, state) else { return Ok(()) };
    let mut driver = Driver::new(&rig);
    go_on(input, rig, &mut driver, true)
}

/// Devices in the middle of their work, saved, and more work for them.
pub fn seeds_restored() -> Vec<Vec<u8>> {
    let seed = |kind: u8| {
        let mut rig = Rig::new(kind, false);
        let mut driver = Driver::new(&rig);
        driver.bring_up(&mut rig, Plan::GOOD);
        let work = work(kind);
        let mut input = Unstructured::new(&work);
        while !input.is_empty() {
            operate(&mut input, &mut rig, &mut driver).expect("there is enough of it");
        }
        let state = postcard::to_stdvec(&rig.state()).expect("plain data");
        [&[kind][..], &(state.len() as u16).to_le_bytes(), &state, &work].concat()
    };
    (0..KINDS).map(seed).collect()
}

fn operate(input: &mut Unstructured<'_>, rig: &mut Rig, driver: &mut Driver) -> Result<()> {
    match input.arbitrary::<u8>()? % 18 {
        0 => driver.bring_up(rig, Plan::GOOD),
        1 => {
            let plan = Plan {
                features: !u64::from(input.arbitrary::<u32>()?),
                order: u32::from(input.arbitrary::<u8>()? % 10),
                without: 0,
                shift: 0,
            };
            driver.bring_up(rig, plan);
        }
        2 => {
            let features = input.arbitrary()?;
            let (order, without) = (u32::from(input.arbitrary::<u8>()? % 10), input.arbitrary()?);
            let shift = input.arbitrary::<i32>()? as i64 as u64;
            driver.bring_up(rig, Plan { features, order, without, shift });
        }
        // Often: it is what there is to do.
        3..=5 => chain(input, rig, driver)?,
        6 => {
            let queue = input.arbitrary::<u8>()?;
            rig.kick(u16::from(queue % 5));
        }
        7 => {
            let how = input.arbitrary::<u8>()?;
            let len = LENGTHS[usize::from(how % 16)] as usize;
            let mut bytes = input.bytes(input.len().min(len).min(SAID as usize))?.to_vec();
            bytes.resize(len, 0);
            rig.feed(how >> 4, &bytes);
        }
        8 => drop(rig.far.drain()),
        9 => rig.migrate(),
        10 => rig.pause(),
        11 => {
            let (offset, len) = (input.arbitrary::<u16>()?, 1 + input.arbitrary::<u8>()? % 8);
            let value = input.arbitrary::<u64>()?.to_le_bytes();
            rig.write(u64::from(offset % 0x5100), &value[..usize::from(len)]);
        }
        12 => {
            let (offset, len) = (input.arbitrary::<u16>()?, 1 + input.arbitrary::<u8>()? % 8);
            rig.read(u64::from(offset % 0x5100), &mut [0; 8][..usize::from(len)]);
        }
        13 => {
            let (offset, len) = (input.arbitrary::<u8>()?, 1 + input.arbitrary::<u8>()? % 4);
            let mut value = input.arbitrary::<u32>()?.to_le_bytes();
            rig.config(offset.into(), &mut value[..usize::from(len)], len > 1 || input.arbitrary()?);
        }
        14 => {
            let queue = u16::from(input.arbitrary::<u8>()? % 5);
            match input.arbitrary::<u8>()? % 3 {
                0 => driver.set_available(queue, input.arbitrary()?),
                1 => driver.set_interrupts(queue, input.arbitrary()?, input.arbitrary()?),
                _ => driver.publish(queue, input.arbitrary()?),
            }
        }
        15 => {
            let queue = u16::from(input.arbitrary::<u8>()? % 5);
            let index = input.arbitrary::<u8>()?;
            let descriptor = (address(input, driver, queue)?, length(input)?, input.arbitrary()?, input.arbitrary()?);
            driver.descriptor(queue, index.into(), descriptor);
        }
        16 => {
            let at = address(input, driver, 0)?;
            let bytes = input.arbitrary::<u64>()?.to_le_bytes();
            driver.poke(at, &bytes);
        }
        _ => rig.move_bar(),
    }
    Ok(())
}

/// Makes a chain available and mostly kicks for it.
fn chain(input: &mut Unstructured<'_>, rig: &mut Rig, driver: &mut Driver) -> Result<()> {
    let (how, shape) = (input.arbitrary::<u8>()?, input.arbitrary::<u8>()?);
    let queue = u16::from(how & 7);
    let mut parts = Vec::new();
    let count = 1 + shape % 6;
    // So many of them are readable.
    let readable = shape / 6 % (count + 1);
    for nth in 0..count {
        let writable = nth >= readable;
        let len = length(input)?;
        let at = if how & 0x10 != 0 { address(input, driver, queue)? } else { driver.buffer(len) };
        if !writable {
            let said = input.bytes(input.len().min(len.min(SAID) as usize))?;
            driver.poke(at, said);
        }
        parts.push((at, len, writable));
    }
    driver.offer(queue, &parts, how & 0x20 != 0);
    if how & 0xc0 != 0 {
        rig.kick(queue);
    }
    Ok(())
}

fn length(input: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match input.arbitrary::<u8>()? {
        wild @ 0xf0.. if wild & 1 == 0 => input.arbitrary()?,
        wild @ 0xf0.. => u32::from(wild) << 8,
        known => LENGTHS[usize::from(known % 16)],
    })
}

/// An address: of a new buffer, near a ring or an end of RAM, or any.
fn address(input: &mut Unstructured<'_>, driver: &mut Driver, queue: u16) -> Result<u64> {
    let [table, available, used, indirect] = driver.landmarks(queue);
    let ends = [table, available, used, indirect, 0, REGIONS[0].1, REGIONS[1].0, END];
    Ok(match input.arbitrary::<u8>()? {
        near @ 0..=0x7f => {
            let by = input.arbitrary::<i8>()?;
            ends[usize::from(near % 8)].wrapping_add_signed(by.into())
        }
        0x80..=0xef => driver.buffer(LENGTHS[12]),
        0xf0..=0xfb => u64::from(input.arbitrary::<u32>()?) % (END + 0x1000),
        _ => input.arbitrary()?,
    })
}

/// Programs that get each device to work.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kind in 0..KINDS {
        for flags in [RECOVERS, RECOVERS | RACING] {
            let mut program = vec![kind, flags, 0];
            program.extend(work(kind));
            program.push(9);
            program.extend(work(kind));
            // Small rings wrap around.
            program.extend([1, 0, 0, 0, 0, 2]);
            (0..6).for_each(|_| program.extend(work(kind)));
            seeds.push(program);
        }
    }
    seeds
}

/// A request or two, as operations.
fn work(kind: u8) -> Vec<u8> {
    const KICK: u8 = 0x40;
    /// Parts, of which so many are readable.
    fn shape(parts: u8, readable: u8) -> u8 {
        parts - 1 + 6 * readable
    }
    match kind {
        0 | 1 => {
            let request = |kind: u8, parts: &[u8]| {
                let shape = if kind == 1 { shape(3, 2) } else { shape(3, 1) };
                [&[3, KICK, shape, 8][..], &[kind, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0], parts].concat()
            };
            let said = [&[11][..], &[7; 80], &[1]].concat();
            [request(0, &[11, 1]), request(1, &said), request(8, &[10, 1])].concat()
        }
        2 => {
            let frame = [&[3, KICK | 1, shape(1, 1), 10][..], &[0; 64]].concat();
            let receive = [3, KICK, shape(1, 0), 13, 7, 10];
            let pairs = [&[3, KICK | 4, shape(2, 1), 2][..], &[4, 0], &[1]].concat();
            [&frame[..], &receive, &[1; 64], &[8], &pairs].concat()
        }
        3 => vec![3, KICK, shape(1, 0), 10],
        4 => {
            let print = [&[3, KICK | 1, shape(1, 1), 8][..], b"0123456789abcdef"].concat();
            let receive = [3, KICK, shape(1, 0), 10, 7, 8];
            [&print[..], &receive, b"0123456789abcdef"].concat()
        }
        5 => {
            // Buffers, a program that connects and speaks, the answers; a connection of the guest's, and data in it.
            let room = [3, KICK, shape(1, 0), 14];
            let say = |packet: Vec<u8>| [&[3, KICK | 1, shape(1, 1), 9][..], &packet].concat();
            let connect = [7, 1 << 4 | 8, b'h', b'e', b'l', b'l', b'o', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let grant = say(packet(2, 1024, 1 << 30));
            let request = say(packet(1, 2000, SERVED));
            let parts = [&room[..], &room, &room, &connect, &grant, &request, &[7, 7 << 4, 7, 2 << 4 | 8], &[1; 16]];
            [&parts.concat()[..], &say(packet(5, 2000, SERVED)), &room, &say(packet(4, 2000, SERVED))].concat()
        }
        _ => {
            // Pages given up and taken back, statistics, and free memory.
            let numbers =
                |queue: u8| [&[3, KICK | queue, shape(1, 1), 8][..], &[0x10, 0, 0, 0, 0x11, 0, 0, 0]].concat();
            let numbers = |queue: u8| [numbers(queue), vec![0x12, 0, 0, 0, 0, 0, 0, 1]].concat();
            let statistics = [&[3, KICK | 2, shape(1, 1), 8, 1, 0][..], &[9; 14]].concat();
            let reports = [3, KICK | 4, shape(2, 0), 14, 14];
            [&numbers(0)[..], &numbers(1), &statistics, &[7, 0x10], &reports, &[7, 1, 5]].concat()
        }
    }
}
