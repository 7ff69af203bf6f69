//! fio in the guest: the jobs, and what it says of one.

use anyhow::{Context, Result, ensure};

/// A kind of load.
pub struct Job {
    /// As in the report.
    pub name: &'static str,
    /// fio's own options.
    options: &'static str,
    /// What its figure counts.
    pub unit: &'static str,
    reads: bool,
}

const IOPS: &str = "IOPS";
/// What is copied, and how fast.
pub const MIB: &str = "MiB/s";

/// What is measured. Requests go straight to the device (`direct=1`), many at a time but for the last job, which asks for
/// every single write to be on the disk.
pub const JOBS: [Job; 5] = [
    Job {
        name: "randread4k",
        options: "--rw=randread --bs=4k --ioengine=libaio --iodepth=32",
        unit: IOPS,
        reads: true,
    },
    Job {
        name: "randwrite4k",
        options: "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=32",
        unit: IOPS,
        reads: false,
    },
    Job { name: "seqread1m", options: "--rw=read --bs=1m --ioengine=libaio --iodepth=4", unit: MIB, reads: true },
    Job { name: "seqwrite1m", options: "--rw=write --bs=1m --ioengine=libaio --iodepth=4", unit: MIB, reads: false },
    Job { name: "fsync4k", options: "--rw=randwrite --bs=4k --ioengine=psync --fsync=1", unit: IOPS, reads: false },
];

const COMMON: &str = "debian fio --name=bench --thread --direct=1 --size=100% --output-format=terse --terse-version=3";

/// The figure is what counts per second, so each run takes the same time.
pub fn measure(job: &Job, device: &str, seconds: u32) -> String {
    format!("{COMMON} --filename={device} {} --time_based --runtime={seconds}", job.options)
}

/// Writes all of a disk in order, then some of it at random, and reads all that back, compared by checksums.
pub fn verify(device: &str) -> [String; 2] {
    let check = "--verify=crc32c --verify_fatal=1 --do_verify=1 --ioengine=libaio";
    [
        format!("{COMMON} --filename={device} {check} --rw=write --bs=1m --iodepth=4"),
        format!("{COMMON} --filename={device} {check} --rw=randwrite --bs=4k --iodepth=32 --io_size=8m"),
    ]
}

/// The job's figure from what fio printed.
pub fn figure(job: &Job, said: &str) -> Result<f64> {
    let ended = parse(said)?;
    let side = if job.reads { ended.read } else { ended.write };
    ensure!(side.kib > 0, "fio moved nothing: {said}");
    Ok(if job.unit == IOPS { side.iops } else { side.kib_per_second / 1024.0 })
}

/// Fails if fio found an error, such as data that are not what was written.
pub fn check(said: &str) -> Result<()> {
    parse(said).map(drop)
}

#[derive(Debug, PartialEq)]
struct Side {
    kib: u64,
    kib_per_second: f64,
    iops: f64,
}

#[derive(Debug, PartialEq)]
struct Ended {
    read: Side,
    write: Side,
}

/// Version 3 of the terse output (fio's HOWTO, "Terse output"): fields with semicolons between. From 0: the version, fio's,
/// the job's name, its group, its error; then for reads, and 41 fields on for writes: KiB, KiB/s, IOPS, milliseconds, ….
fn parse(said: &str) -> Result<Ended> {
    let line = said.lines().find(|l| l.starts_with("3;fio-")).with_context(|| format!("fio gave no result: {said}"))?;
    let fields: Vec<_> = line.split(';').collect();
    let number = |at: usize| -> Result<f64> {
        let text = fields.get(at).with_context(|| format!("fio's result ends before field {at}: {line}"))?;
        text.parse().with_context(|| format!("field {at} of fio's result is '{text}'"))
    };
    ensure!(number(4)? == 0.0, "fio's error {}: {said}", fields[4]);
    let side = |at| {
        Ok::<_, anyhow::Error>(Side { kib: number(at)? as u64, kib_per_second: number(at + 1)?, iops: number(at + 2)? })
    };
    Ok(Ended { read: side(5)?, write: side(46)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terse(error: u32, read: &str, write: &str) -> String {
        let rest = ";0".repeat(37);
        format!("note: x\n3;fio-3.33;bench;0;{error};{read};1000{rest};{write};1000{rest}\n")
    }

    #[test]
    fn figures() {
        let said = terse(0, "4096;2048;512", "0;0;0");
        assert_eq!(figure(&JOBS[0], &said).unwrap(), 512.0);
        assert_eq!(figure(&JOBS[2], &said).unwrap(), 2.0);
        assert!(figure(&JOBS[1], &said).is_err());
        assert_eq!(figure(&JOBS[1], &terse(0, "0;0;0", "8;4;99")).unwrap(), 99.0);
        check(&said).unwrap();
    }

    #[test]
    fn failures() {
        assert!(check(&terse(84, "1;1;1", "1;1;1")).is_err());
        assert!(check("fio: not found").is_err());
        assert!(check("3;fio-3.33;bench;0;0;1").is_err());
    }
}
