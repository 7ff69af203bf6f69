use std::collections::BTreeSet;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::*;

/// Where distributions' kernels have their images and modules, far apart within what calls reach.
const AT: Gva = Gva(0xffff_ffff_8000_0000);

fn targets() -> Targets {
    let function = |n: u64| Gva(0xffff_ffff_8123_4560 + n * 0x10_0000);
    Targets {
        call_usermodehelper_setup: function(0),
        call_usermodehelper_exec: function(1),
        get_fs_type: function(2),
        vfs_kern_mount: function(3),
        set_fs_pwd: function(4),
        filp_open: function(5),
        kernel_write: function(6),
        fput: function(7),
        fput_sync: function(8),
        task_work_run: function(9),
        mntput: function(10),
        current: 0x35000,
        task_fs: 3040,
        task_flags: 44,
        mount_root: 0,
        info_path: 40,
        info_retval: 68,
    }
}

fn instructions(code: &Code) -> Vec<Instruction> {
    let text = &code.bytes()[..MAILBOX as usize];
    let text = &text[..text.iter().rposition(|byte| *byte != 0).unwrap() + 1];
    Decoder::with_ip(64, text, AT.0, DecoderOptions::NONE).into_iter().collect()
}

fn word(code: &Code, at: u64) -> u64 {
    let offset = (at - AT.0) as usize;
    u64::from_le_bytes(code.bytes()[offset..offset + 8].try_into().unwrap())
}

fn text(code: &Code, at: u64) -> &str {
    let bytes = &code.bytes()[(at - AT.0) as usize..];
    std::str::from_utf8(&bytes[..bytes.iter().position(|byte| *byte == 0).unwrap()]).unwrap()
}

#[test]
fn every_instruction_keeps_to_the_rules_of_the_place() {
    for current in [0x35000, 0x8305_1234_u32 as i32] {
        let code = Code::new(&Targets { current, ..targets() }, AT, b"loader", &["port:604:1"]).unwrap();
        let mut called = BTreeSet::new();
        for instruction in instructions(&code) {
            assert!(!instruction.is_invalid(), "{:x}", instruction.ip());
            match instruction.flow_control() {
                FlowControl::Call => {
                    called.insert(instruction.near_branch_target());
                }
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                    assert!(code.contains(Gva(instruction.near_branch_target())), "{instruction:?}");
                }
                flow => {
                    assert!(!matches!(flow, FlowControl::IndirectBranch | FlowControl::IndirectCall), "{instruction:?}")
                }
            }
            for operand in 0..instruction.op_count() {
                let register = instruction.op_register(operand);
                assert!(
                    register == Register::None || register.is_gpr() || register.is_segment_register(),
                    "{instruction:?}"
                );
            }
            let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
            if memory && instruction.memory_base() == Register::None {
                let address = instruction.memory_displacement64();
                if instruction.segment_prefix() == Register::GS {
                    assert_eq!(address, current as i64 as u64, "{instruction:?}");
                } else {
                    assert!((AT.0 + MAILBOX..AT.0 + STRINGS).contains(&address), "{instruction:?}");
                }
            }
        }
        let all = targets();
        let expected = [
            all.call_usermodehelper_setup,
            all.call_usermodehelper_exec,
            all.get_fs_type,
            all.vfs_kern_mount,
            all.set_fs_pwd,
            all.filp_open,
            all.kernel_write,
            all.fput,
            all.fput_sync,
            all.task_work_run,
            all.mntput,
        ];
        assert_eq!(called, expected.iter().map(|at| at.0).collect());
    }
}

#[test]
fn pushes_and_pops_are_even_on_every_way_to_a_return() {
    let code = Code::new(&targets(), AT, b"", &[]).unwrap();
    let all = instructions(&code);
    // init has one way out; the stub is left by its ring, with the stack as at its entry.
    let depth = |from: usize, to: usize| {
        all[from..to].iter().fold(0_i64, |depth, instruction| match instruction.mnemonic() {
            Mnemonic::Push => depth + 8,
            Mnemonic::Pop => depth - 8,
            Mnemonic::Sub if instruction.op0_register() == Register::RSP => depth + instruction.immediate(1) as i64,
            Mnemonic::Add if instruction.op0_register() == Register::RSP => depth - instruction.immediate(1) as i64,
            _ => depth,
        })
    };
    let at = |mnemonic, from: usize| from + all[from..].iter().position(|i| i.mnemonic() == mnemonic).unwrap();
    let ring = at(Mnemonic::Out, 0);
    let init = at(Mnemonic::Endbr64, ring);
    let back = at(Mnemonic::Ret, init);
    assert_eq!((depth(0, ring), depth(init, back)), (0, 0));
    assert_eq!(all.iter().filter(|i| i.mnemonic() == Mnemonic::Ret).count(), 2);
}

#[test]
fn rings_are_told_by_what_is_behind_them() {
    let code = Code::new(&targets(), AT, b"", &[]).unwrap();
    let rings: Vec<_> = instructions(&code)
        .iter()
        .filter(|instruction| instruction.mnemonic() == Mnemonic::Out)
        .map(|instruction| {
            let offset = (instruction.ip() - AT.0) as usize;
            assert_eq!(code.bytes()[offset..][..OUT.len()], OUT);
            code.ring(Gva(instruction.next_ip()))
        })
        .collect();
    assert_eq!(rings, [Some(Ring::Queued), Some(Ring::Finished)]);
    assert_eq!((code.ring(AT), code.stub()), (None, AT));
    assert!(code.contains(AT) && code.contains(AT.plus(SLOT_BYTES - 1)));
    assert!(!code.contains(AT.plus(SLOT_BYTES)) && !code.contains(Gva(AT.0 - 1)));
}

#[test]
fn strings_and_loader_are_where_the_code_says() {
    let loader: Vec<u8> = (0..200_000).map(|n| n as u8).collect();
    let code = Code::new(&targets(), AT, &loader, &["port:604:1", "two"]).unwrap();
    let immediates: Vec<_> = instructions(&code)
        .iter()
        .filter(|i| i.mnemonic() == Mnemonic::Mov && i.op1_kind() == OpKind::Immediate64)
        .map(|i| (i.op0_register(), i.immediate64()))
        .collect();
    let of = |register| immediates.iter().find(|(r, at)| *r == register && *at >= AT.0).unwrap().1;
    assert_eq!(text(&code, of(Register::RDI)), "civic");
    let list = |mut at: u64| {
        let mut texts = Vec::new();
        while word(&code, at) != 0 {
            texts.push(text(&code, word(&code, at)).to_owned());
            at += 8;
        }
        texts
    };
    assert_eq!(list(of(Register::RSI)), ["civic", "port:604:1", "two"]);
    assert_eq!(list(of(Register::RDX)), ENVIRONMENT);
    assert_eq!(code.bytes()[LOADER as usize..], loader);

    let long = "x".repeat(0x1000);
    assert!(matches!(Code::new(&targets(), AT, b"", &[&long]), Err(CodeError::TooLong { .. })));
    assert!(matches!(Code::new(&targets(), AT, &vec![0; SLOT_BYTES as usize], &[]), Err(CodeError::TooLong { .. })));
    let far = Targets { mntput: Gva(0xffff_8880_0000_0000), ..targets() };
    assert!(matches!(Code::new(&far, AT, b"", &[]), Err(CodeError::Assemble(_))));
}

#[test]
fn the_mailbox_says_how_far_it_got() {
    let code = Code::new(&targets(), AT, b"", &[]).unwrap();
    let mut bytes: [u8; Mailbox::LEN] = code.bytes()[Mailbox::AT as usize..][..Mailbox::LEN].try_into().unwrap();
    let empty = Mailbox { queued: None, finished: None, stage: Stage::NotBegun, last: 0 };
    assert_eq!(Mailbox::read(&bytes), empty);
    bytes[..4].copy_from_slice(&(-16_i32).to_le_bytes());
    bytes[4..8].copy_from_slice(&0_i32.to_le_bytes());
    bytes[8] = 3;
    bytes[16..].copy_from_slice(&(-2_i64).to_le_bytes());
    let told = Mailbox { queued: Some(-16), finished: Some(0), stage: Stage::File, last: -2 };
    assert_eq!(Mailbox::read(&bytes), told);
    bytes[9] = 1;
    assert_eq!(Mailbox::read(&bytes).stage, Stage::Unknown(0x103));
}
