use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::*;

/// Copies a file with all folders above it.
fn copy(from: &str, root: &Path, to: &str) {
    let to = root.join(to);
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap();
}

fn script(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// What is missing in an image of a folder.
fn all(root: &Path) -> Vec<Missing> {
    let image = root.with_extension("img");
    let made = Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).args([root, &image]).arg("64M").output();
    assert!(made.unwrap().status.success());
    let missing = missing(&Tree::read(&image).unwrap()).unwrap();
    fs::remove_file(image).unwrap();
    missing
}

/// The same, and who needs it.
fn checked(root: &Path) -> Vec<(String, Vec<String>)> {
    all(root).into_iter().map(|missing| (missing.what, missing.needed_by)).collect()
}

/// Libraries of the system, by what this program needs; and the program itself.
fn ourselves() -> (String, Elf) {
    let path = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    let Some(Program::Elf(elf)) = Program::parse(&fs::read(&path).unwrap()) else { panic!("a test is an ELF file") };
    assert!(elf.needed.iter().any(|name| name == "libc.so.6") && elf.interpreter.is_some(), "{elf:?}");
    (path, elf)
}

#[test]
fn libraries_and_interpreters() {
    let (program, elf) = ourselves();
    let work = tempfile::tempdir().unwrap();
    let root = &work.path().join("root");
    copy(&program, root, "usr/bin/tool");
    let interpreter = elf.interpreter.clone().unwrap();
    let user = vec!["/usr/bin/tool".to_owned()];
    assert_eq!(checked(root), [(interpreter.clone(), user.clone())]);
    // As Debian has it: links lead from the paths that programs name.
    symlink("usr/lib64", root.join("lib64")).unwrap();
    symlink("usr/lib", root.join("lib")).unwrap();
    copy(&interpreter, root, "usr/lib/x86_64-linux-gnu/ld.so");
    fs::create_dir_all(root.join("usr/lib64")).unwrap();
    let name = interpreter.rsplit_once('/').unwrap().1;
    symlink("/lib/x86_64-linux-gnu/ld.so", root.join("usr/lib64").join(name)).unwrap();
    let mut needed: Vec<_> = elf.needed.iter().map(|name| (name.clone(), user.clone())).collect();
    // The interpreter is a library, too.
    needed.retain(|(library, _)| library != name);
    needed.sort();
    assert_eq!(checked(root).into_iter().filter(|(library, _)| library != name).collect::<Vec<_>>(), needed);
    // Only where the configuration says.
    for library in &elf.needed {
        copy(&format!("/lib/x86_64-linux-gnu/{library}"), root, &format!("opt/lib/{library}"));
    }
    assert!(!checked(root).is_empty());
    fs::create_dir_all(root.join("etc/ld.so.conf.d")).unwrap();
    fs::write(root.join("etc/ld.so.conf.d/opt.conf"), "# Ours\n/opt/lib # here\n").unwrap();
    assert_eq!(checked(root), []);
    // A library of a library.
    fs::remove_file(root.join("opt/lib/libc.so.6")).unwrap();
    assert_eq!(checked(root), [("libc.so.6".to_owned(), user)]);
}

#[test]
fn scripts() {
    let work = tempfile::tempdir().unwrap();
    let root = &work.path().join("root");
    script(root, "opt/agent/run", "#!/usr/bin/python3 -E\nprint(1)\n");
    script(root, "opt/agent/named", "#! /usr/bin/env -S lang -x\n");
    script(root, "usr/bin/env", "no program of any kind");
    script(root, "usr/share/doc/agent/example", "#!/usr/bin/ruby\n");
    script(root, "opt/plain", "echo\n");
    let expected = [
        ("/usr/bin/python3".to_owned(), vec!["/opt/agent/run".to_owned()]),
        ("lang".to_owned(), vec!["/opt/agent/named".to_owned()]),
    ];
    assert_eq!(checked(root), expected);
    script(root, "usr/local/bin/lang", "");
    // A link that is too long for its inode.
    let long = format!("/usr/{}/python", "long".repeat(30));
    script(root, &long[1..], "");
    symlink(long, root.join("usr/bin/python3")).unwrap();
    assert_eq!(checked(root), []);
    fs::set_permissions(root.join("usr/local/bin/lang"), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(checked(root).len(), 1);
}

#[test]
fn folders_beside_the_program() {
    let folders = ["$ORIGIN/../lib", "${ORIGIN}", "/opt/$LIB"].map(str::to_owned);
    let found: Vec<_> = expanded(&folders, "/opt/agent/bin/run").collect();
    assert_eq!(found, ["/opt/agent/bin/../lib", "/opt/agent/bin", "/opt/lib/x86_64-linux-gnu"]);
}

#[test]
fn what_is_broken_needs_nothing() {
    let (program, _) = ourselves();
    let bytes = fs::read(program).unwrap();
    for length in (0..4096).step_by(7) {
        let _ = Program::parse(&bytes[..length]);
    }
    let mut other = bytes[..4096].to_vec();
    for at in 0..4096 {
        other[at] ^= 0xff;
        let _ = Program::parse(&other);
        other[at] ^= 0xff;
    }
    assert_eq!(Program::parse(b"\x7fELF"), None);
    assert_eq!(Program::parse(b"#!"), None);
    assert_eq!(Program::parse(b"#!relative\n"), None);
}

#[test]
fn what_packages_do_without() {
    let work = tempfile::tempdir().unwrap();
    let root = &work.path().join("root");
    script(root, "usr/bin/packaged", "#!/usr/bin/lang\n");
    symlink("usr/bin", root.join("bin")).unwrap();
    script(root, "var/lib/dpkg/info/some.list", "/.\n/bin\n/bin/packaged\n");
    let optional = || -> Vec<_> { all(root).iter().map(|missing| missing.optional).collect() };
    assert_eq!(optional(), [true]);
    script(root, "var/lib/dpkg/info/lang:amd64.list", "/usr/bin/lang\n");
    assert_eq!(optional(), [false]);
    fs::remove_file(root.join("var/lib/dpkg/info/lang:amd64.list")).unwrap();
    script(root, "usr/bin/ours", "#!/usr/bin/lang\n");
    assert_eq!(optional(), [false]);
}

#[test]
fn some_are_told() {
    let told = |users: &[&str]| {
        Missing { what: "x".into(), needed_by: users.iter().map(|u| (*u).into()).collect(), optional: false }.told()
    };
    assert_eq!(told(&["/a"]), "it has no x, needed by /a");
    assert_eq!(told(&["/a", "/b", "/c", "/d", "/e"]), "it has no x, needed by /a, /b, /c and 2 more");
}
