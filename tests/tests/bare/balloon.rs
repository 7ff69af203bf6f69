//! The balloon as its user sees it: a guest without a driver gives nothing, but what was asked of it is kept.

use civic_api::{AfterSave, BalloonConfig, ErrorCode};
use civic_tests::bare::vm::{Setup, Vm};

use crate::endings::resetting;

const MIB: u64 = 1 << 20;

/// What it is asked for, which the API and the device must agree on.
fn target(vm: &Vm) -> u64 {
    let told = vm.api(|client| async move { client.balloon().await }).expect("the VM has a balloon");
    assert_eq!(vm.info().balloon.as_ref(), Some(&told));
    assert_eq!((told.actual_bytes, told.reports), (0, 0), "nobody drives it");
    told.target_bytes
}

fn set(vm: &Vm, target_bytes: u64) -> Result<(), ErrorCode> {
    let set = vm.api(|client| async move { client.set_balloon(&BalloonConfig { target_bytes }).await });
    set.map_err(|error| error.refusal().expect("the monitor answers").code)
}

fn resets(vm: &mut Vm) {
    vm.send(b"k");
    vm.expect("spoilt\n");
}

#[test]
fn a_target_outlives_resets_and_a_save() {
    let mut setup = Setup::new(&resetting());
    setup.config.balloon = Some(BalloonConfig { target_bytes: MIB });
    let mut vm = setup.boot();
    vm.expect("spoilt\n");
    assert_eq!(target(&vm), MIB);
    resets(&mut vm);
    assert_eq!(target(&vm), MIB);
    set(&vm, 3 * MIB).expect("it is little enough");
    for wrong in [3 * MIB + 1, 17 * MIB] {
        assert_eq!(set(&vm, wrong), Err(ErrorCode::InvalidConfig));
    }
    resets(&mut vm);
    assert_eq!(target(&vm), 3 * MIB);

    vm.save("saved", AfterSave::Stop);
    assert!(vm.ended().success());
    let mut vm = vm.restored("saved");
    assert_eq!(target(&vm), 3 * MIB);
    vm.start();
    resets(&mut vm);
    assert_eq!(target(&vm), 3 * MIB);
    set(&vm, 0).expect("it is little enough");
    assert_eq!(target(&vm), 0);
    vm.kill();
    assert!(vm.ended().success());
}

#[test]
fn a_vm_without_a_balloon_says_so() {
    let vm = Setup::new(&resetting()).boot();
    assert_eq!(vm.info().balloon, None);
    assert_eq!(set(&vm, MIB), Err(ErrorCode::NotFound));
    let shown = vm.api(|client| async move { client.balloon().await });
    assert_eq!(shown.expect_err("there is none").refusal().map(|body| body.code), Some(ErrorCode::NotFound));
}
