//! What cannot be: each is refused with a code, a message of one line and, where there is one, a way out; the process ends
//! with status 1 and leaves nothing behind. `Setup::refused` checks the latter.

use std::fs;
use std::path::PathBuf;

use civic_api::{ErrorBody, ErrorCode, NetConfig};
use civic_tests::bare::image;
use civic_tests::bare::program::pvh;
use civic_tests::bare::vm::Setup;

fn spinning() -> Vec<u8> {
    pvh(|asm| {
        asm.print("up\n")?;
        asm.spin()
    })
}

fn with_hint(error: &ErrorBody, code: ErrorCode, hint: &str) {
    assert_eq!(error.code, code, "{error:?}");
    assert!(error.hint.as_ref().is_some_and(|h| h.contains(hint)), "no '{hint}' in the hint of {error:?}");
}

#[test]
fn what_is_no_kernel() {
    let good = spinning();
    let bz = image::bzimage(&[0xf4; 4096]);
    let mut old = bz.clone();
    old[0x206..0x208].copy_from_slice(&0x204u16.to_le_bytes());
    let mut foreign = good.clone();
    foreign[18] = 183; // AArch64
    let mut low = good.clone();
    low[64 + 24..64 + 32].fill(0); // to be loaded at 0
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("a byte", vec![0x7f]),
        ("text", b"#!/bin/sh\necho no kernel\n".to_vec()),
        ("zeroes", vec![0; 1 << 20]),
        ("an ELF file without a note", image::elf_without_note(&[0xf4; 16])),
        ("half an ELF header", good[..40].to_vec()),
        ("an ELF file cut short", good[..good.len() - 8].to_vec()),
        ("an ELF file for another processor", foreign),
        ("an ELF file below the first megabyte", low),
        ("a bzImage cut short", bz[..bz.len() - 100].to_vec()),
        ("a bzImage's header alone", bz[..0x230].to_vec()),
        ("an old bzImage", old),
    ] {
        let error = Setup::new(&bytes).refused();
        assert_eq!(error.code, ErrorCode::KernelUnusable, "{what}: {error:?}");
        assert!(error.hint.is_some(), "{what}: {error:?}");
        assert!(error.message.contains("/kernel"), "{what}: {error:?} does not name the file");
    }
}

#[test]
fn a_kernel_that_is_not_there_or_no_file() {
    let mut setup = Setup::new(&[]);
    setup.config.kernel = setup.root().join("absent");
    with_hint(&setup.refused(), ErrorCode::KernelUnusable, "vmlinuz");
    setup.config.kernel = setup.root().to_owned();
    with_hint(&setup.refused(), ErrorCode::KernelUnusable, "vmlinuz");
    let fifo = setup.root().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO can be made");
    setup.config.kernel = fifo;
    with_hint(&setup.refused(), ErrorCode::KernelUnusable, "vmlinuz");
    setup.config.kernel = "/dev/zero".into();
    with_hint(&setup.refused(), ErrorCode::KernelUnusable, "vmlinuz");
}

#[test]
fn a_kernel_that_does_not_fit() {
    let mut image = spinning();
    // The first segment wants 16 MiB of memory behind its first megabyte.
    image[64 + 40..64 + 48].copy_from_slice(&(16u64 << 20).to_le_bytes());
    with_hint(&Setup::new(&image).memory(16 << 20).refused(), ErrorCode::KernelUnusable, "--memory");
    let setup = Setup::new(&image).memory(18 << 20);
    let mut vm = setup.boot();
    vm.expect("up\n");
}

#[test]
fn an_initrd_that_is_not_there_or_empty() {
    let mut setup = Setup::new(&spinning());
    setup.config.initrd = Some(setup.root().join("absent"));
    let error = setup.refused();
    assert_eq!(error.code, ErrorCode::ImageUnusable);
    assert!(error.message.contains("initrd"), "{error:?}");
    fs::write(setup.root().join("absent"), "").expect("an empty file can be made");
    let error = setup.refused();
    assert!(error.message.contains("initrd"), "{error:?}");
}

#[test]
fn an_image_that_is_no_disk() {
    for bytes in [0, 100, 513] {
        let setup = Setup::new(&spinning()).disk("root", bytes);
        let error = setup.refused();
        with_hint(&error, ErrorCode::ImageUnusable, "truncate");
        assert!(error.message.contains("root.img"), "{error:?}");
    }
    let mut setup = Setup::new(&spinning()).disk("root", 4096);
    fs::remove_file(&setup.config.disks[0].path).expect("the image can be removed");
    let error = setup.refused();
    assert_eq!(error.code, ErrorCode::ImageUnusable, "{error:?}");
    setup.config.disks[0].path = setup.root().to_owned();
    let error = setup.refused();
    assert_eq!(error.code, ErrorCode::ImageUnusable, "{error:?}");
}

#[test]
fn an_image_has_one_writer_at_a_time() {
    let first = Setup::new(&spinning()).disk("root", 1 << 20);
    let image = first.config.disks[0].path.clone();
    let mut other = Setup::new(&spinning()).disk("root", 0).beside(first.root());
    other.config.disks[0].path = image;
    let mut first = first.boot();
    with_hint(&other.refused(), ErrorCode::ImageLocked, "ro");
    other.config.disks[0].read_only = true;
    with_hint(&other.refused(), ErrorCode::ImageLocked, "ro");
    // A reset does not let go of it.
    first.kill();
    assert!(first.ended().success());
    let mut other = other.boot();
    other.expect("up\n");
}

#[test]
fn a_tap_that_is_not_there() {
    let mut setup = Setup::new(&spinning());
    setup.config.nets.push(NetConfig::new("lan", "civic-no-such"));
    let error = setup.refused();
    with_hint(&error, ErrorCode::TapUnavailable, "");
    assert!(error.message.contains("civic-no-such"), "{error:?}");
}

#[test]
fn a_name_in_use() {
    let first = Setup::new(&spinning()).boot();
    let run_dir = first.dir().parent().expect("a VM's directory has a parent").to_owned();
    let second = Setup::new(&spinning()).run_dir(run_dir);
    let error = second.refused();
    with_hint(&error, ErrorCode::NameInUse, "civic stop bare");
    // The first has noticed nothing.
    let mut first = first;
    first.expect("up\n");
    first.kill();
    assert!(first.ended().success());
}

#[test]
fn a_socket_path_that_is_too_long() {
    let setup = Setup::new(&spinning());
    let run_dir = setup.root().join("d".repeat(60)).join("e".repeat(60));
    let setup = setup.run_dir(run_dir);
    with_hint(&setup.refused(), ErrorCode::InvalidRequest, "shorter");
}

#[test]
fn a_directory_that_cannot_be_made() {
    let setup = Setup::new(&spinning());
    let file = setup.root().join("kernel");
    let setup = setup.run_dir(file);
    with_hint(&setup.refused(), ErrorCode::InvalidRequest, "--run-dir");
}

#[test]
fn a_configuration_that_makes_no_sense() {
    let setup = Setup::new(&spinning());
    let good = serde_json::to_value(&setup.config).expect("a configuration is JSON");
    for text in ["", "not JSON", "[]", "{}", "{\"name\":"] {
        let error = setup.refused_with(text);
        with_hint(&error, ErrorCode::InvalidConfig, "VmConfig");
    }
    let mut unknown = good.clone();
    unknown["memroy"] = 1.into();
    let error = setup.refused_with(&unknown.to_string());
    with_hint(&error, ErrorCode::InvalidConfig, "VmConfig");
    assert!(error.message.contains("memroy"), "{error:?}");
    let spoil = |field: &str, value: serde_json::Value| {
        let mut config = good.clone();
        config[field] = value;
        let error = setup.refused_with(&config.to_string());
        assert_eq!(error.code, ErrorCode::InvalidConfig, "{field}: {error:?}");
        assert!(error.message.contains(field), "{field}: {error:?}");
    };
    spoil("memory_bytes", (8 << 20).into());
    spoil("memory_bytes", ((32 << 20) + 4096).into());
    spoil("memory_bytes", (65u64 << 30).into());
    spoil("cpus", 0.into());
    spoil("cpus", 17.into());
    spoil("name", "../escape".into());
    spoil("kernel", "".into());
    let huge = format!("{}{}", good, " ".repeat(70 << 10));
    let error = setup.refused_with(&huge);
    assert_eq!(error.code, ErrorCode::TooLarge, "{error:?}");
}

#[test]
fn a_configuration_that_cannot_be_read() {
    let setup = Setup::new(&spinning());
    for path in [setup.root().join("absent.json"), setup.root().to_owned(), PathBuf::from("/proc/self/mem")] {
        let error = setup.refused_from(&path);
        with_hint(&error, ErrorCode::InvalidConfig, "VmConfig");
    }
}

fn meminfo(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("the host says what memory it has");
    let line = text.lines().find(|line| line.starts_with(&format!("{field}:"))).expect("it has the field");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

#[test]
fn more_memory_than_the_host_has() {
    let most = 64 << 30;
    if meminfo("MemTotal") + meminfo("SwapTotal") > most {
        // This host has it: then it is given.
        Setup::new(&spinning()).memory(most).boot();
        return;
    }
    let mut setup = Setup::new(&spinning()).memory(most);
    with_hint(&setup.refused(), ErrorCode::OutOfMemory, "--overcommit");
    setup.config.overcommit = true;
    let mut vm = setup.boot();
    vm.expect("up\n");
}

#[test]
fn a_user_who_may_not_use_kvm() {
    use std::os::unix::fs::PermissionsExt;
    assert!(nix::unistd::geteuid().is_root(), "this test becomes another user: run it as root");
    const NOBODY: u32 = 65534;
    let setup = Setup::new(&spinning()).user(NOBODY, NOBODY);
    let mode = fs::metadata("/dev/kvm").expect("/dev/kvm is there").permissions().mode();
    if mode & 0o006 == 0o006 {
        // This host lets everybody: then it works for everybody.
        let mut vm = setup.boot();
        vm.expect("up\n");
        return;
    }
    with_hint(&setup.refused(), ErrorCode::KvmUnavailable, "group");
}

#[test]
fn a_kvm_that_cannot_run_linux() {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("the host says what CPU it has");
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let can = flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"));
    let mut setup = Setup::new(&spinning());
    setup.config.any_kvm = false;
    if can {
        let mut vm = setup.boot();
        vm.expect("up\n");
        return;
    }
    let error = setup.refused();
    with_hint(&error, ErrorCode::KvmCannotRunLinux, "testbed");
    with_hint(&error, ErrorCode::KvmCannotRunLinux, "--any-kvm");
}
