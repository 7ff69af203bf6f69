use super::*;
use crate::MacAddr;
use proptest::prelude::*;

fn disk(id: &str, path: &str) -> DiskConfig {
    DiskConfig { id: id.into(), path: path.into(), read_only: false }
}

fn net(id: &str, tap: &str) -> NetConfig {
    NetConfig { id: id.into(), tap: tap.into(), mac: None }
}

fn config() -> VmConfig {
    VmConfig {
        name: "web".into(),
        kernel: "/boot/vmlinuz".into(),
        initrd: None,
        cmdline: None,
        memory_bytes: 1 << 30,
        cpus: 2,
        disks: vec![disk("disk0", "/root.img")],
        nets: vec![net("net0", "tap0")],
        overcommit: false,
        any_kvm: false,
    }
}

/// The error and field that `change` brings about in a valid configuration.
fn error_after(change: impl FnOnce(&mut VmConfig)) -> ConfigError {
    let mut config = config();
    config.validate().unwrap();
    change(&mut config);
    config.validate().unwrap_err()
}

#[test]
fn names() {
    for name in ["a", "0", "web-1.test_x", &"a".repeat(63)] {
        validate_name(name).unwrap();
    }
    for name in ["", "-a", ".", "..", ".a", "A", "a/b", "a b", "ü", "a\0", &"a".repeat(64)] {
        assert_eq!(validate_name(name), Err(ConfigError::Name { name: name.into() }));
    }
}

#[test]
fn sizes_and_counts() {
    assert_eq!(error_after(|c| c.cpus = 0), ConfigError::Cpus { cpus: 0 });
    assert_eq!(error_after(|c| c.cpus = 17), ConfigError::Cpus { cpus: 17 });
    for bytes in [0, (16 << 20) - 1, (64 << 30) + 1, u64::MAX] {
        assert_eq!(error_after(|c| c.memory_bytes = bytes), ConfigError::MemoryRange { bytes });
    }
    let bytes = (16 << 20) + 4096;
    assert_eq!(error_after(|c| c.memory_bytes = bytes), ConfigError::MemoryStep { bytes });
    assert_eq!(error_after(|c| c.cmdline = Some("x".repeat(2048))), ConfigError::CmdlineTooLong { bytes: 2048 });
    assert_eq!(error_after(|c| c.cmdline = Some("a\0b".into())), ConfigError::CmdlineNul);
    let many = |c: &mut VmConfig| c.disks = (0..16).map(|i| disk(&format!("d{i}"), &format!("/d{i}"))).collect();
    assert_eq!(error_after(many), ConfigError::TooManyDevices { field: Field::Disk, count: 17 });
}

#[test]
fn devices() {
    let field = Field::Disk;
    assert_eq!(error_after(|c| c.disks[0].id = "".into()), ConfigError::Id { field, id: "".into() });
    let long = "a".repeat(21);
    assert_eq!(error_after(|c| c.disks[0].id = long.clone()), ConfigError::Id { field, id: long.clone() });
    assert_eq!(error_after(|c| c.disks[0].id = "rng".into()), ConfigError::ReservedId { field, id: "rng".into() });
    let same_id = |c: &mut VmConfig| c.nets[0].id = "disk0".into();
    assert_eq!(error_after(same_id), ConfigError::DuplicateId { field: Field::Net, id: "disk0".into() });
    let same_image = |c: &mut VmConfig| c.disks.push(disk("b", "/root.img"));
    assert_eq!(error_after(same_image), ConfigError::DuplicateImage { path: "/root.img".into() });
    for tap in ["", "a/b", "tap%d", "a b", "0123456789abcdef", "..", "a:1"] {
        assert_eq!(error_after(|c| c.nets[0].tap = tap.into()), ConfigError::Tap { tap: tap.into() });
    }
    let same_tap = |c: &mut VmConfig| c.nets.push(net("b", "tap0"));
    assert_eq!(error_after(same_tap), ConfigError::DuplicateTap { tap: "tap0".into() });
    let mac = MacAddr([1, 0, 0, 0, 0, 0]);
    assert_eq!(error_after(|c| c.nets[0].mac = Some(mac)), ConfigError::MacNotUnicast { mac });
    assert_eq!(error_after(|c| c.kernel = PathBuf::new()).field(), Field::Kernel);
    assert_eq!(error_after(|c| c.initrd = Some(PathBuf::new())).field(), Field::Initrd);
}

#[test]
fn one_read_only_image_may_be_two_disks() {
    let mut config = config();
    config.disks.push(disk("b", "/root.img"));
    config.disks.iter_mut().for_each(|disk| disk.read_only = true);
    config.validate().unwrap();
}

#[test]
fn a_misspelt_field_is_refused() {
    let json = r#"{"name":"a","kernel":"/k","memory_bytes":16777216,"cpus":1,"memory":1}"#;
    let error = serde_json::from_str::<VmConfig>(json).unwrap_err().to_string();
    assert!(error.contains("unknown field `memory`"), "{error}");
}

#[test]
fn the_smallest_json_is_a_vm() {
    let json = r#"{"name":"a","kernel":"/k","memory_bytes":16777216,"cpus":1}"#;
    let config: VmConfig = serde_json::from_str(json).unwrap();
    config.validate().unwrap();
    assert_eq!(serde_json::to_string(&config).unwrap(), json);
}

#[test]
fn default_command_lines() {
    let mut config = config();
    assert_eq!(config.effective_cmdline(), "console=ttyS0 root=/dev/vda rw");
    config.disks[0].read_only = true;
    assert_eq!(config.effective_cmdline(), "console=ttyS0 root=/dev/vda ro");
    config.initrd = Some("/initrd".into());
    assert_eq!(config.effective_cmdline(), "console=ttyS0");
    config.cmdline = Some("quiet".into());
    assert_eq!(config.effective_cmdline(), "quiet");
}

proptest! {
    #[test]
    fn any_json_is_read_or_refused(text in "\\PC{0,200}") {
        let _ = serde_json::from_str::<VmConfig>(&text);
    }

    #[test]
    fn a_valid_name_is_one_path_component(name in "[a-zA-Z0-9./_ -]{0,70}") {
        if validate_name(&name).is_ok() {
            let path = Path::new("/run").join(&name);
            prop_assert_eq!(path.parent(), Some(Path::new("/run")));
            prop_assert_eq!(path.components().count(), 3);
        }
    }
}
