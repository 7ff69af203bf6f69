//! Guests forked while they work: what goes on in the source must not notice, and goes on in the child too.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use civic_tests::linux::{STEP, Spec, Vm, run};

use super::limits::SmallFs;
use super::{COUNTS, Echo, KeptConnection, ROOT_IMAGE, SCRATCH_BYTES, check_saved, progress, work, work_tiny};

/// Forks a guest again and again while it writes its disk, watches its clock and holds a TCP connection. Its jobs run on in the child too,
/// and both check what they read.
pub fn tiny(mut spec: Spec, rounds: u32) -> Result<()> {
    let dir = tempfile::tempdir()?;
    spec.more = vec!["--disk".into(), scratch(dir.path())?];
    let mut vm = Vm::start(&spec)?;
    work_tiny(&mut vm)?;
    // The second megabyte from the end is the children's.
    vm.sh("dd if=/tmp/data of=/dev/vda bs=64k seek=992 conv=fsync 2>/dev/null")?;
    let echo = Echo::start((vm.tap.guest, 7000))?;
    let kept =
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=64k skip=992 count=16 2>/dev/null | cmp - /tmp/data";
    for round in 0..rounds {
        let (mut child, report) = fork_round(&mut vm, round).with_context(|| format!("round {round}"))?;
        // What the child does to memory and disk stays in it.
        child
            .sh("echo mine > /tmp/mine; dd if=/dev/zero of=/dev/vda bs=64k seek=992 count=16 conv=fsync 2>/dev/null")?;
        ensure!(vm.sh("ls /tmp/mine 2>/dev/null || true")?.is_empty(), "the source has the child's file");
        vm.sh(kept).context("the child's writes are on the source's disk")?;
        ensure!(child.sh(kept).is_err(), "the child's disk does not keep what it wrote");
        check_saved(&mut child, &spec).with_context(|| format!("the child of round {round}"))?;
        eprintln!("{:?}", report.stages);
        if round == 0 { descend(child, &spec).context("the child's own child")? } else { child.kill()? }
    }
    let lines = echo.finish()?;
    ensure!(lines > rounds, "only {lines} lines went through the connection in {rounds} rounds");
    let bad = vm.sh("cat /tmp/clock.bad /tmp/disk.bad 2>/dev/null || true")?;
    ensure!(bad.is_empty(), "in the source went wrong:\n{bad}");
    vm.check_kernel_log()?;
    vm.stop()
}

/// Forks a fork, which ends then: its child has its memory and disk as they were, goes on alone, and starts anew on its disk.
fn descend(mut child: Vm, spec: &Spec) -> Result<()> {
    const FIRST: &str = "dd if=/dev/vda bs=64k skip=992 count=8 2>/dev/null | md5sum";
    const SECOND: &str = "dd if=/dev/vda bs=64k skip=1000 count=8 2>/dev/null | md5sum";
    child.sh("dd if=/tmp/data of=/dev/vda bs=64k seek=992 count=8 conv=fsync 2>/dev/null")?;
    let (first, second) = (child.sh(FIRST)?, child.sh(SECOND)?);
    let (mut grandchild, report) = fork_round(&mut child, 100)?;
    ensure!(report.generation == 1, "{report:?}");
    ensure!(grandchild.sh("cat /tmp/mine")? == "mine", "the child's file is not in its child");
    // From now on each writes for itself.
    child.sh(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/zero of=/dev/vda bs=64k seek=992 count=8 conv=fsync 2>/dev/null",
    )?;
    grandchild.sh("echo 3 > /proc/sys/vm/drop_caches; dd if=/tmp/data of=/dev/vda bs=64k seek=1000 count=8 conv=fsync 2>/dev/null")?;
    ensure!(grandchild.sh(FIRST)? == first, "the grandchild's disk has what its parent wrote after the fork");
    ensure!(child.sh(SECOND)? == second, "the child's disk has what its own child wrote");
    check_saved(&mut grandchild, spec)?;
    child.kill()?;
    check_saved(&mut grandchild, spec).context("after its parent's end")?;
    let before = grandchild.sh(&format!("{FIRST}; {SECOND}"))?;
    grandchild.reboot().context("a fork of a fork resets")?;
    ensure!(grandchild.sh(&format!("{FIRST}; {SECOND}"))? == before, "after the reset the disk holds something else");
    ensure!(grandchild.sh("ls /tmp")?.is_empty(), "memory survived the reset");
    grandchild.kill()
}

/// Forks the guest; its jobs make progress in both from then on.
fn fork_round(vm: &mut Vm, round: u32) -> Result<(Vm, civic_api::ForkReport)> {
    let (mut child, report) = vm.fork(&format!("child{round}"))?;
    for vm in [vm, &mut child] {
        let before = vm.sh(COUNTS)?;
        progress(vm, &before)?;
    }
    Ok((child, report))
}

/// [`tiny`] with systemd, a file system on the disk, and nginx keeping a connection with the source.
pub fn debian(spec: &Spec, rounds: u32) -> Result<()> {
    let _alone = ROOT_IMAGE.lock().unwrap_or_else(|e| e.into_inner());
    let mut vm = Vm::start(spec)?;
    work(&mut vm)?;
    let mut nginx = KeptConnection::open(vm.tap.guest)?;
    nginx.get()?;
    for round in 0..rounds {
        let (mut child, report) = fork_round(&mut vm, round).with_context(|| format!("round {round}"))?;
        nginx.get().with_context(|| format!("nginx after round {round}"))?;
        let page = child.sh("curl -sS http://127.0.0.1/")?;
        ensure!(page.contains("nginx in a Civic guest"), "the child's nginx serves {page:?}");
        check_saved(&mut child, spec).with_context(|| format!("the child of round {round}"))?;
        child.kill()?;
        eprintln!("{:?}", report.stages);
    }
    let bad = vm.sh("cat /tmp/clock.bad /tmp/disk.bad 2>/dev/null || true")?;
    ensure!(bad.is_empty(), "in the source went wrong:\n{bad}");
    vm.check_kernel_log()?;
    vm.stop()
}

/// Forks a guest whose vCPUs are all busy with the disk, again and again; each child does the same work for a moment. It was here that
/// sources were corrupted while guests were offered asynchronous page faults.
pub fn often(mut spec: Spec, rounds: u32) -> Result<()> {
    const JOBS: u32 = 3;
    let dir = tempfile::tempdir()?;
    spec.more = vec!["--disk".into(), scratch(dir.path())?];
    let mut vm = Vm::start(&spec)?;
    vm.sh("dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null")?;
    for job in 0..JOBS {
        let (first, sectors) = (job * 300, job * 300 * 16);
        vm.sh(&format!(
            "(n=0; while :; do \
             dd if=/tmp/data of=/dev/vda bs=64k seek=$(({first} + n % 30 * 8)) conv=fsync 2>/dev/null || echo write $n >> /tmp/disk.bad; \
             echo 3 > /proc/sys/vm/drop_caches; \
             dd if=/dev/vda bs=4k skip=$(({sectors} + n % 30 * 128)) count=128 2>/dev/null | cmp -s - /tmp/data || echo read $n >> /tmp/disk.bad; \
             n=$((n + 1)); echo $n > /tmp/disk.now{job}; done) & true"
        ))?;
    }
    for round in 0..rounds {
        let (child, report) = vm.fork(&format!("child{round}")).with_context(|| format!("round {round}"))?;
        eprintln!("{round} {:?}", report.stages);
        // It works until then: there is nothing to wait for.
        std::thread::sleep(Duration::from_millis(1500));
        child.kill()?;
        if round % 5 == 0 {
            let counts = "cat /tmp/disk.now*";
            let before = vm.sh(counts)?;
            let further = format!("until [ \"$({counts})\" != '{before}' ]; do sleep 1; done");
            vm.sh(&further).with_context(|| format!("the guest stands still in round {round}"))?;
        }
    }
    let bad = vm.sh("cat /tmp/disk.bad 2>/dev/null || true")?;
    ensure!(bad.is_empty(), "in the source went wrong:\n{bad}");
    vm.check_kernel_log()?;
    vm.stop()
}

/// A fork that cannot live any more, for want of room or of memory, ends and its source says why; the source itself does not notice.
pub fn limits(mut spec: Spec) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let small = SmallFs::mount(dir.path().join("small"), "2m")?;
    let store = format!("dir={}", small.0.display());
    spec.more = vec!["--disk".into(), scratch(dir.path())?, "--forks".into(), store.clone()];
    let mut vm = Vm::start(&spec)?;
    work_tiny(&mut vm)?;

    // The source overwrites more of its disk than can be kept of it. What has only zeroes needs no room.
    const OVERWRITE: &str = "for n in 0 1 2 3; do dd if=/tmp/data of=/dev/vda bs=64k seek=$((800 + n * 16)) count=16 conv=fsync; done 2>/dev/null";
    vm.sh(OVERWRITE)?;
    let child = vm.fork("unkept")?.0;
    vm.sh(OVERWRITE)?;
    ends(&mut vm, child, "what disk 'scratch' held at the fork is lost")?;

    // The child touches more memory than its monitor may have.
    let cgroup = Cgroup::new("16M")?;
    let mut child = vm.fork("limited")?.0;
    cgroup.take(child.info()?.pid)?;
    child.begin("dd if=/dev/zero of=/tmp/big bs=1M count=32")?;
    ends(&mut vm, child, "a child")?;
    ensure!(cgroup.kills()? > 0, "its memory was not limited");

    // Without the limits it would have lived.
    run("mount", &["-o", "remount,size=128m", &store["dir=".len()..]])?;
    let mut child = vm.fork("free")?.0;
    child.sh("dd if=/dev/zero of=/tmp/big bs=1M count=32")?;
    check_saved(&mut child, &spec)?;
    child.kill()?;
    let before = vm.sh(COUNTS)?;
    progress(&mut vm, &before)?;
    let bad = vm.sh("cat /tmp/clock.bad /tmp/disk.bad 2>/dev/null || true")?;
    ensure!(bad.is_empty(), "in the source went wrong:\n{bad}");
    vm.check_kernel_log()?;
    vm.stop()
}

/// Waits until this child is no more, and checks what its source says of it and that it works on.
fn ends(vm: &mut Vm, child: Vm, why: &str) -> Result<()> {
    let deadline = Instant::now() + STEP;
    while vm.info()?.family.children.iter().any(|known| known.name == child.name) {
        ensure!(Instant::now() < deadline, "'{}' does not end", child.name);
        std::thread::sleep(Duration::from_millis(100));
    }
    let log = std::fs::read_to_string(vm.dir().join("vmm.log"))?;
    let told = log.lines().rfind(|line| line.contains(why)).with_context(|| format!("it does not say why:\n{log}"))?;
    eprintln!("{told}");
    // Whatever it has left goes.
    let _ = child.civic(&["kill"]);
    let before = vm.sh(COUNTS)?;
    progress(vm, &before)
}

/// A control group of the host's that limits memory; removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(memory: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        std::fs::write(root.join("cgroup.subtree_control"), "+memory")
            .context("no cgroup v2 with a memory controller")?;
        let this = Self(root.join(format!("civic-test-{}", std::process::id())));
        std::fs::create_dir(&this.0)?;
        std::fs::write(this.0.join("memory.max"), memory)?;
        // Where there is no swap there is no such file.
        let _ = std::fs::write(this.0.join("memory.swap.max"), "0");
        Ok(this)
    }

    /// What the process has already stays another group's.
    fn take(&self, pid: u32) -> Result<()> {
        Ok(std::fs::write(self.0.join("cgroup.procs"), pid.to_string())?)
    }

    /// How many processes were killed for want of memory.
    fn kills(&self) -> Result<u32> {
        let events = std::fs::read_to_string(self.0.join("memory.events"))?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill ")).context("no count of kills")?;
        Ok(kills.trim().parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + STEP;
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// An empty disk image in `dir`: the value for `--disk`.
pub fn scratch(dir: &Path) -> Result<String> {
    let path = dir.join("scratch.img");
    File::create(&path)?.set_len(SCRATCH_BYTES)?;
    Ok(format!("path={},id=scratch", path.display()))
}
