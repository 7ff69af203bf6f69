//! Images of QEMU's format, whatever they hold, as disks that a guest reads and writes.
//!
//! An input is an image's length in two bytes, the image, and requests of four bytes each: kind, sector (two) and length. What the
//! image makes imago do is an I/O error at worst; the device goes on.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use civic_devices::virtio::block::{DiskFormat, DiskOptions, SECTOR};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::devices::{Far, open};
use super::driver::{Driver, Plan};
use super::rig::Rig;

/// Requests of one run, at most.
const MOST: usize = 16;

/// Runs one image.
pub fn run(bytes: &[u8]) {
    let _ = play(&mut Unstructured::new(bytes));
}

fn play(input: &mut Unstructured<'_>) -> Result<()> {
    let len: u16 = input.arbitrary()?;
    let mut file = File::from(memfd_create(c"image", MFdFlags::MFD_CLOEXEC).expect("the host has memory"));
    file.write_all(input.bytes(input.len().min(len.into()))?).expect("the host has memory");
    let read_only = len & 1 == 1;
    let disk = match open(&file, DiskOptions { read_only, format: DiskFormat::Qcow2, backing: false }) {
        Ok(disk) => disk,
        Err(error) => {
            drop(error.to_string());
            return Ok(());
        }
    };
    let mut rig = Rig::before(Far::Disk(Arc::new(disk)), false);
    let mut driver = Driver::new(&rig);
    driver.bring_up(&mut rig, Plan::GOOD);
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        let (how, sector): (u8, u16) = (input.arbitrary()?, input.arbitrary()?);
        let sectors = 1 + u32::from(input.arbitrary::<u8>()? % 16);
        request(&mut rig, &mut driver, how, sector.into(), sectors);
    }
    Ok(())
}

fn request(rig: &mut Rig, driver: &mut Driver, how: u8, sector: u64, sectors: u32) {
    // IN, OUT, FLUSH, DISCARD, WRITE_ZEROES, IN.
    let kind = [0_u32, 1, 4, 11, 13, 0][usize::from(how % 6)];
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let len = sectors * SECTOR as u32;
    // One segment; zeroes may unmap.
    let segment =
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &u32::from(how & 0x80 != 0).to_le_bytes()].concat();
    let say = |driver: &mut Driver, bytes: &[u8]| {
        let at = driver.buffer(bytes.len() as u32);
        driver.poke(at, bytes);
        (at, bytes.len() as u32, false)
    };
    let mut parts = vec![say(driver, &header)];
    match kind {
        0 => parts.push((driver.buffer(len), len, true)),
        1 => parts.push(say(driver, &vec![how; len as usize])),
        11 | 13 => parts.push(say(driver, &segment)),
        _ => {}
    }
    let status = driver.buffer(1);
    driver.poke(status, &[0xff]);
    parts.push((status, 1, true));
    driver.offer(0, &parts, false);
    rig.kick(0);
    let answer = driver.peek(status);
    assert!(answer <= 2, "the request's status is {answer}");
}

/// A small image with one cluster of data, read and written in all ways, and one without any.
pub fn seeds() -> Vec<Vec<u8>> {
    let requests: Vec<u8> = (0..12).flat_map(|n| [n | if n & 4 == 0 { 0x80 } else { 0 }, n, 0, n]).collect();
    let seed = |image: &[u8]| [&(image.len() as u16).to_le_bytes()[..], image, &requests].concat();
    vec![seed(&image(3)), seed(&image(2)), seed(&[&image(3)[..], &[0]].concat())]
}

/// Clusters of 512 bytes: header, reference counts' table and block, L1 and L2 table, data (QEMU's docs/interop/qcow2.rst).
fn image(version: u32) -> Vec<u8> {
    let mut bytes = vec![0; 6 * 512];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb");
    for (at, field) in [(4, version), (20, 9), (36, 1), (56, 1), (96, 4), (100, 104)] {
        put(at, &field.to_be_bytes());
    }
    const HERE: u64 = 1 << 63;
    for (at, field) in
        [(24, 64 * 512), (40, 0x600), (48, 0x200), (0x200, 0x400), (0x600, 0x800 | HERE), (0x800, 0xa00 | HERE)]
    {
        put(at, &u64::to_be_bytes(field));
    }
    for cluster in 0..6 {
        put(0x400 + 2 * cluster, &[0, 1]);
    }
    put(0xa00, b"data");
    bytes
}
