//! What the peer's guest runs in its kernel: the code of the CIVIC paper's section 3.5, for today's kernels.
//!
//! ```text
//!  schedule():  jmp stub       where the kernel has five bytes to spare
//!  stub         the first to come queues a user-mode helper; back to behind the jump
//!  init         in the helper's own task, which may sleep: waits for the store's disk and mounts it
//!  data         the helper's path, arguments and environment
//! ```
//!
//! The paper mounts at `schedule()` itself; there a task may hold locks and must not sleep, so it is done in the helper's task here.

/// Virtual addresses of what the code calls.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    pub call_usermodehelper_setup: u64,
    pub call_usermodehelper_exec: u64,
    pub kern_path: u64,
    pub path_put: u64,
    pub path_mount: u64,
    pub usleep_range_state: u64,
}

/// What the helper runs, and from where.
#[derive(Clone, Copy, Debug)]
pub struct Helper<'a> {
    /// The store's disk.
    pub device: &'a str,
    /// The folder that it is mounted at.
    pub folder: &'a str,
    /// The program's path in the guest, and its other arguments.
    pub argv: &'a [&'a str],
}

/// Bytes of the jump.
pub const JUMP: usize = 5;
/// What stands where the jump is to: ftrace's place, while nobody traces.
pub const SPARE: [u8; JUMP] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
/// How often, and with which pauses in microseconds, the disk is looked for; the pause is that of Civic's loader.
const LOOKS: u32 = 20_000;
const PAUSE_US: u32 = 3000;
/// `LOOKUP_FOLLOW` (include/linux/namei.h), `TASK_UNINTERRUPTIBLE` (include/linux/sched.h).
const LOOKUP_FOLLOW: u32 = 1;
const UNINTERRUPTIBLE: u32 = 2;
const ENODEV: u32 = -19_i32 as u32;

/// The jump that is to stand at `spare`, and the code that is to be at `at`, with its data. A flag that is zero, in memory that the guest
/// can write, is at `claim`.
pub fn assemble(targets: &Targets, helper: &Helper<'_>, spare: u64, at: u64, claim: u64) -> ([u8; JUMP], Vec<u8>) {
    // Where the data is depends on how long the code is, which does not depend on where the data is.
    let mut data = Data::new(at);
    let len = code(targets, &data.lay(helper), spare, at, claim).len() as u64;
    data = Data::new(at + len.next_multiple_of(8));
    let laid = data.lay(helper);
    let mut bytes = code(targets, &laid, spare, at, claim);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(data.bytes);
    let mut jump = [0xe9, 0, 0, 0, 0];
    jump[1..].copy_from_slice(&relative(spare + JUMP as u64, at));
    (jump, bytes)
}

/// Where the data is.
struct Laid {
    path: u64,
    argv: u64,
    envp: u64,
    device: u64,
    folder: u64,
    file_system: u64,
}

struct Data {
    at: u64,
    bytes: Vec<u8>,
}

impl Data {
    fn new(at: u64) -> Self {
        Self { at, bytes: Vec::new() }
    }

    fn lay(&mut self, helper: &Helper<'_>) -> Laid {
        let argv: Vec<_> = helper.argv.iter().map(|text| self.text(text)).collect();
        let envp = ["HOME=/", "PATH=/bin:/sbin"].map(|text| self.text(text));
        let [device, folder, file_system] = [helper.device, helper.folder, "ext4"].map(|text| self.text(text));
        let path = argv.first().copied().unwrap_or_default();
        Laid { path, argv: self.list(&argv), envp: self.list(&envp), device, folder, file_system }
    }

    fn text(&mut self, text: &str) -> u64 {
        let at = self.at + self.bytes.len() as u64;
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        at
    }

    fn list(&mut self, pointers: &[u64]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.at + self.bytes.len() as u64;
        self.bytes.extend(pointers.iter().chain(&[0]).flat_map(|pointer| pointer.to_le_bytes()));
        at
    }
}

/// How far `to` is from the end of an instruction.
fn relative(end: u64, to: u64) -> [u8; 4] {
    (to.wrapping_sub(end) as u32).to_le_bytes()
}

/// Instructions, one after the other.
struct Code {
    at: u64,
    bytes: Vec<u8>,
}

/// A short jump whose target is yet to come.
struct Ahead(usize);

impl Code {
    fn plain(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// With a constant of four bytes.
    fn with(&mut self, opcode: &[u8], constant: u32) {
        self.plain(opcode);
        self.plain(&constant.to_le_bytes());
    }

    /// With an address relative to its end: a call, a jump, `lea`.
    fn to(&mut self, opcode: &[u8], target: u64) {
        self.plain(opcode);
        let end = self.here() + 4;
        self.plain(&relative(end, target));
    }

    fn call(&mut self, target: u64) {
        self.to(&[0xe8], target);
    }

    fn here(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }

    fn ahead(&mut self, opcode: u8) -> Ahead {
        self.plain(&[opcode, 0]);
        Ahead(self.bytes.len())
    }

    fn lands(&mut self, jump: &Ahead) {
        self.bytes[jump.0 - 1] = short((self.bytes.len() - jump.0) as i64);
    }

    fn back(&mut self, opcode: u8, target: u64) {
        let end = self.here() + 2;
        self.plain(&[opcode, short(target.wrapping_sub(end) as i64)]);
    }
}

fn short(distance: i64) -> u8 {
    assert!(i8::try_from(distance).is_ok(), "{distance} bytes are too far for a short jump");
    distance as u8
}

const JC: u8 = 0x72;
const JZ: u8 = 0x74;
const JNZ: u8 = 0x75;
const LEA_RDI: [u8; 3] = [0x48, 0x8d, 0x3d];
const LEA_RSI: [u8; 3] = [0x48, 0x8d, 0x35];
const LEA_RDX: [u8; 3] = [0x48, 0x8d, 0x15];
const LEA_R8: [u8; 3] = [0x4c, 0x8d, 0x05];
const MOV_EAX: [u8; 1] = [0xb8];
const MOV_ESI: [u8; 1] = [0xbe];
const MOV_EDI: [u8; 1] = [0xbf];
const MOV_EDX: [u8; 1] = [0xba];
const MOV_EBX: [u8; 1] = [0xbb];
const MOV_RDX_RSP: [u8; 3] = [0x48, 0x89, 0xe2];
const MOV_RSI_RSP: [u8; 3] = [0x48, 0x89, 0xe6];
const MOV_RDI_RSP: [u8; 3] = [0x48, 0x89, 0xe7];
const MOV_RDI_RAX: [u8; 3] = [0x48, 0x89, 0xc7];
const XOR_ECX: [u8; 2] = [0x31, 0xc9];
const XOR_ESI: [u8; 2] = [0x31, 0xf6];
const XOR_R8D: [u8; 3] = [0x45, 0x31, 0xc0];
const XOR_R9D: [u8; 3] = [0x45, 0x31, 0xc9];
const TEST_EAX: [u8; 2] = [0x85, 0xc0];
const TEST_RAX: [u8; 3] = [0x48, 0x85, 0xc0];
const RET: [u8; 1] = [0xc3];
/// What a call may change, but RAX: RCX, RDX, RSI, RDI, R8 to R11.
const PUSH: [u8; 12] = [0x51, 0x52, 0x56, 0x57, 0x41, 0x50, 0x41, 0x51, 0x41, 0x52, 0x41, 0x53];
const POP: [u8; 12] = [0x41, 0x5b, 0x41, 0x5a, 0x41, 0x59, 0x41, 0x58, 0x5f, 0x5e, 0x5a, 0x59];

fn code(targets: &Targets, laid: &Laid, spare: u64, at: u64, claim: u64) -> Vec<u8> {
    // The address of `init` comes out of the first pass.
    let stub_len = stub(targets, laid, spare, at, claim, at).len() as u64;
    let mut bytes = stub(targets, laid, spare, at, claim, at + stub_len);
    bytes.extend(init(targets, laid, at + stub_len));
    bytes
}

/// Flags are nobody's at a function's entry.
fn stub(targets: &Targets, laid: &Laid, spare: u64, at: u64, claim: u64, init: u64) -> Vec<u8> {
    let mut c = Code { at, bytes: Vec::new() };
    c.plain(&[0x50]); // push rax
    c.plain(&[0x48, 0xb8]); // mov rax, claim
    c.plain(&claim.to_le_bytes());
    c.plain(&[0xf0, 0x0f, 0xba, 0x28, 0x00]); // lock bts dword [rax], 0
    let taken = c.ahead(JC);
    c.plain(&PUSH);
    c.to(&LEA_RDI, laid.path);
    c.to(&LEA_RSI, laid.argv);
    c.to(&LEA_RDX, laid.envp);
    // No flag of an allocation is set: it does not sleep.
    c.plain(&XOR_ECX);
    c.to(&LEA_R8, init);
    c.plain(&XOR_R9D);
    c.plain(&[0x6a, 0x00]); // push 0
    c.call(targets.call_usermodehelper_setup);
    c.plain(&[0x48, 0x83, 0xc4, 0x08]); // add rsp, 8
    c.plain(&TEST_RAX);
    let none = c.ahead(JZ);
    c.plain(&MOV_RDI_RAX);
    // UMH_NO_WAIT
    c.plain(&XOR_ESI);
    c.call(targets.call_usermodehelper_exec);
    c.lands(&none);
    c.plain(&POP);
    c.lands(&taken);
    c.plain(&[0x58]); // pop rax
    c.to(&[0xe9], spare + JUMP as u64);
    c.bytes
}

/// `int (*init)(struct subprocess_info *, struct cred *)`
fn init(targets: &Targets, laid: &Laid, at: u64) -> Vec<u8> {
    let mut c = Code { at, bytes: Vec::new() };
    c.plain(&[0xf3, 0x0f, 0x1e, 0xfa]); // endbr64
    c.plain(&[0x53]); // push rbx
    // A struct path, and what came of the mount.
    c.plain(&[0x48, 0x83, 0xec, 0x18]); // sub rsp, 24
    c.with(&MOV_EBX, LOOKS);
    let look = c.here();
    c.to(&LEA_RDI, laid.device);
    c.with(&MOV_ESI, LOOKUP_FOLLOW);
    c.plain(&MOV_RDX_RSP);
    c.call(targets.kern_path);
    c.plain(&TEST_EAX);
    let missing = c.ahead(JNZ);
    c.plain(&MOV_RDI_RSP);
    c.call(targets.path_put);
    c.to(&LEA_RDI, laid.folder);
    c.with(&MOV_ESI, LOOKUP_FOLLOW);
    c.plain(&MOV_RDX_RSP);
    c.call(targets.kern_path);
    c.plain(&TEST_EAX);
    let nowhere = c.ahead(JNZ);
    c.to(&LEA_RDI, laid.device);
    c.plain(&MOV_RSI_RSP);
    c.to(&LEA_RDX, laid.file_system);
    c.plain(&XOR_ECX);
    c.plain(&XOR_R8D);
    c.call(targets.path_mount);
    c.plain(&[0x89, 0x44, 0x24, 0x10]); // mov [rsp + 16], eax
    c.plain(&MOV_RDI_RSP);
    c.call(targets.path_put);
    c.plain(&[0x8b, 0x44, 0x24, 0x10]); // mov eax, [rsp + 16]
    c.plain(&TEST_EAX);
    let mounted = c.ahead(JZ);
    // The device's file is there before the disk can be opened.
    c.lands(&missing);
    c.lands(&nowhere);
    c.with(&MOV_EDI, PAUSE_US);
    c.with(&MOV_ESI, PAUSE_US);
    c.with(&MOV_EDX, UNINTERRUPTIBLE);
    c.call(targets.usleep_range_state);
    c.plain(&[0xff, 0xcb]); // dec ebx
    c.back(JNZ, look);
    // What is not zero keeps the helper from being executed.
    c.with(&MOV_EAX, ENODEV);
    c.lands(&mounted);
    c.plain(&[0x48, 0x83, 0xc4, 0x18]); // add rsp, 24
    c.plain(&[0x5b]); // pop rbx
    c.plain(&RET);
    c.bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0xffff_ffff_81ff_f000;
    const SPARE_AT: u64 = 0xffff_ffff_81c0_1234;

    fn made(argv: &[&str]) -> ([u8; JUMP], Vec<u8>) {
        let call = |n: u64| 0xffff_ffff_8110_0000 + (n << 12);
        let targets = Targets {
            call_usermodehelper_setup: call(0),
            call_usermodehelper_exec: call(1),
            kern_path: call(2),
            path_put: call(3),
            path_mount: call(4),
            usleep_range_state: call(5),
        };
        let helper = Helper { device: "/dev/vda", folder: "/mnt", argv };
        assemble(&targets, &helper, SPARE_AT, AT, 0xffff_8880_0000_5000)
    }

    /// Where the relative address at `from` leads.
    fn leads(bytes: &[u8], from: usize, at: u64) -> u64 {
        let distance = i32::from_le_bytes(bytes[from..from + 4].try_into().unwrap());
        at.wrapping_add(from as u64 + 4).wrapping_add_signed(distance.into())
    }

    #[test]
    fn the_jump_goes_there_and_back() {
        let (jump, bytes) = made(&["/mnt/x"]);
        assert_eq!((jump[0], leads(&jump, 1, SPARE_AT)), (0xe9, AT));
        let pops = bytes.windows(POP.len()).position(|w| w == POP).unwrap();
        assert_eq!(bytes[pops + POP.len()..][..2], [0x58, 0xe9]);
        assert_eq!(leads(&bytes, pops + POP.len() + 2, AT), SPARE_AT + 5);
    }

    #[test]
    fn calls_reach_their_targets_in_order() {
        let (_, bytes) = made(&["/mnt/x"]);
        let target = |at: usize| (bytes[at] == 0xe8).then(|| leads(&bytes, at + 1, AT));
        let calls: Vec<_> = (0..bytes.len() - 5)
            .filter_map(target)
            .filter(|to| (0xffff_ffff_8110_0000..0xffff_ffff_8110_6000).contains(to) && to & 0xfff == 0)
            .map(|to| (to >> 12) & 0xf)
            .collect();
        assert_eq!(calls, [0, 1, 2, 3, 2, 4, 3, 5]);
    }

    #[test]
    fn arguments_are_where_they_are_looked_for() {
        let (_, bytes) = made(&["/mnt/bin/busybox", "sh"]);
        let find = |what: &[u8]| bytes.windows(what.len()).position(|w| w == what);
        let text = |text: &[u8]| AT + find(text).unwrap() as u64;
        let list = [text(b"/mnt/bin/busybox\0"), text(b"sh\0"), 0];
        let argv = find(&list.map(u64::to_le_bytes).concat()).unwrap();
        let lea = find(&LEA_RSI).unwrap();
        assert_eq!(leads(&bytes, lea + 3, AT), AT + argv as u64);
        assert_eq!(argv % 8, 0);
        assert!(bytes.len() < 1024, "{}", bytes.len());
    }
}
