//! The shared libraries that a program needs, as the dynamic loader says: they are mounted one by one.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::{FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};

use crate::{Refusal, refusal, refused};

/// What `program` needs, the loader itself included; nothing for a static one.
///
/// # Errors
/// When it is no program, or its libraries are not to be found.
pub fn of(program: &Path) -> Result<Vec<PathBuf>, Refusal> {
    let unusable = |e| refusal(format!("cannot read {}", program.display()), e, "install Civic's programs anew");
    let bytes = std::fs::read(program).map_err(unusable)?;
    let Some(loader) = interpreter(bytes.as_slice())? else { return Ok(Vec::new()) };
    let output = Command::new(&loader).arg("--list").arg(program).env_clear().output().map_err(unusable)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let what = format!("{} does not load: {said}", program.display());
        return Err(refused(what, "install the libraries that it names"));
    }
    let mut libraries = listed(&text);
    libraries.push(loader);
    Ok(libraries)
}

fn interpreter<'a>(bytes: impl ReadRef<'a>) -> Result<Option<PathBuf>, Refusal> {
    let wrong = |_| refused("the program is no 64-bit ELF file", "install Civic's programs anew");
    let header = FileHeader64::<Endianness>::parse(bytes).map_err(wrong)?;
    let endian = header.endian().map_err(wrong)?;
    for segment in header.program_headers(endian, bytes).map_err(wrong)? {
        if segment.p_type(endian) == PT_INTERP {
            let name =
                segment.data(endian, bytes).map_err(|()| refused("the program is cut short", "install it anew"))?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            return Ok(Some(PathBuf::from(OsStr::from_bytes(name))));
        }
    }
    Ok(None)
}

/// Paths in what the loader lists: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn listed(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let named = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        let path = named.rsplit_once(" (").map_or(named, |(path, _)| path);
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    text.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_in_what_the_loader_says() {
        let text =
            "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/a b/libc.so.6 (0x00007f)\n\t/lib64/ld.so.2 (0x7f)\n";
        assert_eq!(listed(text), [PathBuf::from("/lib/a b/libc.so.6"), "/lib64/ld.so.2".into()]);
    }

    #[test]
    fn this_test_has_libraries_that_exist() {
        let libraries = of(&std::env::current_exe().unwrap()).unwrap();
        assert!(libraries.iter().any(|path| path.to_string_lossy().contains("libc.so")), "{libraries:?}");
        assert!(libraries.iter().all(|path| path.is_file()), "{libraries:?}");
        assert!(of(Path::new("/etc/passwd")).is_err());
    }
}
