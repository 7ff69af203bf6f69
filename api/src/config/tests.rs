use super::*;
use crate::MacAddr;
use proptest::prelude::*;

fn disk(id: &str, path: &str) -> DiskConfig {
    DiskConfig::new(id, path)
}

fn net(id: &str, tap: &str) -> NetConfig {
    NetConfig::new(id, tap)
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
        consoles: Vec::new(),
        vsock: None,
        balloon: None,
        forks: ForksConfig::default(),
        overcommit: false,
        any_kvm: false,
        allow_programs: false,
        audit: None,
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
    let disks = |count: usize| (0..count).map(|i| disk(&format!("d{i}"), &format!("/d{i}"))).collect();
    let many = |c: &mut VmConfig| c.disks = disks(MAX_DEVICES);
    assert_eq!(error_after(many), ConfigError::TooManyDevices { field: Field::Disk, count: MAX_DEVICES + 1 });
    let consoles = |c: &mut VmConfig| {
        c.consoles = (0..MAX_DEVICES).map(|i| ConsoleConfig { id: format!("c{i}") }).collect();
    };
    let most = ConfigError::TooManyDevices { field: Field::Console, count: MAX_DEVICES + 2 };
    assert_eq!(error_after(consoles), most);
}

#[test]
fn devices() {
    let field = Field::Disk;
    assert_eq!(error_after(|c| c.disks[0].id = "".into()), ConfigError::Id { field, id: "".into() });
    let long = "a".repeat(21);
    assert_eq!(error_after(|c| c.disks[0].id = long.clone()), ConfigError::Id { field, id: long.clone() });
    for id in RESERVED_IDS {
        assert_eq!(error_after(|c| c.disks[0].id = id.into()), ConfigError::ReservedId { field, id: id.into() });
    }
    let same_id = |c: &mut VmConfig| c.nets[0].id = "disk0".into();
    assert_eq!(error_after(same_id), ConfigError::DuplicateId { field: Field::Net, id: "disk0".into() });
    let overlay = |c: &mut VmConfig| c.disks.push(DiskConfig { overlay: true, ..disk("b", "/root.img") });
    assert_eq!(error_after(overlay), ConfigError::DuplicateImage { path: "/root.img".into() });
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
fn queues_and_formats() {
    for queues in [0, 17] {
        let error = ConfigError::Queues { field: Field::Disk, id: "disk0".into(), queues, most: 16 };
        assert_eq!(error_after(|c| c.disks[0].queues = Some(queues)), error);
    }
    for queues in [0, 9] {
        let error = ConfigError::Queues { field: Field::Net, id: "net0".into(), queues, most: 8 };
        assert_eq!(error_after(|c| c.nets[0].queues = Some(queues)), error);
    }
    for mtu in [0, 67] {
        assert_eq!(error_after(|c| c.nets[0].mtu = Some(mtu)), ConfigError::Mtu { id: "net0".into(), mtu });
    }
    assert_eq!(error_after(|c| c.disks[0].backing = true), ConfigError::RawBacking { id: "disk0".into() });
    let both = |c: &mut VmConfig| (c.disks[0].overlay, c.disks[0].read_only) = (true, true);
    assert_eq!(error_after(both), ConfigError::ReadOnlyOverlay { id: "disk0".into() });
    let mut config = config();
    config.disks[0] =
        DiskConfig { format: DiskFormat::Qcow2, backing: true, queues: Some(16), ..disk("disk0", "/root.qcow2") };
    config.nets[0] = NetConfig { queues: Some(8), mtu: Some(68), ..net("net0", "tap0") };
    config.validate().unwrap();
    config.nets[0].mtu = Some(u16::MAX);
    config.validate().unwrap();
}

#[test]
fn rates() {
    let rate = |bytes_per_second, operations_per_second| Some(RateLimit { bytes_per_second, operations_per_second });
    type Place = fn(&mut VmConfig) -> &mut Option<RateLimit>;
    let places: [(Field, &str, Place); 3] = [
        (Field::Disk, "disk0", |c| &mut c.disks[0].rate),
        (Field::Net, "net0", |c| &mut c.nets[0].rx_rate),
        (Field::Net, "net0", |c| &mut c.nets[0].tx_rate),
    ];
    for (field, id, place) in places {
        let (empty, zero) =
            (ConfigError::RateEmpty { field, id: id.into() }, ConfigError::RateZero { field, id: id.into() });
        assert_eq!(error_after(|c| *place(c) = rate(None, None)), empty);
        for wrong in [rate(Some(0), None), rate(None, Some(0)), rate(Some(1), Some(0)), rate(Some(0), Some(1))] {
            assert_eq!(error_after(|c| *place(c) = wrong), zero);
        }
        for right in [rate(Some(1), None), rate(None, Some(u64::MAX)), rate(Some(1), Some(1)), None] {
            let mut config = config();
            *place(&mut config) = right;
            config.validate().unwrap();
        }
    }
}

#[test]
fn a_vsock() {
    let vsock = |uds: &str, cid| Some(VsockConfig { uds: uds.into(), cid });
    let longest = format!("/{}", "a".repeat(95));
    for (uds, cid) in [("/v", None), ("/v", Some(3)), ("/v", Some(0xffff_fffe)), (longest.as_str(), None)] {
        let config = VmConfig { vsock: vsock(uds, cid), ..config() };
        config.validate().unwrap();
    }
    for cid in [0, 1, 2, u32::MAX] {
        assert_eq!(error_after(|c| c.vsock = vsock("/v", Some(cid))), ConfigError::Cid { cid });
    }
    let path = longest + "a";
    let too_long = ConfigError::VsockPath { path: path.clone().into(), bytes: 97 };
    assert_eq!(error_after(|c| c.vsock = vsock(&path, None)), too_long);
    let none = ConfigError::Path { field: Field::Vsock, path: PathBuf::new() };
    assert_eq!(error_after(|c| c.vsock = vsock("", None)), none);
}

/// Every address that the guest's ports lead to can be bound.
#[test]
fn the_longest_vsock_path_leaves_room_for_a_port() {
    let path = format!("/{}_{}", "a".repeat(MAX_VSOCK_PATH_BYTES - 1), u32::MAX);
    std::os::unix::net::SocketAddr::from_pathname(&path).unwrap();
    std::os::unix::net::SocketAddr::from_pathname(path + "0").unwrap_err();
}

#[test]
fn a_balloon() {
    let with = |target_bytes| move |c: &mut VmConfig| c.balloon = Some(BalloonConfig { target_bytes });
    for target in [0, 4096, (1 << 30) - (16 << 20)] {
        let mut config = config();
        with(target)(&mut config);
        config.validate().unwrap();
    }
    assert_eq!(error_after(with(4097)), ConfigError::BalloonStep { target: 4097 });
    for target in [(1 << 30) - (16 << 20) + 4096, 1 << 30, !4095] {
        assert_eq!(error_after(with(target)), ConfigError::BalloonTooLarge { target, memory: 1 << 30 });
    }
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
    for device in [
        r#""disks":[{"id":"a","path":"/a","rate":{"iops":1}}]"#,
        r#""nets":[{"id":"a","tap":"t","mtuu":1500}]"#,
        r#""vsock":{"uds":"/v","port":1}"#,
        r#""balloon":{"size":1}"#,
    ] {
        let json = format!(r#"{{"name":"a","kernel":"/k","memory_bytes":16777216,"cpus":1,{device}}}"#);
        let error = serde_json::from_str::<VmConfig>(&json).unwrap_err().to_string();
        assert!(error.contains("unknown field"), "{device}: {error}");
    }
}

#[test]
fn the_smallest_json_is_a_vm() {
    let json = r#"{"name":"a","kernel":"/k","memory_bytes":16777216,"cpus":1}"#;
    let config: VmConfig = serde_json::from_str(json).unwrap();
    config.validate().unwrap();
    assert_eq!(serde_json::to_string(&config).unwrap(), json);
}

#[test]
fn devices_in_json() {
    let json = concat!(
        r#"{"name":"a","kernel":"/k","memory_bytes":33554432,"cpus":1,"#,
        r#""disks":[{"id":"d","path":"/d","format":"qcow2","backing":true,"queues":2,"rate":{"bytes_per_second":1}}],"#,
        r#""nets":[{"id":"n","tap":"t","queues":2,"mtu":9000,"rx_rate":{"operations_per_second":5}}],"#,
        r#""vsock":{"uds":"/v","cid":4},"balloon":{"target_bytes":4096}}"#,
    );
    let config: VmConfig = serde_json::from_str(json).unwrap();
    config.validate().unwrap();
    assert_eq!(config.disks[0].format, DiskFormat::Qcow2);
    assert_eq!(serde_json::to_string(&config).unwrap(), json);
}

#[test]
fn settings_are_what_was_given() {
    let mut config = config();
    let check = |config: &VmConfig, id: &str, expected: &str| {
        let words: Vec<_> = config.settings(id).iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(words.join(" "), expected);
    };
    check(&config, "disk0", "format=raw path=/root.img");
    check(&config, "net0", "tap=tap0");
    for id in ["vsock", "balloon", "rng", "nonsense"] {
        check(&config, id, "");
    }
    let rate = |bytes_per_second, operations_per_second| Some(RateLimit { bytes_per_second, operations_per_second });
    config.disks[0] = DiskConfig {
        read_only: true,
        format: DiskFormat::Qcow2,
        backing: true,
        queues: Some(4),
        rate: rate(Some(5), Some(6)),
        ..disk("disk0", "/r")
    };
    check(
        &config,
        "disk0",
        "backing=true bytes_per_second=5 format=qcow2 operations_per_second=6 path=/r queues=4 read_only=true",
    );
    let mac = Some(MacAddr([2, 0, 0, 0, 0, 1]));
    let (rx_rate, tx_rate) = (rate(Some(7), None), rate(None, Some(8)));
    config.nets[0] = NetConfig { mac, queues: Some(2), mtu: Some(9000), rx_rate, tx_rate, ..net("net0", "t") };
    let expected = "mac=02:00:00:00:00:01 mtu=9000 queues=2 rx_bytes_per_second=7 tap=t tx_operations_per_second=8";
    check(&config, "net0", expected);
    config.vsock = Some(VsockConfig { uds: "/v".into(), cid: None });
    check(&config, "vsock", "cid=3 uds=/v");
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
