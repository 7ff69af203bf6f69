use super::*;
use crate::targets::Targets;

const ENTRY: Gva = Gva(0xffff_ffff_8190_0004);
const SLOT: Gva = Gva(0xffff_ffff_8000_0000);

/// Registers: who, and where.
type Registers = (char, Gva);

fn hook() -> Hook<Registers> {
    hook_at(Site::slot(ENTRY))
}

fn hook_at(site: Site) -> Hook<Registers> {
    let at = Gva(0xffff_ffff_8100_0000);
    let targets = Targets {
        call_usermodehelper_setup: at,
        call_usermodehelper_exec: at,
        get_fs_type: at,
        vfs_kern_mount: at,
        set_fs_pwd: at,
        filp_open: at,
        kernel_write: at,
        fput: at,
        fput_sync: at,
        task_work_run: at,
        mntput: at,
        current: 0,
        task_fs: 0,
        task_flags: 0,
        mount_root: 0,
        info_path: 0,
        info_retval: 0,
    };
    Hook::new(site, Code::new(&targets, SLOT, b"", &[]).unwrap())
}

/// Behind the ring that is of this kind.
fn behind(hook: &Hook<Registers>, ring: Ring) -> Gva {
    (0..4096).map(|n| SLOT.plus(n)).find(|at| hook.code().ring(*at) == Some(ring)).unwrap()
}

fn meet(hook: &mut Hook<Registers>, who: char, rip: Gva) -> Turn<Registers> {
    hook.meet(rip, |at| (who, at))
}

#[test]
fn one_task_is_diverted_and_gets_its_own_registers_back() {
    let mut hook = hook();
    let (queued, finished) = (behind(&hook, Ring::Queued), behind(&hook, Ring::Finished));
    let (trap, on) = (ENTRY.plus(2), ENTRY.plus(5));
    assert_eq!(hook.progress(), Progress::Armed);
    assert_eq!(meet(&mut hook, 'a', trap), Turn::GoTo(SLOT));
    assert_eq!(hook.progress(), Progress::Diverted);
    // The trap is still there.
    assert_eq!(meet(&mut hook, 'b', trap), Turn::GoTo(on));
    assert_eq!(meet(&mut hook, 'c', queued), Turn::Restore(('a', on)));
    assert_eq!(hook.progress(), Progress::Queued);
    assert_eq!(meet(&mut hook, 'a', trap), Turn::GoTo(on));
    assert_eq!(meet(&mut hook, 'd', finished), Turn::Return);
    assert_eq!(hook.progress(), Progress::Done);
    assert_eq!(meet(&mut hook, 'e', trap), Turn::GoTo(on));
}

#[test]
fn who_has_no_slot_waits_for_the_instruction() {
    let mut hook = hook_at(Site::instruction(ENTRY));
    let queued = behind(&hook, Ring::Queued);
    assert_eq!(meet(&mut hook, 'a', ENTRY.plus(2)), Turn::GoTo(SLOT));
    assert_eq!(meet(&mut hook, 'b', ENTRY.plus(2)), Turn::GoTo(ENTRY));
    assert_eq!(meet(&mut hook, 'a', queued), Turn::Restore(('a', ENTRY)));
    assert_eq!(meet(&mut hook, 'b', ENTRY.plus(2)), Turn::GoTo(ENTRY));
}

#[test]
fn the_helper_may_be_done_before_the_stub() {
    let mut hook = hook();
    let (queued, finished) = (behind(&hook, Ring::Queued), behind(&hook, Ring::Finished));
    assert_eq!(meet(&mut hook, 'a', ENTRY.plus(2)), Turn::GoTo(SLOT));
    assert_eq!(meet(&mut hook, 'b', finished), Turn::Return);
    assert_eq!(hook.progress(), Progress::Diverted);
    assert_eq!(meet(&mut hook, 'a', queued), Turn::Restore(('a', ENTRY.plus(5))));
    assert_eq!(hook.progress(), Progress::Done);
}

#[test]
fn what_a_guest_makes_up_leads_nowhere() {
    let mut hook = hook();
    let queued = behind(&hook, Ring::Queued);
    for rip in [queued, ENTRY, ENTRY.plus(1), ENTRY.plus(5), Gva(0), Gva(u64::MAX)] {
        assert_eq!(meet(&mut hook, 'x', rip), Turn::Foreign, "{rip}");
    }
    assert_eq!(hook.progress(), Progress::Armed);
}
