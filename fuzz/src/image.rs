//! Files of a saved VM's memory: the index, with its checksum put right so that what it says is read too, and the chunks that it names.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use civic_fork::image::{CHUNK, INDEX, Image, MEMORY, save};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::host::scratch;

/// RAM of the images: three chunks and a page.
const RAM: u64 = 3 * CHUNK + 4096;

fn dir() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = scratch("image");
        fs::create_dir(&dir).expect("a new folder can be made");
        let memory = fs::File::create(dir.join(MEMORY)).expect("a file can be made");
        memory.set_len(RAM).expect("the host has room");
        dir
    })
}

/// Opens one index beside memory that is all zero, and loads what it names.
pub fn run(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    // The last byte says whether the checksum is right.
    let right = bytes.pop().is_some_and(|last| last & 1 == 0);
    if let Some(body) = bytes.len().checked_sub(4)
        && right
    {
        let sum = crc32fast::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(&sum.to_le_bytes());
    }
    fs::write(dir().join(INDEX), &bytes).expect("the host has room");
    let image = match Image::open(dir(), RAM) {
        Ok(image) => image,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(image.ram(), RAM);
    assert!(image.data() <= RAM, "{} bytes in chunks of {RAM} bytes of RAM", image.data());
    let ram = fs::File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).expect("the host has memory"));
    ram.set_len(RAM).expect("the host has memory");
    let mut done = 0;
    let loaded = image.load_all(&ram, &mut |progress| {
        assert!(progress.done > done && progress.done <= progress.total && progress.total == image.data());
        done = progress.done;
        ControlFlow::Continue(())
    });
    match loaded {
        Ok(()) => assert_eq!(done, image.data()),
        Err(error) => drop(error.to_string()),
    }
}

/// The index of memory in which something is, and of empty memory.
pub fn seeds() -> Vec<Vec<u8>> {
    let index = |at: &[u64]| {
        use std::os::unix::fs::FileExt;
        let ram = fs::File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).expect("the host has memory"));
        ram.set_len(RAM).expect("the host has memory");
        for &at in at {
            ram.write_all_at(&[1], at).expect("the host has memory");
        }
        let dir = scratch("seed");
        fs::create_dir(&dir).expect("a new folder can be made");
        save(&ram, &dir, &mut |_| ControlFlow::Continue(())).expect("memory can be saved");
        let mut index = fs::read(dir.join(INDEX)).expect("it was just written");
        let _ = fs::remove_dir_all(&dir);
        index.push(0);
        index
    };
    vec![index(&[]), index(&[0]), index(&[5, CHUNK, RAM - 1])]
}
