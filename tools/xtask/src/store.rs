//! The stores that tests and the demo look into guests with: packages of Debian, made into images by `civic store build`. Those of the worked
//! examples are built by the examples' own scripts.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use civic_testbed::apt::{RELEASE, as_root, mirror_lines};
use civic_testbed::cache::{hash, make_once, progress};

use crate::assets;
use crate::place::release_dir;
use crate::test::cargo;

/// The tools, by their name among the assets.
const TOOLS: &str = "tools.img";
const PACKAGES: [&str; 4] = ["strace", "procps", "lsof", "iproute2"];
/// The examples' stores, and what builds them, below their folder.
const EXAMPLES: [(&str, &str); 2] = [("agents.img", "agents/store.sh"), ("services.img", "services.sh")];
/// What makes them: a store that another `civic store build` has made says nothing of this one.
const BUILDERS: [&str; 2] =
    [include_str!("../../civic/src/store/build.rs"), include_str!("../../civic/src/store/build_hooks.rs")];

/// Builds the tools, unless they are there. It takes root, or sudo.
pub fn build() -> Result<PathBuf> {
    let packages: Vec<_> = PACKAGES.iter().flat_map(|package| ["--package", *package]).map(OsStr::new).collect();
    one(TOOLS, &PACKAGES.join(" "), None, &packages)
}

/// Builds the examples' stores, unless they are there: only tests that take long need them.
pub fn examples() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples");
    for (name, script) in EXAMPLES {
        let script = folder.join(script);
        let made_of = format!("{:x}", hash(&content(script.parent().context("it is in a folder")?)?));
        one(name, &made_of, Some(&script), &[])?;
    }
    Ok(())
}

/// The stores that are there, by their names.
pub fn present() -> Result<Vec<(&'static str, PathBuf)>> {
    let names = [TOOLS].into_iter().chain(EXAMPLES.map(|(name, _)| name));
    let files = names.map(|name| Ok((name, assets::dir()?.join(name)))).collect::<Result<Vec<_>>>()?;
    Ok(files.into_iter().filter(|(_, file)| file.exists()).collect())
}

/// Builds a store of what is described so: by a script that takes the image and options, or by civic itself with these options.
fn one(name: &str, made_of: &str, script: Option<&Path>, options: &[&OsStr]) -> Result<PathBuf> {
    let image = assets::dir()?.join(name);
    let recipe = format!("1 {RELEASE} {made_of} {:x}", hash(BUILDERS.concat().as_bytes()));
    make_once(&image, &recipe, |new| {
        progress(&format!("building the store {name}: a minute or two, and civic if need be"));
        ensure!(cargo(&["build", "--quiet", "--release", "-p", "civic"], &[])?, "cannot build civic");
        let sources = new.with_extension("list");
        fs::write(&sources, mirror_lines()?.join("\n") + "\n")?;
        let civic = release_dir()?.join("civic");
        let mut command = match script {
            // Where root is had by sudo, that leaves nothing of the environment.
            Some(script) => {
                let mut command = as_root(Path::new("env"));
                command.arg(format!("CIVIC={}", civic.display())).arg("sh").arg(script).arg(new);
                command
            }
            None => {
                let mut command = as_root(&civic);
                command.args(["store", "build"]).arg(new);
                command
            }
        };
        command.args(["--suite", RELEASE, "--sources"]).arg(&sources).args(options);
        let built = command.status().context("cannot run what builds it")?.success();
        fs::remove_file(&sources)?;
        ensure!(built, "the store {name} could not be built");
        Ok(())
    })?;
    Ok(image)
}

/// All files of a folder and those below, with their names, in order; but for what is only to be read.
fn content(folder: &Path) -> Result<Vec<u8>> {
    let mut entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    entries.retain(|path| !path.extension().is_some_and(|extension| extension == "md" || extension == "svg"));
    entries.sort();
    let mut all = Vec::new();
    for path in entries {
        all.extend(path.file_name().unwrap_or_default().as_encoded_bytes());
        all.extend(if path.is_dir() { content(&path)? } else { fs::read(&path)? });
    }
    Ok(all)
}
