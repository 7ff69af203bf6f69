//! A store: a file system with programs that need nothing of the guest they run in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::guest::said;
use super::machine::{Tools, libraries};

/// Makes it, with a static busybox, these programs of this system with their libraries, and these files, which can be executed; once for each image.
pub fn make(tools: &Tools, programs: &[PathBuf], files: &[(&str, &[u8])], images: &[PathBuf]) -> Result<()> {
    let tree = tools.work.join("store");
    // Civic's loader makes the folders that it wants where there are none.
    for folder in ["bin", "dev/pts", "guest", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    let copy = |from: &Path, to: &Path| -> Result<()> {
        fs::create_dir_all(to.parent().context("no folder")?)?;
        fs::copy(from, to).with_context(|| format!("{} is missing", from.display())).map(drop)
    };
    copy(Path::new("/bin/busybox"), &tree.join("bin/busybox")).context("busybox-static is missing")?;
    for program in programs {
        copy(program, &tree.join("bin").join(program.file_name().context("a program without name")?))?;
        for library in libraries(program)? {
            copy(&library, &tree.join(library.strip_prefix("/")?))?;
        }
    }
    for (name, content) in files {
        let to = tree.join(name);
        fs::write(&to, content)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    for image in images {
        let mut command = Command::new("mke2fs");
        said(command.args(["-q", "-F", "-t", "ext4", "-d"]).args([&tree, image]).arg("32M"))?;
    }
    fs::remove_dir_all(tree).map_err(Into::into)
}
