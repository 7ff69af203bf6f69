use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use super::*;
use crate::layout::Layout;

const RAM: u64 = 32 << 20;

fn config() -> VmConfig {
    let json = format!(r#"{{"name":"web","kernel":"/k","memory_bytes":{RAM},"cpus":1}}"#);
    serde_json::from_str(&json).unwrap()
}

fn vm(config: &VmConfig) -> VmStateV1 {
    let disks = config.disks.iter().map(|disk| DiskStamp::of(&disk.path)).collect();
    let config = serde_json::to_string(config).unwrap();
    VmStateV1 { config, boots: 3, run: Duration::from_millis(1234), index_checksum: 0, disks }
}

fn memory() -> Memory {
    Memory::allocate(&Layout::new(RAM).unwrap()).unwrap()
}

/// A VM with `text` at 1 MiB, saved to `dir`.
fn save(dir: &Path, text: &[u8]) {
    let memory = memory();
    memory.memfd.write_all_at(text, 1 << 20).unwrap();
    let draft = Draft::new(dir).unwrap();
    let report = draft.write(&memory.memfd, Sections::default(), vm(&config()), &mut |_| ControlFlow::Continue(()));
    let (bytes, state) = report.unwrap();
    assert!(bytes >= text.len() as u64 && state > 100);
}

#[test]
fn a_saved_vm_comes_back_with_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("saved");
    save(&dir, b"hello");
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    let saved = SavedVm::open(&dir).unwrap();
    assert_eq!(saved.config, config());
    assert_eq!((saved.vm.boots, saved.vm.run), (3, Duration::from_millis(1234)));
    let (sections, image) = saved.into_parts();
    sections.finish().unwrap();
    let memory = memory();
    let lazy = image.fill(&memory, |why| panic!("{why}")).unwrap();
    if let Some(lazy) = &lazy {
        lazy.finish().unwrap();
    }
    let mut text = [0; 5];
    memory.memfd.read_exact_at(&mut text, 1 << 20).unwrap();
    assert_eq!(&text, b"hello");
}

/// Else the loader would put back what the guest has long overwritten.
#[test]
fn no_hole_is_punched_into_memory_that_is_not_all_there() {
    let dir = tempfile::tempdir().unwrap();
    for (name, damage) in [("damaged", true), ("good", false)] {
        let dir = dir.path().join(name);
        save(&dir, b"hello");
        let (_, image) = SavedVm::open(&dir).unwrap().into_parts();
        if damage {
            let file = OpenOptions::new().write(true).open(dir.join(civic_fork::image::MEMORY)).unwrap();
            file.write_all_at(b"H", 1 << 20).unwrap();
        }
        let memory = memory();
        let release = memory.page_release();
        let lazy = match image.fill(&memory, |_| ()) {
            Ok(Some(lazy)) => lazy,
            Ok(None) | Err(_) => {
                return eprintln!("SKIPPED: there is no userfaultfd, so all is loaded before the VM starts");
            }
        };
        assert_eq!(lazy.finish().is_err(), damage);
        assert_eq!(release.release(1 << 20, 4096).unwrap(), !damage);
        let mut text = [0; 5];
        memory.memfd.read_exact_at(&mut text, 1 << 20).unwrap();
        assert_eq!(text, [0; 5]);
    }
}

#[test]
fn what_is_not_whole_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("a");
    assert!(matches!(SavedVm::open(&dir), Err(SavedError::NotAVm(_))));
    save(&dir, b"one");
    assert!(matches!(Draft::new(&dir), Err(SavedError::NotEmpty(_))));
    let state = fs::read(dir.join(STATE)).unwrap();
    for len in (0..state.len()).step_by(7) {
        fs::write(dir.join(STATE), &state[..len]).unwrap();
        assert!(matches!(SavedVm::open(&dir), Err(SavedError::State { .. })), "{len} bytes");
    }
    fs::write(dir.join(STATE), &state).unwrap();
    SavedVm::open(&dir).unwrap();
    // The memory of another save.
    let other = root.path().join("b");
    save(&other, b"two");
    for name in [image::MEMORY, INDEX] {
        fs::rename(other.join(name), dir.join(name)).unwrap();
    }
    assert!(matches!(SavedVm::open(&dir), Err(SavedError::Mixed(_))));
    fs::remove_file(dir.join(INDEX)).unwrap();
    assert!(matches!(SavedVm::open(&dir), Err(SavedError::Image(_))));
}

#[test]
fn a_save_that_is_stopped_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("saved");
    let memory = memory();
    memory.memfd.write_all_at(&[1; 300_000], 0).unwrap();
    let write = |draft: Draft| {
        let stop = &mut |_| ControlFlow::Break(());
        draft.write(&memory.memfd, Sections::default(), vm(&config()), stop)
    };
    let stopped = write(Draft::new(&dir).unwrap());
    assert!(matches!(stopped, Err(SavedError::Save(image::SaveError::Stopped))));
    assert!(!dir.exists());
    // A directory that was there stays.
    fs::create_dir(&dir).unwrap();
    write(Draft::new(&dir).unwrap()).unwrap_err();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn a_disk_that_was_written_to_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let (dir, image) = (root.path().join("saved"), root.path().join("disk"));
    fs::write(&image, [0; 4096]).unwrap();
    let mut config = config();
    config.disks = serde_json::from_value(serde_json::json!([{"id": "root", "path": image}])).unwrap();
    let memory = memory();
    let draft = Draft::new(&dir).unwrap();
    draft.write(&memory.memfd, Sections::default(), vm(&config), &mut |_| ControlFlow::Continue(())).unwrap();
    let saved = SavedVm::open(&dir).unwrap();
    saved.check_disks(&config).unwrap();
    fs::write(&image, [0; 8192]).unwrap();
    assert!(matches!(saved.check_disks(&config), Err(SavedError::DiskChanged { id, .. }) if id == "root"));
}
