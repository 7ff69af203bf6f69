//! The store of tools that tests and the demo look into guests with: packages of Debian, made into an image by `civic store build`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use civic_testbed::apt::{RELEASE, as_root, mirror_lines};
use civic_testbed::cache::{hash, make_once, progress};

use crate::assets;
use crate::place::release_dir;
use crate::test::cargo;

/// Its name among the assets.
pub const NAME: &str = "tools.img";
const PACKAGES: [&str; 4] = ["strace", "procps", "lsof", "iproute2"];
/// What makes it: a store that another `civic store build` has made says nothing of this one.
const BUILDERS: [&str; 2] =
    [include_str!("../../civic/src/store/build.rs"), include_str!("../../civic/src/store/build_hooks.rs")];

/// Builds it, unless it is there. It takes root, or sudo.
pub fn build() -> Result<PathBuf> {
    let image = assets::dir()?.join(NAME);
    let recipe = format!("1 {RELEASE} {} {:x}", PACKAGES.join(" "), hash(BUILDERS.concat().as_bytes()));
    make_once(&image, &recipe, |new| {
        progress("building a store of tools: about a minute, and civic if need be");
        ensure!(cargo(&["build", "--quiet", "--release", "-p", "civic"], &[])?, "cannot build civic");
        let sources = new.with_extension("list");
        fs::write(&sources, mirror_lines()?.join("\n") + "\n")?;
        let mut command = as_root(&release_dir()?.join("civic"));
        command.args(["store", "build", "--suite", RELEASE, "--sources"]).arg(&sources).arg(new);
        command.args(PACKAGES.iter().flat_map(|package| ["--package", *package]));
        let built = command.status().context("cannot run civic")?.success();
        fs::remove_file(&sources)?;
        ensure!(built, "civic store build has failed");
        Ok(())
    })?;
    Ok(image)
}
