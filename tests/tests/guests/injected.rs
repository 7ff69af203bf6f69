//! Programs that are started in forks of stock guests, from outside: nothing in the guest helps, and nothing of it is left behind.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use civic_api::{GuestChecksums, GuestKernel};
use civic_tests::linux::{Spec, Vm};

/// Bytes that go into a program and come back: more than fits in all buffers on the way.
const MUCH: usize = 700_000;

/// What the monitor finds out about a guest's kernel is true; programs run in a fork as they would in the guest, and then in as many
/// forks as `rounds`, each at another moment.
pub fn tiny(spec: &Spec, rounds: u32) -> Result<()> {
    let mut vm = Vm::start(spec)?;
    examined(&mut vm)?;
    let refused = vm.exec(&[], &["/bin/true"], b"")?;
    ensure!(refused.status.code() == Some(125), "a program was started in a VM that is no fork: {refused:?}");
    let before = sums(&vm)?;
    let (mut child, _) = vm.fork("child")?;
    programs(&mut child)?;
    child.check_kernel_log()?;
    frozen(&mut child).context("with the guest frozen")?;
    child.kill()?;
    // Busy now and then, so that forks find its vCPUs in programs, in the kernel and asleep.
    vm.sh("(while :; do dd if=/dev/urandom of=/dev/null bs=64k count=9 2>/dev/null; cat /proc/*/stat > /dev/null 2>&1; usleep 70000; done) & true")?;
    for round in 0..rounds {
        let (mut child, _) = vm.fork(&format!("child{round}"))?;
        again(&mut child, round).with_context(|| format!("round {round}"))?;
        child.kill()?;
    }
    ensure!(sums(&vm)? == before, "the source's kernel has changed");
    vm.check_kernel_log()?;
    vm.stop()
}

fn examined(vm: &mut Vm) -> Result<()> {
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
    Ok(())
}

fn sums(vm: &Vm) -> Result<GuestChecksums> {
    let kernel: GuestKernel = vm.guest()?;
    kernel.checksums.context("no checksums")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn expect(out: &Output, status: i32, stdout: &str, stderr: &str) -> Result<()> {
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

/// While it runs, nothing of the guest does; afterwards all does. The console's shell may not be ours any more: whoever waits for it has
/// seen it stop.
fn frozen(child: &mut Vm) -> Result<()> {
    child.sh("(n=0; while :; do n=$((n + 1)); echo $n > /tmp/counts; usleep 20000; done) & true")?;
    let counts = "cat /tmp/counts; sleep 1; cat /tmp/counts";
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

fn again(child: &mut Vm, round: u32) -> Result<()> {
    let before = sums(child)?;
    let word = format!("round {round}");
    let out = child.exec(&["--stages"], &["/bin/echo", &word], b"")?;
    ensure!(out.status.success() && text(&out.stdout) == format!("{word}\n"), "{out:?}");
    eprint!("{}", text(&out.stderr));
    let after = sums(child)?;
    ensure!(after == before, "the kernel was {before:?}, and is {after:?}");
    child.check_kernel_log()
}

/// A guest whose vCPUs do not come to start anything is told of, within the time.
pub fn wedged(spec: &Spec) -> Result<()> {
    let vm = Vm::start(spec)?;
    let (child, _) = vm.fork("child")?;
    child.civic(&["pause"])?;
    let refused = child.exec(&[], &["/bin/true"], b"")?;
    ensure!(text(&refused.stderr).contains("paused"), "{refused:?}");
    child.civic(&["resume"])?;
    let begun = std::time::Instant::now();
    let late = child.exec(&["--wait", "0"], &["/bin/true"], b"")?;
    ensure!(late.status.code() == Some(125), "{late:?}");
    ensure!(text(&late.stderr).contains("vCPU 0 is"), "{late:?}");
    ensure!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
    // And the next one is none the worse for it.
    expect(&child.exec(&[], &["/bin/echo", "there"], b"")?, 0, "there\n", "")?;
    child.kill()?;
    vm.stop()
}
