//! Kernel modules for an initramfs: which files, in which order.
//!
//! From `modules.dep` (made by depmod; a line is `file: its dependencies, nearest first`) and `modules.builtin`.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::kernel::decompress;

/// The modules of one kernel.
pub struct Modules {
    dir: PathBuf,
    dep: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

/// `kernel/fs/ext4/ext4.ko.xz` → `ext4`; dashes and underscores are the same to the kernel.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

impl Modules {
    /// Reads the lists in `dir` (`…/lib/modules/VERSION`).
    pub fn open(dir: &Path) -> Result<Self> {
        let read =
            |name: &str| fs::read_to_string(dir.join(name)).with_context(|| format!("no {name} in {}", dir.display()));
        Ok(Self::parse(dir, &read("modules.dep")?, &read("modules.builtin")?))
    }

    fn parse(dir: &Path, dep: &str, builtin: &str) -> Self {
        let line = |l: &str| {
            let (file, deps) = l.split_once(':')?;
            Some((name_of(file), (file.to_owned(), deps.split_whitespace().map(str::to_owned).collect())))
        };
        Self {
            dir: dir.to_owned(),
            dep: dep.lines().filter_map(line).collect(),
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// Files to load, in order, for `names`; a name that ends with `?` may be missing. Built-in ones need no file.
    pub fn order(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in names {
            let (name, optional) = name.strip_suffix('?').map_or((*name, false), |n| (n, true));
            let key = name.replace('-', "_");
            let Some((file, deps)) = self.dep.get(&key) else {
                if optional || self.builtin.contains(&key) {
                    continue;
                }
                bail!("the kernel in {} has no module {name}", self.dir.display());
            };
            for file in deps.iter().rev().chain([file]) {
                if !order.contains(file) {
                    order.push(file.clone());
                }
            }
        }
        Ok(order)
    }

    /// Puts modules into an archive as `mod/NAME.ko`, decompressed, and their order in `mod/order`.
    pub fn pack(&self, names: &[&str], archive: &mut Archive) -> Result<()> {
        let mut list = String::new();
        for file in self.order(names)? {
            let name = name_of(&file) + ".ko";
            let bytes = fs::read(self.dir.join(&file)).with_context(|| format!("cannot read module {file}"))?;
            archive.file(&format!("mod/{name}"), 0o644, &decompress(&bytes)?);
            list += &format!("{name}\n");
        }
        archive.file("mod/order", 0o644, list.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dep = "kernel/kvm-amd.ko.xz: kernel/ccp.ko.xz kernel/kvm.ko.xz kernel/irq.ko.xz\nkernel/kvm.ko.xz: kernel/irq.ko.xz\n\
                   kernel/irq.ko.xz:\nkernel/ccp.ko.xz:\n";
        let m = Modules::parse(Path::new("/x"), dep, "kernel/virtio_blk.ko\n");
        let order = m.order(&["kvm", "kvm-amd", "virtio-blk", "absent?"]).unwrap();
        assert_eq!(order, ["kernel/irq.ko.xz", "kernel/kvm.ko.xz", "kernel/ccp.ko.xz", "kernel/kvm-amd.ko.xz"]);
        assert!(m.order(&["absent"]).is_err());
    }
}
