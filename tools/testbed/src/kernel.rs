//! Debian's kernels, unpacked in the cache: stock kernels for guests, and the testbed's own.
//!
//! A kernel's directory holds `vmlinuz` (the bzImage as packaged), `vmlinux` (the ELF file inside it), `version`
//! and `lib/modules/VERSION` with depmod's lists.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::Apt;
use crate::cache::{self, make_once, progress};
use crate::modules::Modules;

/// Kernels that all is tested with. The testbed itself runs the last.
pub const FLAVOURS: [&str; 3] = ["6.1-cloud", "6.12-cloud", "6.12-generic"];
/// The oldest series whose kernels programs can be started in.
const OLDEST: [u64; 2] = [5, 10];
/// The kernel of the testbed.
pub const HOST_FLAVOUR: &str = "6.12-generic";
/// Change to have every kernel fetched again.
const RECIPE: &str = "1";

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its directory in the cache.
    pub dir: PathBuf,
    /// `uname -r`.
    pub version: String,
}

impl Kernel {
    /// The kernel of a flavour, fetched if it is not there.
    pub fn get(flavour: &str) -> Result<Self> {
        let cache = cache::dir()?;
        let dir = cache.join("kernels").join(flavour);
        make_once(&dir, RECIPE, |new| fetch(&cache, flavour, new))
            .with_context(|| format!("cannot get kernel {flavour}"))?;
        let version = fs::read_to_string(dir.join("version"))?;
        Ok(Self { dir, version })
    }

    /// The bzImage.
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The ELF file.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The Debian package it came from.
    pub fn package(&self) -> String {
        format!("linux-image-{}", self.version)
    }

    /// Its modules.
    pub fn modules(&self) -> Result<Modules> {
        Modules::open(&self.dir.join("lib/modules").join(&self.version))
    }
}

/// The newest kernel of each series and kind that Debian has now, of the tested release and those before and after: their flavours.
pub fn available() -> Result<Vec<String>> {
    let mut flavours: Vec<_> =
        Apt::open_all(&cache::dir()?)?.search(IMAGES)?.iter().filter_map(|name| flavour_of(name)).collect();
    flavours.sort();
    flavours.dedup();
    Ok(flavours.into_iter().map(|(series, kind)| format!("{}.{}-{kind}", series[0], series[1])).collect())
}

/// Packages of kernels, by a regular expression.
const IMAGES: &str = "^linux-image-[0-9].*-amd64$";
/// What a kernel's files are in: all in the first, or the kernel in the second, its modules in the third and their lists in the last.
const PARTS: [&str; 4] = ["image", "binary", "modules", "base"];

fn fetch(cache: &Path, flavour: &str, dir: &Path) -> Result<()> {
    let apt = if FLAVOURS.contains(&flavour) { Apt::open(cache)? } else { Apt::open_all(cache)? };
    let names = apt.search(IMAGES)?;
    let package = newest(&names, flavour).with_context(|| format!("the mirror has no package for {flavour}"))?;
    progress(&format!("fetching kernel {flavour}: {package}"));
    let root = dir.with_extension("root");
    cache::remove(&root)?;
    let version = package.trim_start_matches("linux-image-");
    let parts = PARTS.map(|part| format!("linux-{part}-{version}"));
    let parts = parts.iter().map(String::as_str);
    let parts: Vec<_> = parts
        .filter(|part| apt.search(&format!("^{}$", part.replace('+', "[+]"))).is_ok_and(|found| !found.is_empty()))
        .collect();
    apt.unpack(&parts, None, &root)?;
    let modules = [root.join("lib/modules"), root.join("usr/lib/modules")].into_iter().find(|p| p.exists());
    let modules = modules.context("the package holds no modules")?.join(version);
    fs::create_dir_all(dir.join("lib/modules"))?;
    let places = [root.join(format!("boot/vmlinuz-{version}")), modules.join("vmlinuz")];
    let vmlinuz = places.iter().find(|place| place.exists()).context("the package holds no kernel")?;
    fs::rename(vmlinuz, dir.join("vmlinuz"))?;
    fs::rename(modules, dir.join("lib/modules").join(version))?;
    let depmod = Command::new("/sbin/depmod").arg("-b").arg(dir).arg(version).status().context("cannot run depmod")?;
    ensure!(depmod.success(), "depmod failed");
    let vmlinux = payload(&fs::read(dir.join("vmlinuz"))?)?;
    ensure!(vmlinux.starts_with(b"\x7fELF"), "the kernel's payload is no ELF file");
    fs::write(dir.join("vmlinux"), vmlinux)?;
    fs::write(dir.join("version"), version)?;
    cache::remove(&root)
}

/// All numbers of a package's version, and the kernel's kind. None of packages that only name another.
fn version_of(name: &str) -> Option<(Vec<u64>, &'static str)> {
    let rest = name.strip_prefix("linux-image-")?.strip_suffix("-amd64")?;
    let kinds = [("-cloud", "cloud"), ("-rt", "rt"), ("", "generic")];
    let (rest, kind) = kinds.into_iter().find_map(|(suffix, kind)| Some((rest.strip_suffix(suffix)?, kind)))?;
    let numbers: Vec<_> = rest.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    (rest.split('.').count() > 2 && numbers.len() > 2).then_some((numbers, kind))
}

/// A package's series and kind, if the series is new enough.
fn flavour_of(name: &str) -> Option<([u64; 2], &'static str)> {
    let (numbers, kind) = version_of(name)?;
    let series = [numbers[0], numbers[1]];
    (series >= OLDEST).then_some((series, kind))
}

/// The newest package of a flavour (`6.12-cloud`) among `names`.
fn newest<'a>(names: &'a [String], flavour: &str) -> Option<&'a str> {
    let (series, kind) = flavour.split_once('-')?;
    let (major, minor) = series.split_once('.')?;
    let wanted = ([major.parse().ok()?, minor.parse().ok()?], kind);
    let fitting = names.iter().filter(|name| flavour_of(name) == Some(wanted));
    fitting.max_by_key(|name| version_of(name)).map(String::as_str)
}

/// The uncompressed kernel inside a bzImage.
///
/// The setup header (`Documentation/arch/x86/boot.rst`) says where the payload is: its offset counts from the start of the
/// protected-mode code, which follows the boot sector and `setup_sects` sectors.
pub fn payload(bzimage: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| bzimage.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    ensure!(bzimage.get(0x202..0x206) == Some(b"HdrS"), "not a bzImage");
    let version = u16::from_le_bytes([bzimage[0x206], bzimage[0x207]]);
    ensure!(version >= 0x208, "boot protocol {version:#x} is older than 2.08");
    let sectors = match bzimage[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let (Some(offset), Some(length)) = (word(0x248), word(0x24c)) else { bail!("the setup header is cut short") };
    let start = (sectors + 1) * 512 + offset;
    let packed = bzimage.get(start..start + length).context("the payload lies outside the file")?;
    decompress(packed)
}

/// Decompresses by magic, with the system's tools; what has no known magic is returned as it is.
pub fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
    let tool: &[&str] = match bytes {
        [0x1f, 0x8b, ..] => &["gzip", "-dc"],
        [0xfd, b'7', b'z', b'X', b'Z', ..] => &["xz", "-dc"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dc"],
        [0x02, 0x21, 0x4c, 0x18, ..] => &["lz4", "-dc"],
        [b'B', b'Z', b'h', ..] => &["bzip2", "-dc"],
        [0x5d, 0, 0, ..] => &["xz", "--format=lzma", "-dc"],
        [0x89, b'L', b'Z', b'O', ..] => &["lzop", "-dc"],
        _ => return Ok(bytes.to_vec()),
    };
    let mut child = Command::new(tool[0])
        .args(&tool[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {}", tool[0]))?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    // A kernel's payload may be followed by its size: the tool then stops reading, which is no fault of ours.
    let out = std::thread::scope(|s| {
        s.spawn(move || stdin.write_all(bytes));
        child.wait_with_output()
    })?;
    ensure!(!out.stdout.is_empty(), "{} made nothing of it", tool[0]);
    Ok(out.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_package_by_number() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-52-cloud-amd64",
            "linux-image-6.1.0-52-amd64",
            "linux-image-6.12.9+deb12-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-6.12.117+deb12-rt-amd64",
            "linux-image-6.12-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(newest(&names, "6.1-cloud"), Some("linux-image-6.1.0-52-cloud-amd64"));
        assert_eq!(newest(&names, "6.12-generic"), Some("linux-image-6.12.117+deb12-amd64"));
        assert_eq!(newest(&names, "6.12-cloud"), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest(&names, "6.12-rt"), Some("linux-image-6.12.117+deb12-rt-amd64"));
        assert_eq!(newest(&names, "7.0-cloud"), None);
        let flavours: std::collections::BTreeSet<_> = names.iter().filter_map(|name| flavour_of(name)).collect();
        assert_eq!(
            flavours.into_iter().collect::<Vec<_>>(),
            [([6, 1], "cloud"), ([6, 1], "generic"), ([6, 12], "cloud"), ([6, 12], "generic"), ([6, 12], "rt")]
        );
        assert_eq!(flavour_of("linux-image-4.19.0-27-amd64"), None);
    }

    #[test]
    fn payload_is_found_by_the_header() {
        let mut image = vec![0u8; 4 * 512];
        image[0x1f1] = 3;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&5u32.to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(b"plainrest");
        assert_eq!(payload(&image).unwrap(), b"plain");
        assert!(payload(&image[..4 * 512]).is_err());
        assert!(payload(b"short").is_err());
    }
}
