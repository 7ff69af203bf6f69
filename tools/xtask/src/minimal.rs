//! A kernel of our own making, from Debian's source package: with no more than guests need, so without a tracer's places at functions'
//! entries and without the addresses of data.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use civic_testbed::apt::{Apt, install};
use civic_testbed::cache::{self, make_once, progress};
use civic_testbed::kernel::{Kernel, payload};

/// Its name among the flavours.
pub const FLAVOUR: &str = "minimal";
const CONFIG: &str = include_str!("../../../resources/minimal/config");
/// What building a kernel takes; `dwarves` makes its type information.
const PACKAGES: [&str; 10] =
    ["make", "gcc", "libc6-dev", "flex", "bison", "bc", "libelf-dev", "dwarves", "xz-utils", "python3-minimal"];

/// The kernel, built if it is not there.
pub fn kernel() -> Result<Kernel> {
    let cache = cache::dir()?;
    let dir = cache.join("kernels").join(FLAVOUR);
    make_once(&dir, &format!("1 {CONFIG}"), |new| build(&cache, new)).context("cannot build the minimal kernel")?;
    let version = fs::read_to_string(dir.join("version"))?;
    Ok(Kernel { dir, version })
}

fn build(cache: &Path, new: &Path) -> Result<()> {
    install(&PACKAGES)?;
    let apt = Apt::open(cache)?;
    let sources = apt.search("^linux-source-[0-9]+[.][0-9]+$")?;
    let version = |name: &String| -> Option<Vec<u32>> {
        name.strip_prefix("linux-source-")?.split('.').map(|number| number.parse().ok()).collect()
    };
    let package = sources.iter().max_by_key(|name| version(name)).context("the mirror has no source package")?;
    progress(&format!("building a minimal kernel from {package}: about ten minutes"));
    let work = new.with_extension("work");
    cache::remove(&work)?;
    apt.unpack(&[package], None, &work)?;
    let run = |program: &str, args: &[&str]| -> Result<String> {
        let out = Command::new(program).args(args).current_dir(&work).stdin(Stdio::null()).output();
        let out = out.with_context(|| format!("cannot run {program}"))?;
        let said = String::from_utf8_lossy(&out.stderr);
        let last: Vec<_> = said.lines().rev().take(30).collect();
        let last = last.into_iter().rev().collect::<Vec<_>>().join("\n");
        ensure!(out.status.success(), "{program} {args:?} failed:\n{last}");
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    run("tar", &["-xf", &format!("usr/src/{package}.tar.xz")])?;
    let tree = work.join(package);
    fs::write(tree.join("fragment"), CONFIG)?;
    let make = |targets: &[&str]| {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        run("make", &[&["-s", "-C", package, "ARCH=x86_64", &format!("-j{jobs}")], targets].concat())
    };
    make(&["tinyconfig"])?;
    // Later lines win; what they leave open gets its default.
    let tiny = fs::read_to_string(tree.join(".config"))?;
    fs::write(tree.join(".config"), format!("{tiny}{CONFIG}"))?;
    make(&["olddefconfig"])?;
    let config = fs::read_to_string(tree.join(".config"))?;
    let lost: Vec<_> = CONFIG.lines().filter(|line| line.starts_with("CONFIG_") && !config.contains(*line)).collect();
    ensure!(lost.is_empty(), "this kernel has not, or not so: {}", lost.join(", "));
    make(&["bzImage"])?;
    fs::create_dir_all(new)?;
    let version = make(&["kernelrelease"])?;
    let image = fs::read(tree.join("arch/x86/boot/bzImage"))?;
    fs::write(new.join("vmlinux"), payload(&image)?)?;
    fs::write(new.join("vmlinuz"), image)?;
    fs::write(new.join("config"), config)?;
    // All is built in: the lists that say what is a module are empty.
    let modules = new.join("lib/modules").join(&version);
    fs::create_dir_all(&modules)?;
    fs::write(modules.join("modules.dep"), "")?;
    fs::copy(tree.join("modules.builtin"), modules.join("modules.builtin"))?;
    fs::write(new.join("version"), version)?;
    cache::remove(&work)
}
