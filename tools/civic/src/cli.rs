//! The command line: every option, once.

#[cfg(test)]
mod documented;
mod inspect;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use civic_api::launch::{LaunchRequest, MovedDisk, RestoreConfig, SourceNet};
use civic_api::{
    AfterSave, BalloonConfig, ByteSize, CONSOLE_PORT_SERIAL, ConsoleConfig, DEVICE_WAIT_MS, ForksConfig, VmConfig,
    VsockConfig, validate_name,
};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::advice;
use crate::cp::Place;
use crate::devices::{DiskSpec, ForksSpec, NetSpec, StoreSpec, VsockSpec};
use crate::jail::JailSpec;
use crate::store::build_hooks::FileSpec;
pub use inspect::InspectArgs;

const EXAMPLES: &str = "\
Examples:
  civic run --name web --kernel vmlinuz --memory 1G --disk path=root.img --net tap=tap0
  civic run --name web --kernel vmlinuz --disk path=root.img --detach
  civic list
  civic stop web

Exit status: 0, or 125 when Civic could not do what was asked; the last line then says what to do.";

/// Runs virtual machines on KVM.
#[derive(Debug, Parser)]
#[command(name = "civic", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Where VMs' directories are, one for each with its socket and log.
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/civic", env = "CIVIC_RUN_DIR")]
    pub run_dir: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM.
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// List the VMs, running and dead.
    #[command(visible_alias = "ls", after_help = LIST_HELP)]
    List {
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show a VM's state, devices and counters.
    #[command(after_help = INFO_HELP)]
    Info {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// Show what kernel the guest runs, found in its memory; nothing in the guest helps.
        #[arg(long)]
        guest: bool,
        #[command(flatten)]
        files: KernelFiles,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Attach to a VM's console.
    #[command(after_help = CONSOLE_HELP)]
    Console {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// Which console; 'civic info' lists them.
        #[arg(long, default_value = CONSOLE_PORT_SERIAL)]
        port: String,
    },
    /// Hold a running VM.
    Pause {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
    },
    /// Let a paused VM go on.
    Resume {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
    },
    /// Press a VM's power button and wait until it is off.
    #[command(after_help = "Examples:\n  civic stop web\n  civic stop web --timeout 20 --force")]
    Stop {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// How long to wait for the guest, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
        /// End it as 'civic kill' does if it does not go by itself in time.
        #[arg(long)]
        force: bool,
    },
    /// Save a VM with its memory, to be restored later or elsewhere.
    #[command(after_help = SAVE_HELP)]
    Save {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// Where to: a directory that is empty or does not exist yet.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        #[command(flatten)]
        after: AfterArgs,
        /// Print a report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Fork a running VM: it runs on, and a child goes on from the same moment.
    #[command(after_help = FORK_HELP)]
    Fork(Box<ForkArgs>),
    /// Look into a running VM: fork it, run a program inside the fork, and discard that.
    #[command(after_help = INSPECT_HELP)]
    Inspect(Box<InspectArgs>),
    /// Run a program inside a fork, from outside: nothing in the guest needs to help.
    #[command(after_help = EXEC_HELP)]
    Exec(ExecArgs),
    /// Copy files into a fork or out of it, from outside: nothing in the guest needs to help.
    #[command(after_help = CP_HELP)]
    Cp(CpArgs),
    /// Show which VM was forked from which.
    Tree {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show a VM's balloon, or set how much memory it takes.
    #[command(after_help = BALLOON_HELP)]
    Balloon {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// How much memory to take from the guest, such as 256M; 0 gives all back.
        size: Option<ByteSize>,
        /// Print the balloon as JSON, with SIZE as it is just afterwards.
        #[arg(long)]
        json: bool,
    },
    /// Plug devices into a VM while it runs, or remove them.
    Device {
        #[command(subcommand)]
        command: DeviceCommand,
    },
    /// Build and check stores: images with tools that programs in a fork have as their root.
    Store {
        #[command(subcommand)]
        command: StoreCommand,
    },
    /// End a VM now, as if its plug were pulled.
    Kill {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
    },
    /// Check what this host can do and how to mend what it cannot.
    #[command(after_help = "Exit status: 0 if VMs can run here, else 125.")]
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a VM's counters in the format Prometheus reads.
    Metrics {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
    },
    /// Print a completion script for a shell.
    #[command(after_help = "Example:\n  civic completion bash > /etc/bash_completion.d/civic")]
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print a manual page.
    #[command(after_help = "Examples:\n  civic man run | man -l -\n  civic man device-add | man -l -")]
    Man {
        /// The command it is about, such as run or device-add; all of Civic without.
        command: Option<String>,
    },
}

/// What `civic device` does.
#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// Plug devices in and wait until the guest uses them.
    #[command(after_help = DEVICE_ADD_HELP)]
    Add {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        devices: NewDevices,
        /// How long to wait for the guest, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = DEVICE_WAIT_MS / 1000)]
        wait: u64,
        /// Print what was plugged in as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Have the guest give devices up, and close them.
    #[command(visible_alias = "rm", after_help = DEVICE_REMOVE_HELP)]
    Remove {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// The devices; 'civic device list' has their ids.
        #[arg(value_name = "ID", required = true)]
        ids: Vec<String>,
        /// How long to wait for the guest, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = DEVICE_WAIT_MS / 1000)]
        wait: u64,
        /// Take them away without asking the guest, which loses what it has not written yet.
        #[arg(long)]
        force: bool,
    },
    /// List a VM's devices, and whether its guest uses them.
    #[command(visible_alias = "ls")]
    List {
        /// The VM.
        #[arg(value_parser = name)]
        name: String,
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
    },
}

/// What `civic store` does.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Build a store from packages of the system's apt, with all that they depend on.
    #[command(after_help = STORE_BUILD_HELP)]
    Build(StoreBuildArgs),
    /// Check a store's image, and show what is in it.
    #[command(after_help = STORE_CHECK_HELP)]
    Check {
        /// The image.
        #[arg(value_name = "IMG")]
        image: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What `civic store build` is told.
#[derive(Debug, Args)]
pub struct StoreBuildArgs {
    /// The image to make.
    #[arg(value_name = "OUT")]
    pub image: PathBuf,
    /// A package to install. Repeat for more.
    #[arg(long = "package", value_name = "NAME", required = true, value_parser = package)]
    pub packages: Vec<String>,
    /// Copy a file or folder in; it becomes root's. Repeat for more.
    #[arg(long = "file", value_name = "SRC:DST", value_parser = FileSpec::parse)]
    pub files: Vec<FileSpec>,
    /// Run this script at the end, with the store as its root.
    #[arg(long, value_name = "SCRIPT")]
    pub setup: Option<PathBuf>,
    /// How large the file system is, such as 2G: what is in it and some room, if not given.
    #[arg(long)]
    pub size: Option<ByteSize>,
    /// The release that packages are from, if it is not that of this system.
    #[arg(long, visible_alias = "release", value_name = "NAME", requires = "sources", value_parser = suite)]
    pub suite: Option<String>,
    /// A file with apt sources, in place of those of this system. Repeat for more.
    #[arg(long, value_name = "FILE")]
    pub sources: Vec<PathBuf>,
    /// Replace the image if it is there.
    #[arg(long)]
    pub force: bool,
    /// Print a report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// A package's name, as Debian's policy has it.
fn package(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let rest = |byte: u8| plain(byte) || b"+-.".contains(&byte);
    match text.as_bytes() {
        [first, others @ ..] if plain(*first) && !others.is_empty() && others.iter().all(|byte| rest(*byte)) => {
            Ok(text.to_owned())
        }
        _ => Err("no package has such a name: it has small letters, digits, '+', '-' and '.'".into()),
    }
}

fn suite(text: &str) -> Result<String, String> {
    package(text).map_err(|_| "no release has such a name; one is 'bookworm'".into())
}

/// Devices to plug in.
#[derive(Clone, Debug, Default, Args)]
pub struct NewDevices {
    /// A disk, as 'civic run' takes it. Repeat for more. The id is by default the first of disk0, disk1, … that is free.
    #[arg(long = "disk", value_name = "SPEC")]
    pub disks: Vec<DiskSpec>,
    /// A network card, as 'civic run' takes it. Repeat for more.
    #[arg(long = "net", value_name = "SPEC")]
    pub nets: Vec<NetSpec>,
    /// A console port of this name: /dev/hvc1 and so on in the guest, 'civic console --port ID' outside. Repeat for more.
    #[arg(long = "console", value_name = "ID")]
    pub consoles: Vec<String>,
}

const DEVICE_ADD_HELP: &str = "\
The guest finds them by itself, if its kernel has ACPI hotplug of PCI devices, as those of distributions
have. They stay over a reset of the guest, and are saved and forked with the VM. Their ids and PCI
addresses are printed.

Examples:
  civic device add web --disk path=data.img,id=data
  civic device add web --net tap=tap1 --console tools --json";

const DEVICE_REMOVE_HELP: &str = "\
The command ends when what the guest wrote is on the host's storage, and the image or tap is free. Have
the guest unmount a file system first: it is asked, and agrees, whether or not it uses the device.

Examples:
  civic device remove web data
  civic device remove web disk1 net1 --wait 60";

const STORE_BUILD_HELP: &str = "\
Packages come from the archives that apt uses here, with its keys, passwords and proxies; the system itself
is not changed. Their scripts run in the store, and no service starts. It takes root, mmdebstrap and
e2fsprogs. The image takes no more of the disk than what is in it. Nothing is left if it is interrupted.

Examples:
  civic store build tools.img --package strace --package procps
  civic store build agent.img --package collectd --file collectd.conf:/etc/collectd/ --setup tune.sh --size 2G";

const STORE_CHECK_HELP: &str = "\
It is not mounted. Exit status: 0 if it is a sound store, else 125.

Examples:
  civic store check tools.img
  civic store check tools.img --json | jq .free_bytes";

const RUN_EXAMPLES: &str = "\
In the foreground the VM's serial console is on this terminal. Ctrl-] presses its power button,
Ctrl-] again ends it at once; so do SIGINT and SIGTERM. The command ends when the VM does.

Examples:
  civic run --name web --kernel vmlinuz --memory 1G --cpus 2 --disk path=root.img --net tap=tap0
  civic run --name web --kernel vmlinuz --initrd initrd.img --disk path=root.img \\
      --cmdline 'console=ttyS0 root=/dev/vda1 ro' --detach
  civic run --name tiny --kernel vmlinuz --initrd rescue.img --memory 128M
  civic run --name web --restore /saved/web
  civic run --name web2 --restore /saved/web --disk id=disk0,path=copy.img --net id=net0,tap=tap1 --detach
  civic run --name db --kernel vmlinuz --disk path=db.qcow2,format=qcow2,queues=4,bps=200M \\
      --vsock uds=/run/db.vsock --balloon

Environment:
  CIVIC_VMM      the monitor to start; else civic-vmm beside civic, else in PATH
  CIVIC_RUN_DIR  as --run-dir";

const SAVE_HELP: &str = "\
The VM stands still while it is saved, and ends then unless told otherwise. Its disks are not copied:
they must be as they are now when it is restored with 'civic run --restore DIR', so copy them first if
it is to run on. Interrupting the command does not stop the saving.

Examples:
  civic save web /saved/web
  civic save web /saved/web --keep-paused && cp root.img /saved/ && civic resume web";

const BALLOON_HELP: &str = "\
The VM must have been started with --balloon. The guest gives memory as it can: what it has given is
shown as 'actual', and the figures below it are the guest's own.

Examples:
  civic balloon web 256M
  civic balloon web --json | jq .actual_bytes";

const LIST_HELP: &str = "\
A dead VM is one whose monitor ended badly and left its log; starting a VM of that name clears it
away.

Examples:
  civic list
  civic list --json | jq -r '.[] | select(.state == \"running\") | .name'";

const INFO_HELP: &str = "\
With --guest, the kernel that the guest runs is found from outside: in its memory and its vCPUs'
registers, for which they stand still for less than a millisecond.

Examples:
  civic info web
  civic info web --json | jq .state
  civic info web --guest";

const CONSOLE_HELP: &str = "\
Shows what the console printed last, then what it prints. On a terminal, what is typed goes to the
guest, Ctrl-C too, and Ctrl-] detaches: the VM runs on. Otherwise standard input goes to the guest as
it is; at its end, output is shown until the VM ends.

Examples:
  civic console web
  echo 'systemctl restart nginx' | timeout 10 civic console web";

// clap makes a line's end of "{n}": an escape sequence that changes nothing, and that it knows to leave out, keeps it from that.
const FORK_HELP: &str = "\
The VM stands still for some milliseconds and runs on. The child has the same memory, shared page by page until either
writes, and the same disks as of that moment; what it writes vanishes with it. Its network cards are on wires that lead
nowhere unless --source-net says otherwise, its vsock connections are reset, its generation id is new. The child's name is
printed when it runs.

With --count, the children are NAME-1, NAME-2 and so on, all from the same moment. What --disk, --net and --console
say, each child has besides, plugged in before its guest runs; '{\u{1b}[0mn}' in a path, tap or id is the child's number.

Examples:
  civic fork web --name web-1
  civic fork web --name probe --count 4 --paused --json
  civic fork web --name web-1 --source-net mirror --net tap=tap1
  civic fork web --name web-1 --overlay-dir /scratch
  civic fork web --name web-1 --store tools.img
  civic fork web --name probe --count 2 --store tools.img,overlay
  civic fork web --name probe --count 2 --disk path=results-{\u{1b}[0mn}.img,id=results --net tap=probe{\u{1b}[0mn}";

const INSPECT_HELP: &str = "\
The VM stands still for some milliseconds and runs on. A fork of it gets the store and the cards, the program is started
inside it from outside, and the fork is discarded when the program has ended, whatever comes: nothing of it is left but
what was written to the store or to disks of its own. Ctrl-C, SIGTERM and SIGHUP end the program first; once more, and
they do not wait for it. docs/inspect.md tells more.

With a store the program's / is the store, and the fork's own root is at /guest. What is written to the store is there
in the next round: it is unmounted in order before the fork goes.

The program has this command's input and outputs; with --count or --every it has no input. Of several children each line
has the child's number before it. With --every, a round that Civic cannot do is told, and the next one is tried, unless
it was the first.

Exit status: the program's own, as of 'civic exec'; of the last round with --every; with --count the first that is not 0;
125 for Civic's own failures, 128 and the signal's number when interrupted.

Examples:
  civic inspect web -- /bin/ps aux
  civic inspect web --store tools.img -- strace -c -p 812
  civic inspect web --freeze --store tools.img --every 10s --rounds 6 --json -- collect
  civic inspect web --store tools.img,overlay --count 4 -- sh -c 'tune {\u{1b}[0mn}'
  civic inspect web --source-net mirror --net tap=tap1,id=own --ip own=10.0.0.2/24 -- ss -tn
  civic inspect web --keep --tty -- /bin/sh";

const EXEC_HELP: &str = "\
The program is brought into the fork's kernel from outside, and gets this command's input, outputs and
signals. With a store, its / is the store and the guest's own root is at /guest; without one, or with
--root guest, it is the guest's.

Exit status: the program's own; 128 and the signal's number if one ended it; 126 if it cannot be
executed, 127 if it is not there, 124 if it took longer than --timeout, 125 for Civic's own failures.

Examples:
  civic exec web-1 -- /bin/ps aux
  civic exec --tty web-1 -- /bin/sh
  civic exec --freeze web-1 -- strace -f -p 812";

const CP_HELP: &str = "\
One of SOURCE and DESTINATION is NAME:PATH, a fork and an absolute path in it; the other is a path here, or
- for a tar stream on standard input or output. A path here that has a colon needs a ./ before it.

A file or folder goes into a DESTINATION that is a folder, under its own name; else the DESTINATION is its new
name, and the folder that this is in must be there. Of a folder whose path ends with /. only what is in it is
copied. A tar stream is unpacked in a folder that is there. Folders go whole; what is there already is
replaced, file by file, and folders that are there stay as they are. Symbolic links are copied as such, and none
is followed below SOURCE and DESTINATION; several names of one file become several files; devices, sockets
and FIFOs are left out.

Modes and times are kept. What goes into the guest is root's there, and what comes out is yours and loses its
set-user-ID and set-group-ID bits, unless --archive is given; a tar stream has its owners anyway.

Examples:
  civic cp web-1:/var/log/nginx .
  civic cp tools web-1:/opt/
  civic cp web-1:/etc - | tar tv
  tar c -C tools . | civic cp - web-1:/opt";

/// What `civic cp` is told.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// What to copy.
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(Place::parse))]
    pub source: Place,
    /// Where to.
    #[arg(value_name = "DESTINATION", value_parser = OsStringValueParser::new().try_map(Place::parse))]
    pub destination: Place,
    /// Keep owners and groups, by number, and the bits for set-user-ID and set-group-ID.
    #[arg(long, short = 'a')]
    pub archive: bool,
    /// What the path in the fork begins at: the store if there is one, if not given.
    #[arg(long, value_name = "ROOT")]
    pub root: Option<RootArg>,
    /// Stop the guest's processes while files are copied, so that these are of one moment: by SIGSTOP, or by the freezer of their control groups.
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "stop")]
    pub freeze: Option<FreezeArg>,
    /// How long it may take to begin, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = civic_api::PROGRAM_WAIT_MS / 1000)]
    pub wait: u64,
    /// Print a report as JSON: files, bytes, microseconds; on standard error if the files are on standard output.
    #[arg(long)]
    pub json: bool,
}

/// What `civic exec` is told.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The fork.
    #[arg(value_parser = name)]
    pub name: String,
    /// Tell on standard error how long what took, as JSON.
    #[arg(long)]
    pub stages: bool,
    #[command(flatten)]
    pub program: ProgramArgs,
}

/// A program to be started from outside, and how.
#[derive(Clone, Debug, Args)]
pub struct ProgramArgs {
    /// Stop the guest's processes while the program runs: by SIGSTOP, or by the freezer of their control groups.
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "stop")]
    pub freeze: Option<FreezeArg>,
    /// Give the program a terminal: this one.
    #[arg(long, short = 't')]
    pub tty: bool,
    /// What the program sees as /: the store if there is one, if not given.
    #[arg(long, value_name = "ROOT")]
    pub root: Option<RootArg>,
    /// A variable of its environment, NAME=VALUE.
    #[arg(long, short = 'e', value_name = "VARIABLE", value_parser = variable)]
    pub env: Vec<String>,
    /// Its working directory; / if not given.
    #[arg(long, short = 'w', value_name = "DIR")]
    pub workdir: Option<String>,
    /// Set up a network card of the fork's first, and take its others down: CARD=ADDRESS/BITS[,gw=ADDRESS][,mtu=BYTES][,keep-others].
    #[arg(long, value_name = "CARD", value_parser = program_network)]
    pub ip: Option<civic_api::ProgramNetwork>,
    /// Its user, and group: numbers. Root's if not given.
    #[arg(long, short = 'u', value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, u32)>,
    /// A real-time process (SCHED_FIFO) of this priority: it goes on where the guest's own processes take all time.
    #[arg(long, value_name = "PRIORITY", value_parser = clap::value_parser!(u8).range(1..=99))]
    pub realtime: Option<u8>,
    /// Its niceness.
    #[arg(long, value_name = "NICENESS", value_parser = clap::value_parser!(i8).range(-20..=19), allow_hyphen_values = true)]
    pub nice: Option<i8>,
    #[command(flatten)]
    pub files: KernelFiles,
    /// How long it may run, in seconds: then it is ended, and killed 5 seconds later.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// How long it may take to have it started, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = civic_api::PROGRAM_WAIT_MS / 1000)]
    pub wait: u64,
    /// The program and its arguments.
    #[arg(required = true, last = true, value_name = "PROGRAM")]
    pub argv: Vec<String>,
}

/// Files that belong to the guest's kernel.
#[derive(Clone, Debug, Default, Args)]
pub struct KernelFiles {
    /// The System.map of the guest's kernel, for one that was built without its symbols.
    #[arg(long, value_name = "FILE")]
    pub system_map: Option<PathBuf>,
    /// The vmlinux of the guest's kernel, with symbols.
    #[arg(long, value_name = "FILE")]
    pub vmlinux: Option<PathBuf>,
}

impl KernelFiles {
    /// As the monitor wants them.
    pub fn absolute(&self) -> anyhow::Result<civic_api::GuestFiles> {
        let path = |path: &Option<PathBuf>, flag| path.as_ref().map(|path| absolute(path, flag)).transpose();
        Ok(civic_api::GuestFiles {
            system_map: path(&self.system_map, "--system-map")?,
            vmlinux: path(&self.vmlinux, "--vmlinux")?,
        })
    }
}

/// `--freeze`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum FreezeArg {
    /// SIGSTOP to all processes but the first.
    Stop,
    /// The freezer of all control groups but the root's; as 'stop' where there is none.
    Cgroup,
}

impl From<FreezeArg> for civic_api::Freeze {
    fn from(arg: FreezeArg) -> Self {
        match arg {
            FreezeArg::Stop => Self::Stop,
            FreezeArg::Cgroup => Self::Cgroup,
        }
    }
}

/// `--root`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum RootArg {
    /// The store, with the guest's root at /guest.
    Store,
    /// The guest's own.
    Guest,
}

impl From<RootArg> for civic_api::ProgramRoot {
    fn from(arg: RootArg) -> Self {
        match arg {
            RootArg::Store => Self::Store,
            RootArg::Guest => Self::Guest,
        }
    }
}

fn user(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| text.parse().map_err(|_| format!("'{text}' is no number of a user or group"));
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    Ok((number(uid)?, number(gid)?))
}

fn program_network(text: &str) -> Result<civic_api::ProgramNetwork, String> {
    let (card, rest) = text.split_once('=').ok_or("what is wanted is CARD=ADDRESS/BITS")?;
    let (address, options) = rest.split_once(',').unwrap_or((rest, ""));
    let address = address.parse().map_err(|_| format!("'{address}' is no IPv4 address with /BITS behind it"))?;
    let mut network =
        civic_api::ProgramNetwork { id: card.into(), address, gateway: None, mtu: None, keep_others: false };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        let value = |value: &str| format!("'{value}' is no value of '{option}'");
        match option.split_once('=') {
            Some(("gw", gateway)) => network.gateway = Some(gateway.parse().map_err(|_| value(gateway))?),
            Some(("mtu", mtu)) => network.mtu = Some(mtu.parse().map_err(|_| value(mtu))?),
            None if option == "keep-others" => network.keep_others = true,
            _ => return Err(format!("'{option}' is none of gw=, mtu=, keep-others")),
        }
    }
    Ok(network)
}

fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("'{text}' is not NAME=VALUE")),
    }
}

/// What `civic fork` is told.
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// The VM to fork.
    #[arg(value_parser = name)]
    pub source: String,
    /// The child's name.
    #[arg(long, value_parser = name)]
    pub name: String,
    /// How many children.
    #[arg(long, default_value_t = 1)]
    pub count: usize,
    /// Keep the children paused, to be resumed one by one.
    #[arg(long)]
    pub paused: bool,
    #[command(flatten)]
    pub child: ChildArgs,
    /// Print a report as JSON: names, and where the time went.
    #[arg(long)]
    pub json: bool,
}

/// What a fork is to be, besides what its source is.
#[derive(Clone, Debug, Args)]
pub struct ChildArgs {
    /// A folder on the file system that takes what the children write to their disks; /var/tmp if not given.
    #[arg(long, value_name = "DIR")]
    pub overlay_dir: Option<PathBuf>,
    /// What the network cards that the child has of its source are connected to. Whatever it is, nobody ever hears what they send.
    #[arg(long, value_name = "TO", default_value = "isolated")]
    pub source_net: SourceNetArg,
    #[command(flatten)]
    pub devices: NewDevices,
    /// A disk of tools: FILE[,overlay][,id=ID]. Its serial number in the guest is civic-store unless an id is given. What a child
    /// writes to it is there for the next; one child at a time has it, or, with 'overlay', as many as want, each with writes of its own
    /// that go with it.
    #[arg(long, value_name = "SPEC")]
    pub store: Option<StoreSpec>,
    /// Where the child's audit log is; if not given, and its source has one, beside that. Of several children each has one with its name behind it.
    #[arg(long, value_name = "FILE")]
    pub audit: Option<PathBuf>,
    /// Run the children's monitors, and the page server, in jails, as 'civic run --jail' does. A jailed VM's forks are jailed anyway.
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub jail: Option<JailSpec>,
}

/// As [`SourceNet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SourceNetArg {
    /// Wires that lead nowhere
    Isolated,
    /// Nothing: the guest sees that the cable is out
    Down,
    /// Wires on which comes a copy of what the source receives
    Mirror,
}

impl From<SourceNetArg> for SourceNet {
    fn from(arg: SourceNetArg) -> Self {
        match arg {
            SourceNetArg::Isolated => Self::Isolated,
            SourceNetArg::Down => Self::Down,
            SourceNetArg::Mirror => Self::Mirror,
        }
    }
}

/// What becomes of a VM that was saved.
#[derive(Debug, Args)]
pub struct AfterArgs {
    /// Let the VM run on once it is saved.
    #[arg(long, conflicts_with = "keep_paused")]
    keep_running: bool,
    /// Keep the VM paused once it is saved.
    #[arg(long)]
    keep_paused: bool,
}

impl AfterArgs {
    pub fn then(&self) -> AfterSave {
        match (self.keep_running, self.keep_paused) {
            (true, _) => AfterSave::Resume,
            (_, true) => AfterSave::Pause,
            _ => AfterSave::Stop,
        }
    }
}

/// Guest memory unless another size is asked for.
const DEFAULT_MEMORY: ByteSize = ByteSize(512 << 20);

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The VM's name: a-z, 0-9, '.', '_' and '-'.
    #[arg(long, value_parser = name)]
    pub name: String,
    /// Kernel: a bzImage (a distribution's vmlinuz) or an uncompressed vmlinux. With --restore, where it is now.
    #[arg(long, value_name = "FILE", required_unless_present = "restore")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk. With --restore, where it is now.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line. By default 'console=ttyS0', and with a disk and no initrd also 'root=/dev/vda rw'.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Guest memory, such as 512M, 1G or 1.5G: 16M to 64G in steps of 2M. By default 512M.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// vCPUs, 1 to 16. By default 1.
    #[arg(long, value_name = "COUNT")]
    pub cpus: Option<u8>,
    /// A disk: path=FILE[,id=ID][,ro|overlay][,format=raw|qcow2][,backing][,queues=N][,bps=SIZE][,iops=N]. Repeat for more: /dev/vda,
    /// /dev/vdb, … in the guest. A comma in FILE is doubled. The id is the disk's serial number in the guest, by default
    /// disk0, disk1, … 'ro' refuses writes; 'overlay' leaves FILE as it is and forgets them with the VM. The format is raw unless said otherwise; 'backing' lets a qcow2 image name the
    /// file it is based on. 'bps' (bytes) and 'iops' (requests) limit what it does in a second.
    #[arg(long = "disk", value_name = "SPEC")]
    pub disks: Vec<DiskSpec>,
    /// A network card: tap=NAME[,mac=ADDRESS][,id=ID][,queues=N][,mtu=N][,rx-bps=SIZE][,rx-pps=N][,tx-bps=SIZE][,tx-pps=N].
    /// Repeat for more. The id is by default net0, net1, … More than one pair of queues needs a tap made with 'multi_queue'.
    /// The limits are in bytes (bps) and packets (pps) a second, of what the guest receives (rx) and sends (tx).
    #[arg(long = "net", value_name = "SPEC")]
    pub nets: Vec<NetSpec>,
    /// A console port of this name besides 'serial' and 'hvc0': /dev/hvc1 and so on in the guest. Repeat for more.
    #[arg(long = "console", value_name = "ID")]
    pub consoles: Vec<String>,
    /// Sockets between guest and host: uds=PATH[,cid=N]. The host connects to the unix socket PATH; the guest's connections
    /// to the host's port N go to PATH_N. The guest's context id is 3 unless given.
    #[arg(long, value_name = "SPEC")]
    pub vsock: Option<VsockSpec>,
    /// A memory balloon: the guest gives back the memory it has no use for; with SIZE, that much more is taken from it.
    #[arg(long, value_name = "SIZE", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub balloon: Option<ByteSize>,
    /// What may be kept for this VM's forks before it overwrites it: [memory=SIZE][,disk=SIZE][,dir=DIR]. At a limit the oldest
    /// fork is given up. By default as much as it has memory, 64G of each disk, in /var/tmp.
    #[arg(long, value_name = "OPTIONS")]
    pub forks: Option<ForksSpec>,
    /// Let the VM go on that 'civic save' put into DIR, which is only read. Kernel, memory, vCPUs and devices are as they were;
    /// --disk id=ID,path=FILE, --net id=ID,tap=NAME and --vsock uds=PATH say what is elsewhere now.
    #[arg(long, value_name = "DIR")]
    pub restore: Option<PathBuf>,
    /// Restore although a disk has been written to since the VM was saved, which damages its file system.
    #[arg(long, requires = "restore")]
    pub allow_changed_disks: bool,
    /// Return as soon as the guest has started, and let it run on its own.
    #[arg(long)]
    pub detach: bool,
    /// Let guest memory exceed what this host has available.
    #[arg(long)]
    pub overcommit: bool,
    /// Start even where KVM seems unable to run stock kernels.
    #[arg(long)]
    pub any_kvm: bool,
    /// Run the monitor in a jail: as a user of its own that sees only what the VM needs. Options, joined by commas: users=FIRST-LAST (200000-265535),
    /// net=none|host|PATH, memory=SIZE, cpu=PERCENT, threads=N, io-bps=SIZE, io-iops=N (limits, by control groups), cgroup=GROUP, and
    /// read=DIR and write=DIR for what is to be plugged in, saved or restored later.
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub jail: Option<JailSpec>,
    /// Let programs be started in this VM itself by 'civic exec', and not only in its forks: to bring to it what was tried in a fork.
    #[arg(long)]
    pub allow_programs: bool,
    /// Write down there, a line of JSON each, who asks this VM for what, and what comes of it; a fork of it writes to FILE.NAME. What cannot be written
    /// down is not done.
    #[arg(long, value_name = "FILE")]
    pub audit: Option<PathBuf>,
}

/// A path that may be given.
fn elsewhere(path: &Option<PathBuf>, flag: &str) -> anyhow::Result<Option<PathBuf>> {
    path.as_deref().map(|path| absolute(path, flag)).transpose()
}

impl RunArgs {
    /// What to ask of the monitor: paths absolute, ids filled in, checked. An error names the option.
    pub fn request(&self) -> anyhow::Result<LaunchRequest> {
        match &self.restore {
            Some(from) => Ok(LaunchRequest::Restore(self.restoration(from)?)),
            None => Ok(LaunchRequest::Boot(self.config()?)),
        }
    }

    fn config(&self) -> anyhow::Result<VmConfig> {
        let Some(kernel) = &self.kernel else {
            return Err(advice::error("there is no kernel", "give one with --kernel, or a saved VM with --restore"));
        };
        let mut disks = Vec::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let mut disk = disk.config(index);
            disk.path = absolute(&disk.path, "--disk")?;
            disks.push(disk);
        }
        let vsock = |spec: &VsockSpec| {
            let vsock = spec.config();
            anyhow::Ok(VsockConfig { uds: absolute(&vsock.uds, "--vsock")?, ..vsock })
        };
        let forks = |ForksSpec(forks): &ForksSpec| {
            let dir = forks.dir.as_ref().map(|dir| absolute(dir, "--forks")).transpose()?;
            anyhow::Ok(ForksConfig { dir, ..forks.clone() })
        };
        let config = VmConfig {
            name: self.name.clone(),
            kernel: absolute(kernel, "--kernel")?,
            initrd: elsewhere(&self.initrd, "--initrd")?,
            cmdline: self.cmdline.clone(),
            memory_bytes: self.memory.unwrap_or(DEFAULT_MEMORY).0,
            cpus: self.cpus.unwrap_or(1),
            disks,
            nets: self.nets.iter().enumerate().map(|(index, net)| net.config(index)).collect(),
            consoles: self.consoles.iter().map(|id| ConsoleConfig { id: id.clone() }).collect(),
            vsock: self.vsock.as_ref().map(vsock).transpose()?,
            balloon: self.balloon.map(|size| BalloonConfig { target_bytes: size.0 }),
            forks: self.forks.as_ref().map(forks).transpose()?.unwrap_or_default(),
            overcommit: self.overcommit,
            any_kvm: self.any_kvm,
            allow_programs: self.allow_programs,
            audit: elsewhere(&self.audit, "--audit")?,
        };
        config.validate().map_err(|error| {
            let flag = error.field().flag();
            advice::error(format!("{flag}: {error}"), format!("change {flag}; 'civic run --help' says what it takes"))
        })?;
        Ok(config)
    }

    /// The VM saved in `from`. What it was saved with cannot be given anew.
    fn restoration(&self, from: &Path) -> anyhow::Result<RestoreConfig> {
        let saved_with = [
            ("--cmdline", self.cmdline.is_some()),
            ("--memory", self.memory.is_some()),
            ("--cpus", self.cpus.is_some()),
            ("--balloon", self.balloon.is_some()),
            ("--forks", self.forks.is_some()),
            ("--console", !self.consoles.is_empty()),
            ("--allow-programs", self.allow_programs),
        ];
        if let Some((flag, _)) = saved_with.into_iter().find(|(_, given)| *given) {
            let message = format!("{flag}: a restored VM has what it was saved with");
            return Err(advice::error(message, format!("leave {flag} out, or boot a VM without --restore")));
        }
        let wrong = |flag: &str, error: String| {
            advice::error(format!("{flag}: {error}"), format!("change {flag}; 'civic run --help' says what it takes"))
        };
        let disk = |spec: &DiskSpec| {
            let disk = spec.moved().map_err(|error| wrong("--disk", error))?;
            anyhow::Ok(MovedDisk { path: absolute(&disk.path, "--disk")?, ..disk })
        };
        let vsock = |spec: &VsockSpec| {
            let uds = spec.moved().map_err(|error| wrong("--vsock", error))?;
            absolute(&uds, "--vsock")
        };
        Ok(RestoreConfig {
            name: self.name.clone(),
            restore: absolute(from, "--restore")?,
            disks: self.disks.iter().map(disk).collect::<anyhow::Result<_>>()?,
            nets: self
                .nets
                .iter()
                .map(|net| net.moved().map_err(|error| wrong("--net", error)))
                .collect::<anyhow::Result<_>>()?,
            vsock: self.vsock.as_ref().map(vsock).transpose()?,
            kernel: elsewhere(&self.kernel, "--kernel")?,
            initrd: elsewhere(&self.initrd, "--initrd")?,
            allow_changed_disks: self.allow_changed_disks,
            overcommit: self.overcommit,
            any_kvm: self.any_kvm,
            audit: elsewhere(&self.audit, "--audit")?,
        })
    }
}

pub fn absolute(path: &Path, flag: &str) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).map_err(|error| {
        advice::error(format!("{flag} '{}': {error}", path.display()), format!("give a path to {flag}"))
    })
}

/// A VM's name: it becomes part of paths, so it is checked before anything is done with it.
fn name(text: &str) -> Result<String, String> {
    validate_name(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// The command that names `civic-vmm` in the environment.
pub fn vmm_from_environment() -> Option<OsString> {
    std::env::var_os("CIVIC_VMM").filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run_args(line: &str) -> Result<RunArgs, clap::Error> {
        match Cli::try_parse_from(line.split_whitespace())?.command {
            Command::Run(args) => Ok(*args),
            command => panic!("{command:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_and_command_has_help() {
        let cli = Cli::command();
        for command in cli.get_subcommands().flat_map(|command| [command].into_iter().chain(command.get_subcommands()))
        {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments().filter(|arg| arg.get_long().is_some()) {
                assert!(arg.get_help().is_some(), "{} --{:?}", command.get_name(), arg.get_long());
            }
        }
    }

    #[test]
    fn a_vm_from_the_command_line() {
        let line = "civic run --name web --kernel /k --initrd i --memory 1.5G --cpus 2 --disk path=/a,ro --disk path=b,id=data \
                    --net tap=tap0,mac=52:54:00:00:00:01 --detach --run-dir /tmp/r";
        let args = run_args(line).unwrap();
        assert!(args.detach);
        let config = args.config().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(config.initrd, Some(here.join("i")));
        assert_eq!(config.memory_bytes, 3 << 29);
        let disks: Vec<_> = config.disks.iter().map(|d| (d.id.as_str(), d.path.clone(), d.read_only)).collect();
        assert_eq!(disks, [("disk0", "/a".into(), true), ("data", here.join("b"), false)]);
        assert_eq!(config.nets[0].id, "net0");
        assert_eq!(config.cmdline, None);
        assert_eq!((config.vsock, config.balloon), (None, None));
    }

    #[test]
    fn devices_from_the_command_line() {
        let config =
            |options: &str| run_args(&format!("civic run --name web --kernel /k {options}")).unwrap().config().unwrap();
        let here = std::env::current_dir().unwrap();
        let vsock = config("--vsock uds=v,cid=9").vsock;
        assert_eq!(vsock, Some(VsockConfig { uds: here.join("v"), cid: Some(9) }));
        let forks = config("--forks disk=1G,dir=d").forks;
        assert_eq!(forks, ForksConfig { disk_bytes: Some(1 << 30), dir: Some(here.join("d")), memory_bytes: None });
        let target = |options: &str| config(options).balloon.unwrap().target_bytes;
        assert_eq!(target("--balloon"), 0);
        assert_eq!(target("--balloon=100M"), 100 << 20);
        // What follows is no size unless '=' says so.
        assert_eq!(target("--balloon --detach"), 0);
        assert!(run_args("civic run --name web --kernel /k --balloon 1M").is_err());
        let disk = &config("--disk path=/a,format=qcow2,backing,queues=2,bps=1M").disks[0];
        assert_eq!((disk.format.as_str(), disk.backing, disk.queues), ("qcow2", true, Some(2)));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_option() {
        let error = |options: &str| {
            let line = format!("civic run --name web --kernel /k {options}");
            let told = match run_args(&line) {
                Err(error) => error.to_string(),
                Ok(args) => advice::told(&args.request().unwrap_err()),
            };
            assert!(!told.trim().is_empty());
            told
        };
        assert!(error("--memory 1X").contains("--memory"));
        assert!(error("--memory 1M").contains("--memory: 1M of memory"));
        assert!(error("--memory 17M").contains("--memory: 17825792 bytes of memory: must be a multiple of 2M"));
        assert!(error("--cpus 0").contains("--cpus: 0 vCPUs"));
        assert!(error("--cpus 99").contains("--cpus"));
        assert!(error("--disk root.img").contains("--disk"));
        assert!(error("--disk path=/a --disk path=/a").contains("--disk: the image /a is given to two disks"));
        assert!(error("--net tap=a/b").contains("--net"));
        assert!(error("--net tap=a,mac=01:00:00:00:00:00").contains("--net"));
        assert!(error("--disk path=/a,backing").contains("--disk: 'disk0' is a raw image"));
        assert!(error("--disk path=/a,queues=17").contains("--disk: 17 queues for 'disk0': must be 1 to 16"));
        assert!(error("--disk path=/a,iops=0").contains("--disk: a rate limit of 0 would stop 'disk0'"));
        assert!(error("--disk path=/a,id=vsock").contains("--disk: the id 'vsock' is kept"));
        assert!(error("--net tap=a,mtu=60").contains("--net: an MTU of 60 for 'net0'"));
        assert!(error("--vsock uds=/v,cid=2").contains("--vsock: 2 is no context id"));
        assert!(error(&format!("--vsock uds=/{}", "v".repeat(96))).contains("--vsock: the path"));
        assert!(error("--vsock /v").contains("--vsock"));
        assert!(error("--balloon=500M").contains("--balloon: a balloon of 500M"));
        assert!(error("--forks memory=1K").contains("--forks: 1024 bytes kept for forks are too few"));
        assert!(error("--balloon=1X").contains("--balloon"));
        for name in ["../x", "A", ""] {
            assert!(Cli::try_parse_from(["civic", "info", name]).is_err(), "{name}");
        }
    }

    #[test]
    fn a_restored_vm() {
        let request =
            |options: &str| run_args(&format!("civic run --name web --restore saved {options}")).unwrap().request();
        let here = std::env::current_dir().unwrap();
        let LaunchRequest::Restore(plain) = request("").unwrap() else { panic!("not a restore") };
        assert_eq!((plain.name.as_str(), &plain.restore), ("web", &here.join("saved")));
        assert!(!plain.allow_changed_disks && plain.disks.is_empty() && plain.nets.is_empty() && plain.vsock.is_none());
        let options = "--disk id=disk0,path=copy --net id=net0,tap=t --vsock uds=v --allow-changed-disks --any-kvm";
        let LaunchRequest::Restore(moved) = request(options).unwrap() else { panic!("not a restore") };
        assert_eq!((moved.disks[0].id.as_str(), &moved.disks[0].path), ("disk0", &here.join("copy")));
        assert_eq!((moved.nets[0].id.as_str(), moved.nets[0].tap.as_str()), ("net0", "t"));
        assert_eq!(moved.vsock, Some(here.join("v")));
        assert!(moved.allow_changed_disks && moved.any_kvm && !moved.overcommit);
        let LaunchRequest::Restore(moved) = request("--kernel k --initrd i").unwrap() else { panic!("not a restore") };
        assert_eq!((moved.kernel, moved.initrd), (Some(here.join("k")), Some(here.join("i"))));
        for option in ["--cmdline x", "--memory 1G", "--cpus 1", "--balloon"] {
            let told = advice::told(&request(option).unwrap_err());
            let flag = option.split(' ').next().unwrap();
            assert!(told.starts_with(&format!("civic: {flag}: a restored VM has what it was saved with\n")), "{told}");
        }
        for (option, part) in [
            ("--disk path=copy", "--disk: a restored VM's devices are as they were saved: write id=ID,path=FILE"),
            ("--net tap=t", "--net: a restored VM's devices are as they were saved: write id=ID,tap=NAME"),
            ("--vsock uds=v,cid=4", "--vsock: a restored VM's devices are as they were saved: write uds=PATH"),
        ] {
            let told = advice::told(&request(option).unwrap_err());
            assert!(told.contains(part), "{told}");
        }
        assert!(run_args("civic run --name web --kernel k --allow-changed-disks").is_err());
        assert!(run_args("civic run --name web").unwrap_err().to_string().contains("--kernel"));
    }

    #[test]
    fn a_programs_card_and_user() {
        let args =
            |options: &str| match Cli::try_parse_from(format!("civic exec web-1 {options} -- ps").split_whitespace())?
                .command
            {
                Command::Exec(args) => Ok::<_, clap::Error>(args.program),
                command => panic!("{command:?}"),
            };
        let all =
            args("--ip own=10.0.0.2/24,gw=10.0.0.1,mtu=1400,keep-others --user 33:34 --realtime 9 --nice -5").unwrap();
        let ip = all.ip.unwrap();
        assert_eq!((ip.id.as_str(), ip.address.to_string().as_str(), ip.mtu), ("own", "10.0.0.2/24", Some(1400)));
        assert_eq!((ip.gateway, ip.keep_others), (Some([10, 0, 0, 1].into()), true));
        assert_eq!((all.user, all.realtime, all.nice), (Some((33, 34)), Some(9), Some(-5)));
        assert_eq!(args("-u 33").unwrap().user, Some((33, 0)));
        for wrong in [
            "--ip own",
            "--ip own=10.0.0.2",
            "--ip own=10.0.0.2/33",
            "--ip own=10.0.0.2/24,x",
            "--user web",
            "--realtime 0",
            "--nice 20",
        ] {
            assert!(args(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn saving() {
        let then = |options: &str| match Cli::try_parse_from(format!("civic save web /s{options}").split(' '))?.command
        {
            Command::Save { after, .. } => Ok::<_, clap::Error>(after.then()),
            command => panic!("{command:?}"),
        };
        assert_eq!(then("").unwrap(), AfterSave::Stop);
        assert_eq!(then(" --keep-running").unwrap(), AfterSave::Resume);
        assert_eq!(then(" --keep-paused --json").unwrap(), AfterSave::Pause);
        assert!(then(" --keep-paused --keep-running").is_err());
    }

    #[test]
    fn places_to_copy_from_and_to() {
        let place = |text: &str| match Cli::try_parse_from(["civic", "cp", text, "-"])?.command {
            Command::Cp(args) => Ok::<_, clap::Error>(args.source),
            command => panic!("{command:?}"),
        };
        let guest = |name: &str, path: &str| Place::Guest { name: name.into(), path: path.into() };
        assert_eq!(place("web:/etc").unwrap(), guest("web", "/etc"));
        assert_eq!(place("web:/a:b/.").unwrap(), guest("web", "/a:b/."));
        assert_eq!(place("-").unwrap(), Place::Stream);
        for path in ["a", "./a:b", "/a:/b", "a/b:/c", ".."] {
            assert_eq!(place(path).unwrap(), Place::Here(path.into()));
        }
        for wrong in ["web:", "web:etc", "Web:/etc", ":/etc", ""] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_global_option_stands_anywhere() {
        for line in ["civic --run-dir /r list", "civic list --run-dir /r", "civic ls --run-dir=/r --json"] {
            assert_eq!(Cli::try_parse_from(line.split(' ')).unwrap().run_dir, PathBuf::from("/r"));
        }
    }
}
