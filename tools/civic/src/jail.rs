//! `--jail`: monitors and page servers in jails of their own, which `civic-jailer` makes. What each of them needs of the host is decided
//! here, from what was asked for; that nothing else is there, and who it is, is the jailer's.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use civic_api::launch::LaunchRequest;
use civic_api::{ByteSize, DiskConfig, FORK_SOCKET_FILE, NewDevice, VsockConfig};

use crate::advice;
use crate::devices::Fields;

/// Where what is written to forks' disks goes, if nothing else is said.
const OVERLAYS: &str = "/var/tmp";

/// `--jail`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JailSpec {
    users: Option<String>,
    net: Option<String>,
    memory: Option<ByteSize>,
    cpu: Option<u32>,
    threads: Option<u64>,
    io_bps: Option<ByteSize>,
    io_iops: Option<u64>,
    cgroup: Option<String>,
    read: Option<PathBuf>,
    write: Option<PathBuf>,
}

impl FromStr for JailSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "[users=FIRST-LAST][,net=none|host|PATH][,memory=SIZE][,cpu=PERCENT][,threads=N][,io-bps=SIZE][,io-iops=N]\
                            [,cgroup=GROUP][,read=DIR][,write=DIR]";
        if text.is_empty() {
            return Ok(Self::default());
        }
        let mut fields = Fields::parse(text, FORM)?;
        let this = Self {
            users: fields.take("users"),
            net: fields.take("net"),
            memory: fields.take_parsed("memory")?,
            cpu: fields.take_number("cpu")?,
            threads: fields.take_number("threads")?,
            io_bps: fields.take_parsed("io-bps")?,
            io_iops: fields.take_number("io-iops")?,
            cgroup: fields.take("cgroup"),
            read: fields.take("read").map(PathBuf::from),
            write: fields.take("write").map(PathBuf::from),
        };
        fields.end()?;
        Ok(this)
    }
}

/// Whether the VM whose folder this is is jailed: then the folder is its user's.
pub fn is_jailed(dir: &Path) -> bool {
    std::fs::symlink_metadata(dir).is_ok_and(|meta| meta.uid() != nix::unistd::geteuid().as_raw())
}

/// What a program needs of the host.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    read: BTreeSet<PathBuf>,
    write: BTreeSet<PathBuf>,
    scratch: BTreeSet<PathBuf>,
    /// The host's network, where its taps are.
    taps: bool,
}

impl Needs {
    fn disk(&mut self, disk: &DiskConfig) {
        let paths = if disk.writes_image() { &mut self.write } else { &mut self.read };
        paths.insert(disk.path.clone());
        if disk.overlay {
            self.scratch.insert(OVERLAYS.into());
        }
    }

    /// Of a monitor. `spec` is asked whether a vsock's socket can be where it is to be.
    fn of(request: &LaunchRequest, dir: &Path, spec: &JailSpec) -> anyhow::Result<Self> {
        let mut needs = Self::default();
        let vsock = |vsock: &VsockConfig| spec.check_socket(&vsock.uds, dir);
        match request {
            LaunchRequest::Boot(config) => {
                needs.read.extend([&config.kernel].into_iter().chain(&config.initrd).cloned());
                config.disks.iter().for_each(|disk| needs.disk(disk));
                needs.taps = !config.nets.is_empty();
                config.vsock.iter().try_for_each(vsock)?;
                needs.audit(config.audit.as_deref())?;
                // What its forks need of its disks, and overlays.
                needs.scratch.clear();
                needs.scratch.insert(config.forks.dir.clone().unwrap_or_else(|| OVERLAYS.into()));
            }
            LaunchRequest::Restore(config) => {
                needs.read.insert(config.restore.clone());
                needs.read.extend(config.kernel.iter().chain(&config.initrd).cloned());
                needs.write.extend(config.disks.iter().map(|disk| disk.path.clone()));
                needs.taps = !config.nets.is_empty();
                needs.scratch.insert(OVERLAYS.into());
                config.vsock.iter().try_for_each(|uds| spec.check_socket(uds, dir))?;
                needs.audit(config.audit.as_deref())?;
            }
            LaunchRequest::Fork(config) => {
                for device in &config.devices {
                    match device {
                        NewDevice::Disk(disk) => needs.disk(disk),
                        NewDevice::Net(_) => needs.taps = true,
                        NewDevice::Console(_) => (),
                    }
                }
                needs.scratch.clear();
                needs.scratch.insert(config.overlay_dir.clone().unwrap_or_else(|| OVERLAYS.into()));
                needs.audit(config.audit.as_deref())?;
            }
        }
        Ok(needs)
    }

    /// What is shown inside must be there: an audit log that is not is made.
    fn audit(&mut self, path: Option<&Path>) -> anyhow::Result<()> {
        let Some(path) = path else { return Ok(()) };
        let mut options = std::fs::File::options();
        let made = options.append(true).create(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW).open(path);
        made.map_err(|error| {
            let message = format!("--audit: cannot write {}: {error}", path.display());
            advice::error(message, "name a file in a folder that is there; a link is not followed")
        })?;
        self.write.insert(path.to_owned());
        Ok(())
    }
}

impl JailSpec {
    /// The command that starts the monitor `program` for `request` in a jail; what comes behind it are the monitor's arguments.
    pub fn monitor(
        &self,
        jailer: &Path,
        program: &Path,
        dir: &Path,
        request: &LaunchRequest,
    ) -> anyhow::Result<Command> {
        let needs = Needs::of(request, dir, self)?;
        let mut command = self.jailer(jailer)?;
        command.arg("--dir").arg(dir);
        for (option, paths) in [("--read", &needs.read), ("--write", &needs.write), ("--scratch", &needs.scratch)] {
            for path in paths {
                command.arg(option).arg(path);
            }
        }
        command.args(["--device", "/dev/kvm", "--device", "/dev/userfaultfd", "--device", "/dev/null"]);
        let net = self.net.as_deref().unwrap_or(if needs.taps { "host" } else { "none" });
        if net != "none" {
            command.args(["--device", "/dev/net/tun"]);
        }
        command.args(["--net", net]);
        if let LaunchRequest::Fork(config) = request {
            let role = format!("child {}", config.name);
            command.arg("--introduce").arg(config.fork_of.join(FORK_SOCKET_FILE)).args(["--role", &role]);
        }
        command.arg("--").arg(program);
        if matches!(request, LaunchRequest::Fork(_)) {
            command.arg("--introduced");
        }
        Ok(command)
    }

    /// The command that starts the page server `program` of the VM whose folder is `source` in a jail.
    pub fn page_server(&self, jailer: &Path, program: &Path, source: &Path) -> anyhow::Result<Command> {
        let mut command = self.jailer(jailer)?;
        command.arg("--introduce").arg(source.join(FORK_SOCKET_FILE)).args(["--role", "pager", "--"]);
        command.arg(program).arg("--introduced");
        Ok(command)
    }

    fn jailer(&self, jailer: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(jailer);
        let number = |n: u64| OsString::from(n.to_string());
        let options = [
            ("--users", self.users.clone().map(OsString::from)),
            ("--memory", self.memory.map(|size| number(size.0))),
            ("--cpu", self.cpu.map(|cpu| number(cpu.into()))),
            ("--threads", self.threads.map(number)),
            ("--io-bps", self.io_bps.map(|size| number(size.0))),
            ("--io-iops", self.io_iops.map(number)),
            ("--cgroup", self.cgroup.clone().map(OsString::from)),
            ("--read", self.read.as_deref().map(absolute).transpose()?),
            ("--write", self.write.as_deref().map(absolute).transpose()?),
        ];
        for (option, value) in options {
            if let Some(value) = value {
                command.arg(option).arg(value);
            }
        }
        Ok(command)
    }

    /// A socket is made in a folder: that must be there inside.
    fn check_socket(&self, uds: &Path, dir: &Path) -> anyhow::Result<()> {
        let shown = self.write.as_deref().map(absolute).transpose()?;
        if uds.starts_with(dir) || shown.is_some_and(|shown| uds.starts_with(PathBuf::from(shown))) {
            return Ok(());
        }
        let message = format!("--vsock: a jailed VM cannot make {}", uds.display());
        let hint = format!("have it in {}, or in a folder that is given with --jail=write=DIR", dir.display());
        Err(advice::error(message, hint))
    }
}

fn absolute(path: &Path) -> anyhow::Result<OsString> {
    crate::cli::absolute(path, "--jail").map(PathBuf::into_os_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use civic_api::launch::{ForkConfig, SourceNet};
    use civic_api::{NetConfig, VmConfig};

    fn args(command: &Command) -> String {
        command.get_args().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    fn boot() -> VmConfig {
        let text = r#"{"name":"web","kernel":"/k","initrd":"/i","memory_bytes":134217728,"cpus":1}"#;
        serde_json::from_str(text).unwrap()
    }

    fn monitor(spec: &JailSpec, request: &LaunchRequest) -> anyhow::Result<String> {
        let command = spec.monitor(Path::new("/j"), Path::new("/civic-vmm"), Path::new("/run/civic/web"), request);
        Ok(args(&command?))
    }

    #[test]
    fn a_monitor_has_what_its_vm_needs() {
        let mut config = boot();
        config.disks = vec![
            DiskConfig::new("disk0", "/a.img"),
            DiskConfig { read_only: true, ..DiskConfig::new("disk1", "/b.img") },
        ];
        let said = monitor(&JailSpec::default(), &LaunchRequest::Boot(config.clone())).unwrap();
        assert_eq!(
            said,
            "--dir /run/civic/web --read /b.img --read /i --read /k --write /a.img --scratch /var/tmp --device /dev/kvm \
             --device /dev/userfaultfd --device /dev/null --net none -- /civic-vmm"
        );
        config.nets = vec![NetConfig::new("net0", "tap0")];
        let said = monitor(&"users=7-9,memory=1G,write=/w".parse().unwrap(), &LaunchRequest::Boot(config)).unwrap();
        assert!(said.starts_with("--users 7-9 --memory 1073741824 --write /w --dir"), "{said}");
        assert!(said.contains("--device /dev/net/tun --net host --"), "{said}");
    }

    #[test]
    fn an_audit_log_is_made_and_shown() {
        let dir = tempfile::tempdir().unwrap();
        let log = |path: PathBuf| LaunchRequest::Boot(VmConfig { audit: Some(path), ..boot() });
        let path = dir.path().join("web.audit");
        let said = monitor(&JailSpec::default(), &log(path.clone())).unwrap();
        assert!(path.is_file() && said.contains(&format!("--write {}", path.display())), "{said}");
        let told = monitor(&JailSpec::default(), &log(dir.path().join("no/such"))).unwrap_err();
        assert!(advice::told(&told).contains("a folder that is there"), "{told:#}");
    }

    #[test]
    fn a_child_opens_nothing_of_its_sources() {
        let request = LaunchRequest::Fork(ForkConfig {
            name: "web-1".into(),
            fork_of: "/run/civic/web".into(),
            overlay_dir: Some("/scratch".into()),
            source_net: SourceNet::default(),
            devices: vec![NewDevice::Disk(DiskConfig::new("own", "/own.img"))],
            for_programs: false,
            audit: None,
        });
        let said = monitor(&JailSpec::default(), &request).unwrap();
        let wanted = "--write /own.img --scratch /scratch --device /dev/kvm --device /dev/userfaultfd --device /dev/null --net none \
                      --introduce /run/civic/web/fork.sock --role child web-1 -- /civic-vmm --introduced";
        assert!(said.ends_with(wanted), "{said}");
        assert!(!said.contains("--read"), "{said}");
    }

    #[test]
    fn a_vsocks_socket_needs_a_folder_inside() {
        let vm = |uds: &str| {
            LaunchRequest::Boot(VmConfig { vsock: Some(VsockConfig { uds: uds.into(), cid: None }), ..boot() })
        };
        let told = monitor(&JailSpec::default(), &vm("/run/web.vsock")).unwrap_err();
        assert!(advice::told(&told).contains("--jail=write=DIR"), "{told:#}");
        monitor(&JailSpec::default(), &vm("/run/civic/web/vsock")).unwrap();
        monitor(&"write=/run".parse().unwrap(), &vm("/run/web.vsock")).unwrap();
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for wrong in ["user=1", "memory=1X", "cpu=x", "net", "memory=1G,memory=2G"] {
            assert!(wrong.parse::<JailSpec>().is_err(), "{wrong}");
        }
    }
}
