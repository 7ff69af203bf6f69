//! The monitors that are compared, and the command line of each for the same machine.
//!
//! QEMU gets what its manual and its users give it for speed: KVM with `-cpu host`, no default devices, one I/O thread a disk,
//! asynchronous I/O. It gets *less* than Civic where Civic's machine has something always: no entropy source, no virtio console.
//! It has no HPET, as libvirt gives none to Linux: the guest does not use it, but QEMU's goes on ticking, 100 times a second in its main
//! thread, which took a sixth of the testbed's processor from whoever was measured. Its guest RAM is private memory, its default: a shared memfd as Civic's QEMU does not align for huge pages, and with it a
//! booting guest faulted 20000 times on 4 KiB instead of 400 times (`pages_4k` and `pages_2m` in /sys/kernel/debug/kvm).

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use civic_testbed::cache;
use civic_testbed::cpio::Archive;

use super::guest::said;

/// The kernel that is booted: the series with the fewest drivers, as it would be chosen for virtual machines.
const FLAVOUR: &str = "6.12-cloud";
const INIT: &str = include_str!("../../../../resources/bench/init");
const VSOCK: &str = include_str!("../../../../resources/bench/vsock.pl");

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// Ours.
    Civic,
    /// QEMU's machine of a PC with PCI Express.
    Q35,
    /// QEMU's smallest machine, as it is by default: with ACPI.
    Microvm,
    /// Without ACPI, which also gives it a smaller firmware (qboot) and other timers.
    MicrovmQboot,
}

impl Monitor {
    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Civic => "civic",
            Self::Q35 => "qemu q35",
            Self::Microvm => "qemu microvm",
            Self::MicrovmQboot => "qemu microvm,acpi=off",
        }
    }
}

/// Which file of the kernel package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// The compressed kernel.
    BzImage,
    /// The ELF file, entered by PVH.
    Vmlinux,
}

impl Image {
    /// Its file's name.
    pub fn file(self) -> &'static str {
        match self {
            Self::BzImage => "vmlinuz",
            Self::Vmlinux => "vmlinux",
        }
    }
}

/// What runs on the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Userland {
    /// `resources/bench/init`, in the tiny guest's initramfs.
    Bench,
    /// Debian with systemd, from the first disk and with Debian's own initrd.
    Debian,
}

/// How QEMU does a disk's I/O. Civic has one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// `aio=io_uring`
    IoUring,
    /// `aio=threads`
    Threads,
}

impl Aio {
    /// QEMU's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// A disk. Its data goes through the host's page cache, and a flush of the guest's reaches the image.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Whether the image is a qcow2 one; else raw.
    pub qcow2: bool,
    /// Not to be written.
    pub read_only: bool,
    /// QEMU's way.
    pub aio: Aio,
}

/// How the guest is reached by vsock.
#[derive(Clone, Debug)]
pub enum Vsock {
    /// Through a Unix socket of the monitor's.
    Unix(PathBuf),
    /// Through the kernel's vhost.
    Vhost(u32),
}

/// A machine with a guest.
#[derive(Clone, Debug)]
pub struct Spec {
    pub monitor: Monitor,
    pub image: Image,
    pub userland: Userland,
    pub cpus: u8,
    pub memory_mib: u32,
    /// Added to what every guest gets.
    pub cmdline: String,
    pub disks: Vec<Disk>,
    /// The taps of its network cards, and whether QEMU leaves the card's work to the kernel's vhost.
    pub taps: Vec<(String, bool)>,
    pub vsock: Option<Vsock>,
    /// Further arguments.
    pub more: Vec<String>,
}

/// The monitors and what they boot.
pub struct Tools {
    /// Files of this bench, removed with it.
    pub work: PathBuf,
    civic: PathBuf,
    qemu: PathBuf,
    /// Debian also builds a QEMU with this machine alone, which starts faster.
    microvm: PathBuf,
    gdb: PathBuf,
    data: Vec<PathBuf>,
    kernels: PathBuf,
    debian_initrd: PathBuf,
    initrd: PathBuf,
    libraries: Option<PathBuf>,
}

impl Tools {
    /// Gathers them. In the testbed all is copied into memory, since its folders are slow, each in its own way.
    pub fn new(qemu: &Path, data: &[PathBuf], gdb: &Path) -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).with_context(|| format!("no {name}"));
        let work = std::env::temp_dir().join(format!("civic-bench-{}", std::process::id()));
        cache::remove(&work)?;
        fs::create_dir_all(&work)?;
        let kernels = variable("CIVIC_ASSETS")?.join(FLAVOUR);
        let initrd = work.join("initrd");
        let mut bytes = fs::read(kernels.join("tiny.initrd"))?;
        let mut more = Archive::new();
        more.file("bench/init", 0o755, INIT.as_bytes());
        more.file("bench/vsock.pl", 0o755, VSOCK.as_bytes());
        bytes.extend(more.finish());
        fs::write(&initrd, bytes)?;
        let small = qemu.with_file_name("qemu-system-x86_64-microvm");
        let mut tools = Self {
            civic: variable("CIVIC_BIN_DIR")?.join("civic"),
            qemu: qemu.to_owned(),
            microvm: if small.exists() { small } else { qemu.to_owned() },
            gdb: gdb.to_owned(),
            data: data.to_vec(),
            debian_initrd: kernels.join("initrd.img"),
            kernels,
            initrd,
            libraries: None,
            work,
        };
        if std::env::var_os("TESTBED").is_some() {
            tools.copy_to_memory()?;
        }
        Ok(tools)
    }

    fn copy_to_memory(&mut self) -> Result<()> {
        super::progress("copying the monitors and the kernel into the testbed's memory");
        let to = self.work.join("lib");
        fs::create_dir_all(&to)?;
        let [vmm, pager] = ["civic-vmm", "civic-pager"].map(|name| self.civic.with_file_name(name));
        for program in [&self.civic, &vmm, &pager, &self.qemu, &self.microvm, &self.gdb] {
            for library in libraries(program)?.iter().filter(|l| !l.to_string_lossy().contains("/ld-linux")) {
                fs::copy(library, to.join(library.file_name().context("a library without name")?))?;
            }
        }
        self.libraries = Some(to);
        let copy = |from: &Path, name: &str| -> Result<PathBuf> {
            let to = self.work.join(name);
            let done = Command::new("cp").arg("-rL").args([from, &to]).status()?;
            ensure!(done.success(), "cannot copy {}", from.display());
            Ok(to)
        };
        copy(&vmm, "civic-vmm")?;
        copy(&pager, "civic-pager")?;
        let (civic, qemu, microvm) =
            (copy(&self.civic, "civic")?, copy(&self.qemu, "qemu")?, copy(&self.microvm, "microvm")?);
        self.gdb = copy(&self.gdb, "gdb")?;
        let kernels = self.work.join("kernels");
        fs::create_dir_all(&kernels)?;
        for image in [Image::BzImage, Image::Vmlinux] {
            copy(&self.kernels.join(image.file()), &format!("kernels/{}", image.file()))?;
        }
        let mut data = Vec::new();
        for (n, from) in self.data.iter().filter(|d| d.exists()).enumerate() {
            data.push(copy(from, &format!("data{n}"))?);
        }
        (self.civic, self.qemu, self.microvm, self.kernels, self.data) = (civic, qemu, microvm, kernels, data);
        Ok(())
    }

    fn program(&self, file: &Path) -> Command {
        let mut c = Command::new(file);
        if let Some(libraries) = &self.libraries {
            c.env("LD_LIBRARY_PATH", libraries);
        }
        c
    }

    /// `civic`, with this bench's run directory.
    pub fn civic(&self, args: &[&str]) -> Command {
        let mut c = self.program(&self.civic);
        c.args(args).arg("--run-dir").arg(self.run_dir());
        c
    }

    /// The folder with a directory for each of this bench's VMs.
    pub fn run_dir(&self) -> PathBuf {
        self.work.join("run")
    }

    /// A monitor that waits for its source to be forked, for what comes by its standard input.
    pub fn civic_vmm(&self, name: &str) -> Command {
        let mut c = self.program(&self.civic.with_file_name("civic-vmm"));
        c.args(["--config", "-", "--dir"]).arg(self.run_dir().join(name));
        c
    }

    /// The page server of a VM.
    pub fn civic_pager(&self, name: &str) -> Command {
        let mut c = self.program(&self.civic.with_file_name("civic-pager"));
        c.arg(self.run_dir().join(name));
        c
    }

    /// What `civic run` says against options; nothing if it starts a VM with them, which is ended at once.
    pub fn refused(&self, options: &[&str]) -> Result<Option<String>> {
        const NAME: &str = "bench-probe";
        let mut c = self.civic(&["run", "--name", NAME, "--detach", "--memory", "128M"]);
        let kernel = self.kernels.join(Image::BzImage.file());
        let out = c.arg("--kernel").arg(kernel).args(options).output().context("cannot run civic")?;
        if out.status.success() {
            said(self.civic(&["kill", NAME]))?;
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        Ok(Some(text.lines().filter(|l| !l.trim().is_empty()).collect::<Vec<_>>().join("; ")))
    }

    /// `gdb`
    pub fn gdb(&self) -> Command {
        self.program(&self.gdb)
    }

    /// `qemu --version`
    pub fn qemu_version(&self) -> Command {
        let mut c = self.program(&self.qemu);
        c.arg("--version");
        c
    }

    /// Starts the machine with its serial console on standard input and output. Only Civic's has a name.
    pub fn command(&self, spec: &Spec, name: &str) -> Command {
        let mut c = match spec.monitor {
            Monitor::Civic => self.civic(&["run", "--name", name]),
            Monitor::Q35 => self.program(&self.qemu),
            Monitor::Microvm | Monitor::MicrovmQboot => self.program(&self.microvm),
        };
        // Debian's kernel would otherwise spend its time on printing.
        let (initrd, starts) = match spec.userland {
            Userland::Bench => (&self.initrd, "rdinit=/bench/init"),
            Userland::Debian => (&self.debian_initrd, "root=/dev/vda rw net.ifnames=0"),
        };
        let cmdline = format!("console=ttyS0 quiet panic=-1 {starts} {}", spec.cmdline);
        let (kernel, cpus) = (self.kernels.join(spec.image.file()), spec.cpus.to_string());
        let memory = format!("{}M", spec.memory_mib);
        if spec.monitor == Monitor::Civic {
            c.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
            c.args(["--cmdline", cmdline.trim_end(), "--memory", &memory, "--cpus", &cpus]);
            civic_devices(spec, &mut c);
        } else {
            for folder in &self.data {
                c.arg("-L").arg(folder);
            }
            let machine = spec.monitor.name().trim_start_matches("qemu ");
            let hpet = if spec.monitor == Monitor::Q35 { ",hpet=off" } else { "" };
            c.args(["-M", &format!("{machine},accel=kvm{hpet}"), "-cpu", "host"]);
            c.args(["-m", &memory, "-smp", &cpus]);
            c.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
            c.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).args(["-append", cmdline.trim_end()]);
            qemu_devices(spec, &mut c);
        }
        c.args(&spec.more);
        c
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.work);
    }
}

fn civic_devices(spec: &Spec, c: &mut Command) {
    for disk in &spec.disks {
        let format = if disk.qcow2 { ",format=qcow2" } else { "" };
        let ro = if disk.read_only { ",ro" } else { "" };
        c.arg("--disk").arg(format!("path={}{format}{ro}", disk.path.display()));
    }
    for (tap, _) in &spec.taps {
        c.args(["--net", &format!("tap={tap}")]);
    }
    if let Some(Vsock::Unix(path)) = &spec.vsock {
        c.args(["--vsock", &format!("uds={}", path.display())]);
    }
}

fn qemu_devices(spec: &Spec, c: &mut Command) {
    let bus = if spec.monitor == Monitor::Q35 { "pci" } else { "device" };
    if spec.monitor != Monitor::Q35 {
        c.args(["-global", "virtio-mmio.force-legacy=false"]);
    }
    for (n, disk) in spec.disks.iter().enumerate() {
        let block = fs::metadata(&disk.path).is_ok_and(|m| m.file_type().is_block_device());
        let driver = if block { "host_device" } else { "file" };
        let on = |yes: bool| if yes { "on" } else { "off" };
        let ro = on(disk.read_only);
        // Only an image that nobody writes is open in the other monitor as well.
        let locking = if disk.read_only { "off" } else { "auto" };
        let cache = "cache.direct=off,cache.no-flush=off";
        let (aio, path) = (disk.aio.word(), disk.path.display());
        let format = if disk.qcow2 { "qcow2" } else { "raw" };
        // Not for microvm: as it is configured here, its firmware, which looks at the disk, was seen to wait for ever for one with an
        // I/O thread.
        let iothread = if spec.monitor == Monitor::Q35 { format!(",iothread=io{n}") } else { String::new() };
        if !iothread.is_empty() {
            c.args(["-object", &format!("iothread,id=io{n}")]);
        }
        c.arg("-blockdev");
        c.arg(format!(
            "driver={driver},node-name=f{n},filename={path},aio={aio},{cache},read-only={ro},locking={locking}"
        ));
        c.args(["-blockdev", &format!("driver={format},node-name=d{n},file=f{n},read-only={ro}"), "-device"]);
        c.arg(format!("virtio-blk-{bus},drive=d{n}{iothread},num-queues=1"));
    }
    for (n, (tap, vhost)) in spec.taps.iter().enumerate() {
        let vhost = if *vhost { "on" } else { "off" };
        c.args(["-netdev", &format!("tap,id=n{n},ifname={tap},script=no,downscript=no,vhost={vhost}")]);
        c.args(["-device", &format!("virtio-net-{bus},netdev=n{n},mac=52:54:00:0b:00:0{n}")]);
    }
    if let Some(Vsock::Vhost(cid)) = &spec.vsock {
        c.args(["-device", &format!("vhost-vsock-{bus},guest-cid={cid}")]);
    }
}

/// The shared libraries that a program needs, with what loads them.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let out = said(Command::new("ldd").arg(program))?;
    Ok(out.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// A command as one would type it.
pub fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        if word.contains([' ', '\'', '"', '$']) {
            format!("'{}'", word.replace('\'', r"'\''"))
        } else {
            word.into_owned()
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_machine_for_each() {
        let tools = Tools {
            work: "/nowhere/w".into(),
            civic: "/c".into(),
            qemu: "/q".into(),
            microvm: "/m".into(),
            gdb: "/g".into(),
            data: vec!["/d".into()],
            kernels: "/k".into(),
            debian_initrd: "/k/initrd.img".into(),
            initrd: "/i".into(),
            libraries: None,
        };
        let disk = Disk { path: "/a.img".into(), qcow2: true, read_only: true, aio: Aio::Threads };
        let spec = |monitor| Spec {
            monitor,
            image: Image::Vmlinux,
            userland: Userland::Bench,
            cpus: 2,
            memory_mib: 512,
            cmdline: "x=y".into(),
            disks: vec![disk.clone()],
            taps: vec![("t0".into(), false)],
            vsock: None,
            more: Vec::new(),
        };
        let civic = line(&tools.command(&spec(Monitor::Civic), "one"));
        let cmdline = "'console=ttyS0 quiet panic=-1 rdinit=/bench/init x=y'";
        assert_eq!(
            civic,
            format!(
                "/c run --name one --run-dir /nowhere/w/run --kernel /k/vmlinux --initrd /i --cmdline {cmdline} \
                 --memory 512M --cpus 2 --disk path=/a.img,format=qcow2,ro --net tap=t0"
            )
        );
        let q35 = line(&tools.command(&spec(Monitor::Q35), "one"));
        for part in ["/q -L /d -M q35,", cmdline, "-smp 2", "-m 512M", "driver=qcow2", "aio=threads", "virtio-net-pci"]
        {
            assert!(q35.contains(part), "{part}: {q35}");
        }
        let microvm = line(&tools.command(&spec(Monitor::Microvm), "one"));
        assert!(microvm.starts_with("/m -L /d -M microvm,") && microvm.contains("virtio-blk-device"), "{microvm}");
    }
}
