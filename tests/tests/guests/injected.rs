//! Programs that are started in forks of stock guests, from outside: nothing in the guest helps, and nothing of it is left behind.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use civic_api::{GuestChecksums, GuestKernel};
use civic_tests::linux::{COMPLAINTS, Spec, Tap, Vm, run};

/// Bytes that go into a program and come back: more than fits in all buffers on the way.
const MUCH: usize = 700_000;
const STORE_BYTES: u64 = 64 << 20;
/// Programs in each of many forks, one after the other: each is brought in anew, at another moment, and all of it taken away again.
const PROGRAMS: u32 = 4;
/// Of so many of the forks, one is looked at wholly, which takes as long as three starts.
const WHOLE: u32 = 4;
/// Not zero when a kernel has complained, or worse.
const TAINT: &str = "cat /proc/sys/kernel/tainted";

/// What the monitor finds out about a guest's kernel is true; programs run in a fork as they would in the guest, and then in as many
/// forks as `forks`, each at another moment.
pub fn tiny(spec: &Spec, forks: u32) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    let found_us = examined(&mut vm)?;
    let refused = vm.exec(&[], &["/bin/true"], b"")?;
    ensure!(refused.status.code() == Some(125), "a program was started in a VM that is no fork: {refused:?}");
    let (mut child, _) = vm.fork("child")?;
    programs(&mut child)?;
    with_files(&child).context("with a System.map")?;
    copies(&mut child).context("copying")?;
    child.check_kernel_log()?;
    frozen(&mut child).context("with the guest frozen")?;
    copied_frozen(&child).context("copying with the guest frozen")?;
    child.kill()?;
    in_many(&mut vm, forks, found_us)?;
    vm.stop()
}

/// Programs in as many forks as `forks`, [`PROGRAMS`] in each.
pub fn often(spec: &Spec, forks: u32) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    let found_us = examined(&mut vm)?;
    in_many(&mut vm, forks, found_us)?;
    vm.stop()
}

/// Programs in many forks, each at another moment; finding the kernel of the source took `found_us`.
fn in_many(vm: &mut Vm, forks: u32, found_us: u64) -> Result<()> {
    let before = sums(vm)?;
    // Busy now and then, so that forks find its vCPUs in programs, in the kernel and asleep.
    vm.sh("(while :; do dd if=/dev/urandom of=/dev/null bs=64k count=9 2>/dev/null; cat /proc/*/stat > /dev/null 2>&1; usleep 70000; done) & true")?;
    let taint = vm.sh(TAINT)?;
    let mut least_us = u64::MAX;
    let mut once = |n: u32| -> Result<()> {
        let (mut child, _) = vm.fork_unasked(&format!("child{n}"), &[])?;
        for program in 0..PROGRAMS {
            let find_us = again(&child, n * PROGRAMS + program, &taint)?;
            least_us = least_us.min(find_us);
        }
        if n.is_multiple_of(WHOLE) {
            let after = sums(&child)?;
            ensure!(after == before, "the kernel was {before:?}, and is {after:?}");
            child.check_kernel_log()?;
        }
        child.kill()
    };
    for n in 0..forks {
        once(n).with_context(|| format!("fork {n}"))?;
    }
    ensure!(least_us < found_us / 5, "no fork knew the kernel of its source: {least_us} us of {found_us} to find it");
    ensure!(sums(vm)? == before, "the source's kernel has changed");
    vm.check_kernel_log()
}

/// Gives how long it took to find the kernel, in microseconds.
fn examined(vm: &mut Vm) -> Result<u64> {
    let kernel = vm.guest()?;
    let release = vm.sh("uname -r")?;
    ensure!(kernel.release.as_deref() == Some(&release), "{:?}, but it is {release}", kernel.release);
    ensure!(kernel.version.as_deref() == Some(&vm.sh("uname -v")?), "{:?}", kernel.version);
    let text = vm.sh("grep ' _text$' /proc/kallsyms")?;
    let base = kernel.image.base.trim_start_matches("0x").to_owned();
    ensure!(text.starts_with(&base), "the image is said to be at {base}, and is at {text}");
    let count = vm.sh("grep -vc '\\[' /proc/kallsyms")?;
    let found = match &kernel.symbols {
        civic_api::Finding::Found(symbols) => symbols.count.to_string(),
        civic_api::Finding::Missing(why) => why.clone(),
    };
    ensure!(found == count, "{found} symbols were found, and it has {count}");
    eprintln!("found in {} us, stopped for {}", kernel.took_us, kernel.stopped_us);
    Ok(kernel.took_us)
}

fn sums(vm: &Vm) -> Result<GuestChecksums> {
    let kernel: GuestKernel = vm.guest()?;
    kernel.checksums.context("no checksums")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn expect(out: &Output, status: i32, stdout: &str, stderr: &str) -> Result<()> {
    let told = (out.status.code(), text(&out.stdout), text(&out.stderr));
    ensure!(told == (Some(status), stdout.into(), stderr.into()), "{told:?}");
    Ok(())
}

fn programs(child: &mut Vm) -> Result<()> {
    let before = sums(child)?;
    expect(&child.exec(&[], &["/bin/echo", "a b", "c"], b"")?, 0, "a b c\n", "")?;
    let script = "echo out; echo err >&2; exit 7";
    expect(&child.exec(&[], &["/bin/sh", "-c", script], b"")?, 7, "out\n", "err\n")?;
    let script = "echo $A $(pwd) $(id -u)";
    let out = child.exec(&["--env", "A=b", "--workdir", "/proc"], &["sh", "-c", script], b"")?;
    expect(&out, 0, "b /proc 0\n", "")?;
    expect(&child.exec(&[], &["/bin/sh", "-c", "kill -9 $$"], b"")?, 128 + 9, "", "")?;
    for (program, status) in [("/bin/nothing", 127), ("/proc/version", 126)] {
        let out = child.exec(&[], &[program], b"")?;
        ensure!(out.status.code() == Some(status), "{program}: {out:?}");
        ensure!(text(&out.stderr).contains(program), "{out:?}");
    }
    let much: Vec<u8> = (0..MUCH).map(|n| (n * 7 / 3) as u8).collect();
    let back = child.exec(&[], &["/bin/cat"], &much).context("much input")?;
    ensure!(back.status.success() && back.stdout == much, "{} of {MUCH} bytes came back", back.stdout.len());
    let out = child.exec(&["--timeout", "1"], &["/bin/sleep", "1000"], b"")?;
    ensure!(out.status.code() == Some(124), "{out:?}");
    let after = sums(child)?;
    ensure!(after == before, "the kernel was {before:?}, and is {after:?}");
    ensure!(
        child.sh("grep civic /proc/mounts /proc/*/cmdline 2>/dev/null | grep -v grep || true")?.is_empty(),
        "something is left"
    );
    Ok(())
}

/// A System.map is believed, and one of another kernel is not.
fn with_files(child: &Vm) -> Result<()> {
    let out = child.exec(&[], &["/bin/grep", "-v", "\\[", "/proc/kallsyms"], b"")?;
    let dir = tempfile::tempdir()?;
    let map = dir.path().join("System.map");
    fs::write(&map, &out.stdout)?;
    let path = map.display().to_string();
    let kernel: GuestKernel =
        serde_json::from_str(&child.civic(&["info", "--guest", "--json", "--system-map", &path])?)?;
    let told: Vec<_> = kernel.files.iter().map(|file| (file.file.as_str(), file.count)).collect();
    let count = text(&out.stdout).lines().count() as u64;
    ensure!(told == [("System.map", count)], "{told:?}, and there are {count}");
    expect(&child.exec(&["--system-map", &path], &["/bin/echo", "there"], b"")?, 0, "there\n", "")?;
    // All functions a little further on.
    let moved = |line: &str| match line.split_once(' ') {
        Some((at, rest)) if !rest.ends_with(" _text") => {
            format!("{:016x} {rest}\n", u64::from_str_radix(at, 16).unwrap_or_default().wrapping_add(0x40))
        }
        _ => format!("{line}\n"),
    };
    fs::write(&map, text(&out.stdout).lines().map(moved).collect::<String>())?;
    let refused = child.exec(&["--system-map", &path], &["/bin/echo", "there"], b"")?;
    let said = text(&refused.stderr);
    ensure!(refused.status.code() == Some(125) && said.contains("another kernel's"), "{refused:?}");
    Ok(())
}

/// Folders and files go in and out as they are, by nothing that the guest has.
fn copies(child: &mut Vm) -> Result<()> {
    let before = sums(child)?;
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).to_str().map(str::to_owned).context("a path of ours is UTF-8");
    let long = "more than a header has a place for ".repeat(5);
    let binary: Vec<u8> = (0..MUCH).map(|n| (n * n / 7) as u8).collect();
    let deep = Path::new("deep").join(&long).join(&long);
    fs::create_dir_all(dir.path().join("in/deep").join(&long))?;
    fs::write(dir.path().join("in").join(&deep), "long\n")?;
    fs::write(dir.path().join("in/binary"), &binary)?;
    fs::set_permissions(dir.path().join("in/binary"), Permissions::from_mode(0o751))?;
    symlink("../binary", dir.path().join("in/deep/link"))?;

    let report: serde_json::Value = serde_json::from_str(&child.cp(&["--json"], &path("in")?, ":/tmp/copied")?)?;
    ensure!(report["files"] == 3 && report["bytes"] == MUCH + "long\n".len(), "{report}");
    let sum = text(&child.exec(&[], &["sha256sum"], &binary)?.stdout).replace('-', "binary");
    let script =
        "cd /tmp/copied; sha256sum binary; cat deep/*/*; readlink deep/link; stat -c '%a %u' binary; ls -A | wc -l";
    let out = child.exec(&[], &["/bin/sh", "-c", script], b"")?;
    expect(&out, 0, &format!("{sum}long\n../binary\n751 0\n2\n"), "")?;

    child.cp(&[], ":/tmp/copied/.", &path("out")?)?;
    let out = |path: &Path| fs::read(dir.path().join("out").join(path));
    ensure!(out(Path::new("binary"))? == binary && out(&deep)? == b"long\n", "what came back is something else");
    ensure!(
        dir.path().join("out/deep/link").read_link()? == Path::new("../binary"),
        "the link came back as something else"
    );
    let (went, came) = (dir.path().join("in/binary").metadata()?, dir.path().join("out/binary").metadata()?);
    ensure!((went.mode(), went.modified()?) == (came.mode(), came.modified()?), "{went:?}, {came:?}");
    child.cp(&[], ":/bin/busybox", &path("out")?)?;
    let size = text(&child.exec(&[], &["stat", "-c", "%s", "/bin/busybox"], b"")?.stdout);
    ensure!(out(Path::new("busybox"))?.len().to_string() == size.trim(), "it has {size}");
    let refused = child.cp(&[], ":/no/such", &path("out")?).err().context("what is not there was copied")?;
    ensure!(format!("{refused:#}").contains("/no/such: no such file or folder"), "{refused:#}");
    child.exec(&[], &["rm", "-r", "/tmp/copied"], b"")?;
    let after = sums(child)?;
    ensure!(after == before, "the kernel was {before:?}, and is {after:?}");
    Ok(())
}

/// While it runs, nothing of the guest does; afterwards all does. The console's shell may not be ours any more: whoever waits for it has
/// seen it stop.
fn frozen(child: &mut Vm) -> Result<()> {
    // Appended: what truncates a file may stand still before it writes.
    child.sh(
        "(while :; do echo >> /tmp/counts; usleep 20000; done) & until [ -s /tmp/counts ]; do usleep 20000; done",
    )?;
    let counts = "wc -l < /tmp/counts; sleep 1; wc -l < /tmp/counts";
    let out = child.exec(&["--freeze"], &["/bin/sh", "-c", counts], b"")?;
    let seen = text(&out.stdout);
    let (first, second) = seen.trim().split_once('\n').with_context(|| format!("{out:?}"))?;
    ensure!(first == second, "the guest counted from {first} to {second} while it was frozen");
    let out = child.exec(&[], &["/bin/sh", "-c", counts], b"")?;
    let moved = text(&out.stdout);
    let (first, second) = moved.trim().split_once('\n').with_context(|| format!("{out:?}"))?;
    ensure!(first != second, "the guest stands still since it was frozen");
    Ok(())
}

/// What is written in step is copied in step, though there is much between; afterwards the writing goes on.
fn copied_frozen(child: &Vm) -> Result<()> {
    let sh = |script: &str| expect(&child.exec(&[], &["/bin/sh", "-c", script], b"")?, 0, "", "");
    sh(
        "mkdir /tmp/steps && cd /tmp/steps && : > a && dd if=/dev/zero of=between bs=1M count=2 2>/dev/null && : > b && \
        { (exec > /dev/null 2>&1; while :; do echo >> a; echo >> b; done) & } && \
        until [ -s b ]; do usleep 20000; done",
    )?;
    let dir = tempfile::tempdir()?;
    let to = dir.path().join("steps");
    child.cp(&["--freeze"], ":/tmp/steps", to.to_str().context("a path of ours is UTF-8")?)?;
    let [a, b] = ["a", "b"].map(|name| to.join(name).metadata().map(|meta| meta.len()));
    let (a, b) = (a?, b?);
    ensure!(b > 0 && (a == b || a == b + 1), "{a} and {b} steps were copied");
    sh("cd /tmp/steps; n=$(wc -c < b); until [ $(wc -c < b) -gt $n ]; do usleep 20000; done")
}

/// Starts a program that looks whether the kernel complained: the code that started it is gone by then. Gives how long it took to find the
/// kernel, in microseconds.
fn again(child: &Vm, n: u32, taint: &str) -> Result<u64> {
    let script = format!("echo program {n}; {TAINT}; {COMPLAINTS}");
    let out = child.exec(&["--stages"], &["/bin/sh", "-c", &script], b"")?;
    let expected = format!("program {n}\n{taint}\n");
    ensure!(out.status.success() && text(&out.stdout) == expected, "{out:?}");
    eprint!("{}", text(&out.stderr));
    let stages: serde_json::Value = serde_json::from_slice(&out.stderr).context("what took how long")?;
    stages["inject"]["find_us"].as_u64().context("how long it took to find the kernel is missing")
}

/// A guest whose vCPUs do not come to start anything is told of, within the time.
pub fn wedged(spec: &Spec) -> Result<()> {
    let vm = Vm::start(spec)?;
    let (child, _) = vm.fork("child")?;
    child.civic(&["pause"])?;
    let refused = child.exec(&[], &["/bin/true"], b"")?;
    ensure!(text(&refused.stderr).contains("paused"), "{refused:?}");
    child.civic(&["resume"])?;
    // Finding the kernel has a time of its own, which is not what this is about.
    expect(&child.exec(&[], &["/bin/echo", "found"], b"")?, 0, "found\n", "")?;
    // Some task may come by its scheduler just when it is looked at.
    let until = Instant::now() + TRIED[0];
    let (begun, late) = loop {
        let (begun, late) = (Instant::now(), child.exec(&["--wait", "0"], &["/bin/true"], b"")?);
        if !late.status.success() || begun > until {
            break (begun, late);
        }
    };
    ensure!(late.status.code() == Some(125), "{late:?}");
    ensure!(text(&late.stderr).contains("vCPU 0 is"), "{late:?}");
    ensure!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
    // And the next one is none the worse for it.
    expect(&child.exec(&[], &["/bin/echo", "there"], b"")?, 0, "there\n", "")?;
    child.kill()?;
    vm.stop()
}

/// Where a tracer has the place at the scheduler's entry, a trap stands over its call instead.
pub fn traced(spec: &Spec) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    vm.sh(
        "mount -t tracefs trace /mnt && echo schedule > /mnt/set_ftrace_filter && echo function > /mnt/current_tracer",
    )?;
    let (mut child, _) = vm.fork("child")?;
    let before = sums(&child)?;
    for round in 0..5 {
        let word = format!("round {round}");
        expect(&child.exec(&[], &["/bin/echo", &word], b"")?, 0, &format!("{word}\n"), "")?;
    }
    ensure!(sums(&child)? == before, "the kernel has changed");
    let seen = child.sh("grep -c ' schedule ' /mnt/trace")?;
    ensure!(seen.parse::<u64>()? > 0, "the tracer has seen {seen}");
    child.check_kernel_log()?;
    child.kill()?;
    vm.stop()
}

/// Where its owner has allowed it, what was tried in a fork is brought to its source, beside its forks.
pub fn allowed(spec: &Spec) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    let before = sums(&vm)?;
    let (mut child, _) = vm.fork("child")?;
    let fix = ["/bin/sh", "-c", "echo 17 > /proc/sys/vm/swappiness; cat /proc/sys/vm/swappiness"];
    expect(&child.exec(&[], &fix, b"")?, 0, "17\n", "")?;
    ensure!(vm.sh("cat /proc/sys/vm/swappiness")? == "60", "what was done in the fork is to be seen in its source");
    expect(&vm.exec(&[], &fix, b"")?, 0, "17\n", "")?;
    ensure!(vm.sh("cat /proc/sys/vm/swappiness")? == "17", "nothing was done");
    ensure!(sums(&vm)? == before && sums(&child)? == before, "a kernel has changed");
    // The fork lives on, and the source can be forked again.
    child.sh("echo there")?;
    let (mut second, _) = vm.fork("second")?;
    ensure!(second.sh("cat /proc/sys/vm/swappiness")? == "17", "the fork is another than its source");
    for vm in [&mut vm, &mut child, &mut second] {
        vm.check_kernel_log()?;
    }
    second.kill()?;
    child.kill()?;
    vm.stop()
}

/// Where the kernel lets no program use ports, the loader is heard nevertheless.
pub fn locked_down(spec: &Spec) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    vm.sh(
        "mount -t securityfs security /mnt && echo integrity > /mnt/lockdown && grep '\\[integrity\\]' /mnt/lockdown",
    )?;
    let (mut child, _) = vm.fork("child")?;
    let before = sums(&child)?;
    for round in 0..3 {
        let word = format!("round {round}");
        expect(&child.exec(&[], &["/bin/echo", &word], b"")?, 0, &format!("{word}\n"), "")?;
    }
    let much: Vec<u8> = (0..MUCH).map(|n| (n * 5 / 3) as u8).collect();
    let back = child.exec(&[], &["/bin/cat"], &much).context("much input")?;
    ensure!(back.status.success() && back.stdout == much, "{} of {MUCH} bytes came back", back.stdout.len());
    let denied = child.sh("dmesg | grep -c 'raw io port access is restricted'")?;
    ensure!(denied.parse::<u32>()? > 0, "ports were not forbidden");
    ensure!(sums(&child)? == before, "the kernel has changed");
    child.check_kernel_log()?;
    child.kill()?;
    vm.stop()
}

/// What is wrong in a guest.
enum Wrong {
    /// What this command of its shell does.
    Command(&'static str),
    /// The vCPUs of this mask are busy with something that leaves no time for anything else.
    Taken(u8),
}

/// What is to come of it.
enum Outcome {
    /// A program runs nevertheless.
    Runs,
    /// It runs, or Civic says one of these.
    RunsOr(&'static [&'static str]),
    /// Civic says one of these.
    Says(&'static [&'static str]),
}

/// How long programs are tried in a guest that is about to go wrong: where it must, and where it need not.
const TRIED: [Duration; 2] = [Duration::from_secs(90), Duration::from_secs(10)];
/// All but a few megabytes of a guest's memory, in files.
const FILL: &str = "echo -1000 > /proc/$$/oom_score_adj; dd if=/dev/zero of=/full bs=64k 2>/dev/null; \
    until [ $(grep MemAvailable /proc/meminfo | tr -dc 0-9) -lt 4000 ]; do dd if=/dev/zero bs=64k count=4 >> /tmp/full 2>/dev/null || break; done";
const NO_PROCESS: &str = "echo 400 > /proc/sys/kernel/pid_max; \
    (n=0; while [ $n -lt 400 ]; do sleep 1000 & n=$((n + 1)); done) 2>/dev/null; :";
const STOPPED: &str =
    "for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p = $$ ] || [ $p = 1 ] || kill -STOP $p 2>/dev/null; done; :";

/// Guests in which something is wrong, each in a fork of its own: a program runs nevertheless, or what keeps it from that is named in time.
pub fn broken(spec: &Spec) -> Result<()> {
    let cases = [
        ("no shell", Wrong::Command("/tmp/busybox rm -f /bin/*; :"), Outcome::Runs),
        ("a root that is read-only", Wrong::Command("mount -o remount,ro /"), Outcome::Runs),
        ("a full root", Wrong::Command("dd if=/dev/zero of=/full bs=64k 2>/dev/null; :"), Outcome::Runs),
        ("no memory", Wrong::Command(FILL), Outcome::RunsOr(&["memory"])),
        ("no process left", Wrong::Command(NO_PROCESS), Outcome::RunsOr(&["no process left", "starts no process"])),
        ("processes stopped", Wrong::Command(STOPPED), Outcome::Runs),
        ("one of two processors taken", Wrong::Taken(1), Outcome::RunsOr(&["vCPU 0 is in a program"])),
    ];
    in_each(spec, &cases)
}

/// The same where real-time processes take all processors, of a kernel that lets them (before 6.12's deadline server).
pub fn starved(spec: &Spec) -> Result<()> {
    let words = &["vCPU 0 is in a program", "does not end", "says nothing"];
    in_each(spec, &[("all processors taken", Wrong::Taken(3), Outcome::Says(words))])
}

fn in_each(spec: &Spec, cases: &[(&str, Wrong, Outcome)]) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    // What is to run when the others are gone. And real-time processes may take all of a processor's time.
    vm.sh("cp /bin/busybox /tmp/busybox && echo 'while :; do :; done' > /tmp/hog && echo -1 > /proc/sys/kernel/sched_rt_runtime_us")?;
    for (n, (what, wrong, outcome)) in cases.iter().enumerate() {
        let (mut child, _) = vm.fork(&format!("child{n}"))?;
        break_it(&mut child, wrong).with_context(|| format!("making {what}"))?;
        let (mut begun, mut out) = echo(&child, wrong)?;
        // Those that take processors begin after a while.
        let [must, may] = TRIED.map(|long| Instant::now() + long);
        let until = if matches!(outcome, Outcome::Says(_)) { must } else { may };
        while matches!(wrong, Wrong::Taken(_)) && out.status.success() && Instant::now() < until {
            (begun, out) = echo(&child, wrong)?;
        }
        let (said, ran) = (text(&out.stderr), out.status.success() && out.stdout == b"there\n");
        eprintln!("{what}: {} ({:.1} s)", if ran { "it runs" } else { said.trim() }, begun.elapsed().as_secs_f64());
        let told = |words: &[&str]| out.status.code() == Some(125) && words.iter().any(|word| said.contains(word));
        let good = match outcome {
            Outcome::Runs => ran,
            Outcome::RunsOr(words) => ran || told(words),
            Outcome::Says(words) => told(words),
        };
        ensure!(good, "{what}: {out:?}");
        ensure!(begun.elapsed() < Duration::from_secs(120), "{what}: it took {:?}", begun.elapsed());
        child.kill()?;
    }
    vm.check_kernel_log()?;
    vm.stop()
}

fn echo(child: &Vm, wrong: &Wrong) -> Result<(Instant, Output)> {
    let (begun, wait) = (Instant::now(), if matches!(wrong, Wrong::Taken(_)) { "10" } else { "60" });
    Ok((begun, child.exec(&["--wait", wait, "--timeout", "60"], &["/tmp/busybox", "echo", "there"], b"")?))
}

fn break_it(child: &mut Vm, wrong: &Wrong) -> Result<()> {
    match wrong {
        Wrong::Command(command) => child.sh(command).map(drop),
        Wrong::Taken(mask) => {
            // Later: or who starts them would not hear of its own end.
            let hogs = (0..2).filter(|n| mask & 1 << n != 0);
            let hogs =
                hogs.map(|n| format!("(sleep 2; taskset {:x} sh /tmp/hog) < /dev/null > /dev/null 2>&1 &", 1 << n));
            let script = hogs.collect::<Vec<_>>().join(" ");
            expect(&child.exec(&["--realtime", "50"], &["/bin/sh", "-c", &script], b"")?, 0, "", "")
        }
    }
}

/// A store in `dir`: a busybox and a note.
pub fn store(dir: &Path) -> Result<PathBuf> {
    let (tree, image) = (dir.join("tree"), dir.join("store.img"));
    fs::create_dir_all(tree.join("tools"))?;
    fs::copy("/bin/busybox", tree.join("tools/busybox"))?;
    fs::write(tree.join("note"), "of the store\n")?;
    File::create(&image)?.set_len(STORE_BYTES)?;
    let path = |path: &Path| path.display().to_string();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &path(&tree), &path(&image)])?;
    Ok(image)
}

/// A program of a store, with a card, a terminal, a user and a priority of its own, beside others.
pub fn equipped(spec: &Spec) -> Result<()> {
    let vm = Vm::start(spec)?;
    let dir = tempfile::tempdir()?;
    let tap = Tap::new()?;
    let (store, net) = (store(dir.path())?.display().to_string(), format!("tap={},id=own", tap.name));
    let (mut child, _) = vm.fork_with("child", &["--store", &store, "--net", &net])?;

    let sh = |script: &'static str| ["/tools/busybox", "sh", "-c", script];
    let seen = "/tools/busybox cat /note /guest/www/index.html; echo kept > /kept";
    expect(&child.exec(&[], &sh(seen), b"")?, 0, "of the store\nhello from the tiny guest\n", "")?;
    let seen = "/tools/busybox cat /kept; [ -e /tools ] || echo and no tools";
    let out = child.exec(&["--root", "guest"], &["/bin/sh", "-c", "cat /www/index.html; ls /tools"], b"")?;
    ensure!(text(&out.stdout) == "hello from the tiny guest\n" && !out.status.success(), "{out:?}");
    expect(&child.exec(&[], &sh(seen), b"")?, 0, "kept\n", "")?;
    // proc(5): niceness, real-time priority and policy of itself.
    let seen = "/tools/busybox id -u; /tools/busybox id -g; /tools/busybox cut -d ' ' -f 19,40,41 /proc/self/stat";
    expect(&child.exec(&["--user", "33:34", "--realtime", "7"], &sh(seen), b"")?, 0, "33\n34\n0 7 1\n", "")?;
    expect(&child.exec(&["--nice", "-5"], &sh(seen), b"")?, 0, "0\n0\n-5 0 0\n", "")?;

    // Its card leads somewhere, and the other one is down.
    let ip = format!("own={}/24,gw={}", tap.guest, tap.host);
    let script = format!("/tools/busybox ping -c 2 -W 20 {} > /dev/null && /tools/busybox ip route", tap.host);
    let out = child.exec(&["--ip", &ip], &["/tools/busybox", "sh", "-c", &script], b"")?;
    ensure!(out.status.success(), "{out:?}");
    ensure!(text(&out.stdout).contains(&format!("default via {}", tap.host)), "{out:?}");
    run("ping", &["-c", "2", "-i", "0.2", "-W", "20", &tap.guest.to_string()])?;
    ensure!(child.sh("cat /sys/class/net/eth0/flags")? == "0x1002", "the source's card is up in the fork");
    let out = child.exec(&["--ip", "none=10.0.0.2/24"], &sh("true"), b"")?;
    ensure!(out.status.code() == Some(125) && text(&out.stderr).contains("it has: net0, own"), "{out:?}");

    // A terminal has a size, and what is typed is echoed.
    let command = format!("stty rows 33 cols 101; {} exec --tty child -- /tools/busybox sh", child.command_line()?);
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut typist = script.spawn().context("cannot run script(1)")?;
    let mut keys = typist.stdin.take().context("its input is a pipe")?;
    keys.write_all(b"/tools/busybox stty size; [ -t 0 ] && echo ter''minal; exit 5\n")?;
    let out = typist.wait_with_output()?;
    drop(keys);
    ensure!(text(&out.stdout).contains("33 101") && text(&out.stdout).contains("terminal"), "{out:?}");
    ensure!(out.status.code() == Some(5), "{out:?}");

    // Several at once: each hears its own.
    std::thread::scope(|scope| {
        let child = &child;
        let programs: Vec<_> = (0..4_u32)
            .map(|n| {
                scope.spawn(move || {
                    let out = child.exec(&[], &["/tools/busybox", "cat"], format!("number {n}").as_bytes())?;
                    expect(&out, 0, &format!("number {n}"), "")
                })
            })
            .collect();
        programs.into_iter().try_for_each(|program| program.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    child.check_kernel_log()?;
    child.kill()?;
    vm.stop()
}
