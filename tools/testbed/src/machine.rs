//! One running machine: its QEMU, the agent's channel, and the disks plugged into it.
//!
//! QEMU connects to sockets we listen on, so there is nothing to poll for. `setpriv --pdeathsig` has the kernel kill QEMU
//! when this process dies, however it dies.

use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::frame::{Disk, Frame, Kind, VERSION};
use crate::qmp::Qmp;
use crate::setup;

/// Runs at once: each has a root share of its own, and a 9p channel serves one mount only.
pub const SLOTS: usize = 6;
/// L1's memory unless told otherwise, in MiB.
pub const MEMORY: u32 = 8192;
/// L1's processors. With two, each a thread of QEMU's, TCG (10.0) now and then leaves L1's registers in a guest: see
/// `tests/src/linux/emulator.rs`. With one it has not been seen, and a booting guest is as fast.
pub const CPUS: u32 = 1;
/// What the machine prints, in the state directory.
pub const CONSOLE: &str = "console.log";
/// What the machine before it printed.
pub const LAST_CONSOLE: &str = "console.last.log";
/// How long booting may take on a busy machine.
const BOOT: Duration = Duration::from_secs(180);

/// The machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// MiB.
    pub memory: u32,
    /// Virtual CPUs.
    pub cpus: u32,
}

/// A machine whose agent answered.
pub struct Machine {
    child: Mutex<Child>,
    qmp: Qmp,
    to_agent: Mutex<UnixStream>,
    /// QEMU's process id.
    pub pid: u32,
}

impl Machine {
    /// Boots a machine with `agent` (an archive) in it; `dir` takes its sockets and logs. Returns it with the channel to read
    /// the agent from.
    pub fn boot(dir: &Path, workspace: &Path, size: Size, agent: &[u8]) -> Result<(Self, UnixStream)> {
        let parts = setup::parts()?;
        let initrd = dir.join("initrd");
        let mut bytes = fs::read(&parts.initrd)?;
        bytes.extend_from_slice(agent);
        fs::write(&initrd, bytes)?;
        let (qmp_path, agent_path) = (dir.join("qmp"), dir.join("agent"));
        let (qmp, agent) = (listen(&qmp_path)?, listen(&agent_path)?);
        let log = File::create(dir.join("qemu.log"))?;
        // What the machine before this one said last tells why it is gone.
        let _ = fs::rename(dir.join(CONSOLE), dir.join(LAST_CONSOLE));
        let mut c = Command::new("setpriv");
        c.args(["--pdeathsig", "KILL"]).arg(&parts.qemu.program);
        for folder in &parts.qemu.data {
            c.arg("-L").arg(folder);
        }
        let comma = |p: &Path| p.display().to_string().replace(',', ",,");
        let share = "security_model=none,multidevs=remap";
        c.args(["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "EPYC-Rome,+svm,+npt,-pcid", "-M", "pc"])
            .args(["-m", &size.memory.to_string(), "-smp", &size.cpus.to_string()])
            .arg("-kernel")
            .arg(&parts.vmlinuz)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", "console=hvc0 quiet loglevel=4 panic=-1 mitigations=off idle=poll"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("file,id=console,path={}", comma(&dir.join(CONSOLE)))])
            .args(["-device", "virtconsole,chardev=console"])
            .args(["-chardev", &format!("socket,id=agent,path={}", comma(&agent_path))])
            .args(["-device", "virtserialport,chardev=agent,name=civic.agent"])
            .args(["-qmp", &format!("unix:{}", comma(&qmp_path))])
            .args(["-fsdev", &format!("local,id=root,path=/,readonly=on,{share}")])
            .args(["-fsdev", &format!("local,id=workspace,path={},{share}", comma(workspace))])
            .args(["-device", "virtio-9p-pci,fsdev=workspace,mount_tag=workspace"])
            .args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
        for slot in 0..SLOTS {
            c.args(["-device", &format!("virtio-9p-pci,fsdev=root,mount_tag={}", root_tag(slot))]);
        }
        let child =
            c.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("cannot run setpriv")?;
        let pid = child.id();
        let child = Mutex::new(child);
        let end = Instant::now() + BOOT;
        let reach = |listener: &UnixListener| accept(listener, &child, end).with_context(|| tail(dir));
        let connected = reach(&agent).and_then(|a| Ok((a, Qmp::new(reach(&qmp)?)?)));
        let up = connected.and_then(|(mut agent, qmp)| {
            agent.set_read_timeout(Some(BOOT))?;
            let hello = Frame::read(&mut agent).with_context(|| tail(dir)).context("the agent did not come up")?;
            agent.set_read_timeout(None)?;
            ensure!(hello.kind == Kind::Hello && hello.body == VERSION.to_le_bytes(), "a strange agent answers");
            Ok((agent, qmp))
        });
        let (agent, qmp) = match up {
            Ok(up) => up,
            Err(e) => {
                kill(&child);
                return Err(e.context("the machine does not boot"));
            }
        };
        Ok((Self { child, qmp, to_agent: Mutex::new(agent.try_clone()?), pid }, agent))
    }

    /// Sends a frame to the agent.
    pub fn send(&self, frame: &Frame) -> std::io::Result<()> {
        frame.write(&mut *self.to_agent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets the virtual CPUs run.
    pub fn resume(&self) -> Result<()> {
        self.qmp.command("cont", json!({})).map(drop)
    }

    /// Stops the virtual CPUs.
    pub fn pause(&self) -> Result<()> {
        self.qmp.command("stop", json!({})).map(drop)
    }

    /// Plugs a disk in, with `serial` for its name in L1 and here.
    ///
    /// By the human monitor's `drive_add`, since only `-drive` knows `snapshot`: an overlay in a file that is unlinked once
    /// open. Such a drive goes away with its device.
    pub fn plug(&self, disk: &Disk, serial: &str) -> Result<()> {
        ensure!(!disk.file.contains(['"', '\\', '\n']), "a disk image of a name that QEMU's monitor cannot take");
        let mut drive =
            format!("if=none,id={serial}-drive,format=raw,cache=unsafe,file={}", disk.file.replace(',', ",,"));
        if disk.ro {
            drive += ",readonly=on";
        } else if disk.snapshot {
            drive += ",snapshot=on";
        }
        let line = format!("drive_add 0 \"{drive}\"");
        let said = self.qmp.command("human-monitor-command", json!({ "command-line": line }))?;
        let said = said.as_str().unwrap_or_default().trim();
        ensure!(said == "OK", "QEMU cannot open {}: {said}", disk.file);
        let device =
            json!({ "driver": "virtio-blk-pci", "id": serial, "drive": format!("{serial}-drive"), "serial": serial });
        let plugged = self.qmp.command("device_add", device);
        if plugged.is_err() {
            let line = format!("drive_del {serial}-drive");
            let _ = self.qmp.command("human-monitor-command", json!({ "command-line": line }));
        }
        plugged.map(drop)
    }

    /// Unplugs a disk and closes its files. An error leaves the machine unfit for more.
    pub fn unplug(&self, serial: &str) -> Result<()> {
        for _ in 0..6 {
            // A guest that is still probing the device ignores the request, so it is made again.
            let asked = self.qmp.command("device_del", json!({ "id": serial }));
            if self.qmp.wait_deleted(serial, Duration::from_secs(10)) {
                return Ok(());
            }
            if asked.is_err_and(|e| e.to_string().contains("not found")) {
                break;
            }
        }
        bail!("the machine does not let go of disk {serial}")
    }

    /// Ends QEMU.
    pub fn kill(&self) {
        kill(&self.child);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The mount tag of a slot's root share.
pub fn root_tag(slot: usize) -> String {
    format!("root{slot}")
}

fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = child.kill();
    let _ = child.wait();
}

fn listen(path: &Path) -> Result<UnixListener> {
    crate::cache::remove(path)?;
    let listener = UnixListener::bind(path)
        .with_context(|| format!("cannot listen on {} (its name may be too long: set CIVIC_CACHE)", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(listener: &UnixListener, child: &Mutex<Child>, end: Instant) -> Result<UnixStream> {
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            return Ok(stream);
        }
        if let Some(status) = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait()? {
            bail!("QEMU ended at once: {status}");
        }
        ensure!(Instant::now() < end, "QEMU does not connect");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The ends of the machine's logs, for an error message.
pub fn tail(dir: &Path) -> String {
    let last = |name: &str| {
        let text = fs::read(dir.join(name)).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        let lines: Vec<_> = text.lines().filter(|l| !l.contains("doesn't support requested feature")).collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    };
    [last("qemu.log"), last(CONSOLE)].join("\n").trim().to_owned()
}
