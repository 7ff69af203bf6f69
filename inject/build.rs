//! Builds the program that is brought into guests, `civic-loader`, and puts it where `src/lib.rs` includes it.
//!
//! It is another kind of program than the rest: static, at a fixed address, without a C library. So it has a cargo of its own, with flags
//! of its own, whatever the outer one's are: debug or release, clippy's, or a sanitizer's. The target is named because otherwise the flags
//! would apply to build scripts as well.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const FLAGS: [&str; 10] = [
    "-Crelocation-model=static",
    "-Cforce-unwind-tables=no",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,noexecstack",
    // The monitor copies the whole file into the guest: no bytes between its segments.
    "-Clink-arg=-Wl,-z,noseparate-code",
    "-Clink-arg=-Wl,-z,norelro",
    "-Clink-arg=-Wl,--no-eh-frame-hdr",
];
const PROFILE: [(&str, &str); 6] = [
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "false"),
    ("CARGO_PROFILE_RELEASE_LTO", "fat"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "z"),
    ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
    ("CARGO_PROFILE_RELEASE_STRIP", "symbols"),
];
/// What the outer cargo, clippy or a user has set for the outer build.
const OUTER: [&str; 7] = [
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "CLIPPY_ARGS",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
];

fn main() {
    for source in ["src", "Cargo.toml", "discard.ld"] {
        println!("cargo::rerun-if-changed=loader/{source}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../Cargo.lock");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let target = out.join("target");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    // The outer cargo has brought the lock file up to date. Whether it may use the network is in the environment, or not to be told.
    cargo.args(["build", "--quiet", "--release", "--locked", "--package", "civic-loader"]);
    cargo.args(["--features", "bin", "--bin", "civic-loader", "--target", TARGET, "--target-dir"]).arg(&target);
    for name in OUTER {
        cargo.env_remove(name);
    }
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let discard = format!("-Clink-arg=-Wl,-T,{}", manifest.join("loader/discard.ld").display());
    let flags = [&FLAGS[..], &[&discard]].concat();
    cargo.envs(PROFILE).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    let status = cargo.status().expect("cargo starts");
    assert!(status.success(), "civic-loader could not be built: {status}");
    let built = target.join(TARGET).join("release").join("civic-loader");
    fs::copy(&built, out.join("loader")).expect("OUT_DIR can be written");
}
