//! Scripts that mmdebstrap runs while it makes a store's tree, with the tree's path as their argument.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A file or folder to be copied into a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSpec {
    /// Here.
    pub source: PathBuf,
    /// In the store, absolute.
    pub destination: String,
}

impl FileSpec {
    /// `SRC:DST`. The last colon that a slash follows parts the two.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some((source, destination)) = text.rsplit_once(":/") else {
            return Err("write SRC:DST, where DST is an absolute path in the store".into());
        };
        if source.is_empty() {
            return Err("there is no SRC before the colon".into());
        }
        if destination.split('/').any(|part| part == "..") {
            return Err("DST has '..' in it".into());
        }
        Ok(Self { source: source.into(), destination: format!("/{destination}") })
    }
}

/// Before the package lists are fetched: gives apt what the host's knows of passwords and of preferences.
pub const SETUP: &str = "#!/bin/sh
set -e
mkdir -p \"$1/etc/apt\"
for part in auth.conf auth.conf.d preferences preferences.d; do
    if [ -e \"/etc/apt/$part\" ]; then cp -a -t \"$1/etc/apt\" \"/etc/apt/$part\"; fi
done
";

/// When there are package lists: leaves the names that are unknown in `unknown`, and those that are not in `names`.
pub fn known(packages: &[String]) -> String {
    format!(
        "#!/bin/sh
work=$(dirname \"$0\")
export APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\"
for name in {}; do
    apt-cache show \"$name\" >/dev/null 2>&1 && continue
    # What has no package of its own may be provided by another.
    apt-cache showpkg \"$name\" 2>/dev/null | sed '1,/^Reverse Provides/d' | grep -q . && continue
    echo \"$name\" >>\"$work/unknown\"
done
[ ! -e \"$work/unknown\" ] || {{ apt-cache pkgnames >\"$work/names\"; exit 1; }}
",
        packages.join(" ")
    )
}

/// At the end: copies files in, runs the setup script and says which packages there are.
///
/// Files are put in their places inside the tree's root, so that a link in it never leads out of it.
pub fn customize(files: &[FileSpec], setup: Option<&OsStr>) -> Vec<u8> {
    let mut script = String::from(
        "#!/bin/sh
set -e
work=$(dirname \"$0\")
root=$1
chroot \"$root\" dpkg-query -W -f '${db:Status-Abbrev}\\t${binary:Package}\\t${Version}\\n' >\"$work/packages\"
mkdir -p \"$root/guest\"
mkdir -m 700 \"$root/.civic\"
put() {
    mkdir \"$root/.civic/new\"
    cp -RH --preserve=mode,timestamps -T -- \"$1\" \"$root/.civic/new/item\" 2>\"$work/copy\" || {
        echo \"E: cannot copy: $(cat \"$work/copy\")\" >&2; exit 1; }
    chroot \"$root\" sh -ec '
        case $1 in */) mkdir -p -- \"$1\";; esac
        if [ -d \"$1\" ] && [ ! -d /.civic/new/item ]; then to=${1%/}/$2; else to=${1%/}; fi
        if [ -z \"$to\" ]; then to=/; fi
        mkdir -p -- \"$(dirname -- \"$to\")\"
        cp -a -T -- /.civic/new/item \"$to\"' put \"$2\" \"$(basename -- \"$1\")\"
    rm -rf \"$root/.civic/new\"
}
",
    );
    let mut bytes = Vec::new();
    for file in files {
        let _ = write!(script, "put ");
        bytes.append(&mut std::mem::take(&mut script).into_bytes());
        bytes.extend(quoted(file.source.as_os_str()));
        bytes.push(b' ');
        bytes.extend(quoted(OsStr::new(&file.destination)));
        bytes.push(b'\n');
    }
    bytes.extend(script.into_bytes());
    if let Some(setup) = setup {
        bytes.extend(b"cp -T -- ");
        bytes.extend(quoted(setup));
        bytes.extend(b" \"$root/.civic/setup\"\nchmod 700 \"$root/.civic/setup\"\n");
        bytes.extend(b"chroot \"$root\" /.civic/setup >&2 || { echo \"E: the setup script has failed with status $?\" >&2; exit 1; }\n");
    }
    // Passwords and proxies are the host's.
    bytes.extend(
        b"rm -rf \"$root/.civic\" \"$root/etc/apt/auth.conf\" \"$root/etc/apt/auth.conf.d\"
rm -f \"$root/etc/resolv.conf\" \"$root/etc/hostname\"
",
    );
    bytes
}

/// As one word of a shell.
fn quoted(text: &OsStr) -> Vec<u8> {
    let mut word = vec![b'\''];
    for byte in text.as_bytes() {
        match byte {
            b'\'' => word.extend(b"'\\''"),
            byte => word.push(*byte),
        }
    }
    word.push(b'\'');
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_where() {
        let spec = FileSpec::parse("a:b:/etc/x").unwrap();
        assert_eq!(spec, FileSpec { source: "a:b".into(), destination: "/etc/x".into() });
        for wrong in ["a", "a:b", ":/etc", "a:/etc/../x"] {
            assert!(FileSpec::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_path_stays_one_word() {
        assert_eq!(quoted(OsStr::new("it's $(x)")), b"'it'\\''s $(x)'");
    }
}
