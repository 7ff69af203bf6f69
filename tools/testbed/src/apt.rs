//! Debian packages: which mirror, which names, fetched without being installed.
//!
//! The system's own apt configuration says which mirror to use; package lists and downloads are kept in the cache, apart
//! from the system's, so that nothing here needs root or changes the machine. Only [`install`] does both.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The Debian release that guests, their kernels and the testbed's kernel come from.
pub const RELEASE: &str = "bookworm";
/// Releases before and after it, with what is added to them; a mirror need not have each.
const NEIGHBOURS: [&str; 4] = ["bullseye", "trixie", "trixie-backports", "sid"];
/// Those of them that have an archive of security updates.
const SUPPORTED: [&str; 2] = ["bullseye", "trixie"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One archive that apt may fetch from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it is.
    pub uri: String,
    /// `bookworm`, `bookworm-security`, ….
    pub suites: Vec<String>,
    /// `main`, ….
    pub components: Vec<String>,
}

/// Parses the one-line format (`sources.list(5)`): `deb [options] uri suite component…`.
pub fn parse_list(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb ").or_else(|| line.strip_prefix("deb\t")) else { continue };
        let mut rest = rest.trim_start();
        if let Some(options) = rest.strip_prefix('[') {
            let Some((_, after)) = options.split_once(']') else { continue };
            rest = after;
        }
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        sources.push(Source { uri, suites: vec![suite], components: words.collect() });
    }
    sources
}

/// Parses the deb822 format (`sources.list(5)`): stanzas of `Field: value`, continued by indented lines.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let lines = text.lines().filter(|l| !l.starts_with('#')).collect::<Vec<_>>();
    for stanza in lines.split(|l| l.trim().is_empty()) {
        let mut fields: Vec<(String, Vec<String>)> = Vec::new();
        for line in stanza {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.extend(line.split_whitespace().map(str::to_owned));
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim().to_ascii_lowercase(), value.split_whitespace().map(str::to_owned).collect()));
            }
        }
        let get = |name: &str| fields.iter().find(|f| f.0 == name).map(|f| f.1.clone()).unwrap_or_default();
        let off = get("enabled").first().is_some_and(|v| matches!(v.as_str(), "no" | "false" | "0" | "off"));
        if off || !get("types").iter().any(|t| t == "deb") {
            continue;
        }
        for uri in get("uris") {
            sources.push(Source { uri, suites: get("suites"), components: get("components") });
        }
    }
    sources
}

fn system_sources() -> Vec<Source> {
    let mut sources = fs::read_to_string("/etc/apt/sources.list").map(|t| parse_list(&t)).unwrap_or_default();
    let mut files: Vec<_> =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.extend(parse_list(&text)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// Where to fetch from, as lines for a `sources.list`: the release, its updates, security and backports.
///
/// `CIVIC_DEBIAN_MIRROR` overrides what the system's configuration says.
pub fn mirror_lines() -> Result<Vec<String>> {
    let given = std::env::var("CIVIC_DEBIAN_MIRROR").ok();
    lines_for(&system_sources(), given.as_deref(), &system_codename(), &[])
}

/// The same with the releases before and after.
fn all_mirror_lines() -> Result<Vec<String>> {
    let given = std::env::var("CIVIC_DEBIAN_MIRROR").ok();
    lines_for(&system_sources(), given.as_deref(), &system_codename(), &NEIGHBOURS)
}

fn system_codename() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = release.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    codename.unwrap_or(RELEASE).trim_matches('"').to_owned()
}

fn lines_for(sources: &[Source], given: Option<&str>, codename: &str, neighbours: &[&str]) -> Result<Vec<String>> {
    let with = |suite: &str| {
        let found =
            sources.iter().find(|s| s.suites.iter().any(|x| x == suite) && s.components.iter().any(|c| c == "main"));
        found.map(|s| s.uri.trim_end_matches('/').to_owned())
    };
    let Some(mirror) = given.map(str::to_owned).or_else(|| with(codename)) else {
        bail!("apt's configuration names no Debian mirror for {codename}; set CIVIC_DEBIAN_MIRROR");
    };
    let entry = |uri: &str, suite: &str| format!("deb [signed-by={KEYRING}] {uri} {suite} main");
    let mut lines: Vec<_> = ["", "-updates", "-backports"].map(|s| entry(&mirror, &format!("{RELEASE}{s}"))).to_vec();
    lines.extend(neighbours.iter().map(|suite| entry(&mirror, suite)));
    if let Some(security) = with(&format!("{codename}-security")) {
        let supported = SUPPORTED.iter().filter(|release| neighbours.contains(release));
        let releases = [RELEASE].into_iter().chain(supported.copied());
        lines.extend(releases.map(|release| entry(&security, &format!("{release}-security"))));
    }
    Ok(lines)
}

/// Package lists of our own, kept in the cache.
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Opens the lists in `cache`, fetching them when there are none or they are older than a day.
    pub fn open(cache: &Path) -> Result<Self> {
        Self::open_lists(cache.join("apt"), &mirror_lines()?, true)
    }

    /// The same with the releases before and after, as far as the mirror has them.
    pub fn open_all(cache: &Path) -> Result<Self> {
        Self::open_lists(cache.join("apt-all"), &all_mirror_lines()?, false)
    }

    fn open_lists(dir: PathBuf, lines: &[String], complete: bool) -> Result<Self> {
        let apt = Self { dir };
        fs::create_dir_all(apt.dir.join("lists/partial"))?;
        fs::create_dir_all(apt.dir.join("cache/archives/partial"))?;
        let list = apt.dir.join("sources.list");
        let text = lines.join("\n") + "\n";
        let stamp = apt.dir.join("updated");
        let age = fs::metadata(&stamp).and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_none_or(|a| a.as_secs() > 86_400) || fs::read_to_string(&list).ok().as_ref() != Some(&text) {
            fs::write(&list, text)?;
            crate::cache::progress("fetching package lists");
            let out = apt.command("apt-get").args(["update", "-q"]).output().context("cannot run apt-get")?;
            let said = String::from_utf8_lossy(&out.stderr);
            ensure!(out.status.success() || !complete, "apt-get update failed:\n{said}");
            for line in said.lines().filter(|line| line.starts_with("E:") && !out.status.success()) {
                crate::cache::progress(&format!("the mirror has not all releases: {line}"));
            }
            fs::write(stamp, "")?;
        }
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut c = Command::new(program);
        let option = |key: &str, value: &str| format!("{key}={}", self.dir.join(value).display());
        for (key, value) in
            [("Dir::Etc::sourcelist", "sources.list"), ("Dir::State::lists", "lists"), ("Dir::Cache", "cache")]
        {
            c.arg("-o").arg(option(key, value));
        }
        c.args(["-o", "Dir::Etc::sourceparts=/dev/null", "-o", "APT::Sandbox::User=root"]);
        c.stdin(Stdio::null());
        c
    }

    /// Names of the packages that match a regular expression.
    pub fn search(&self, pattern: &str) -> Result<Vec<String>> {
        let out = self.command("apt-cache").args(["search", "--names-only", pattern]).output()?;
        ensure!(out.status.success(), "apt-cache search {pattern} failed");
        let text = String::from_utf8(out.stdout)?;
        Ok(text.lines().filter_map(|l| l.split(' ').next()).map(str::to_owned).collect())
    }

    /// Fetches packages and unpacks them into `root`, installing nothing. `suite` prefers a suite such as backports.
    pub fn unpack(&self, packages: &[&str], suite: Option<&str>, root: &Path) -> Result<()> {
        let debs = root.with_extension("debs");
        let _ = fs::remove_dir_all(&debs);
        fs::create_dir_all(&debs)?;
        let mut c = self.command("apt-get");
        if let Some(suite) = suite {
            c.args(["-t", suite]);
        }
        let out = c.args(["download", "-q"]).args(packages).current_dir(&debs).output()?;
        ensure!(
            out.status.success(),
            "apt-get download {packages:?} failed:\n{}",
            String::from_utf8_lossy(&out.stderr)
        );
        for deb in fs::read_dir(&debs)? {
            let status = Command::new("dpkg").arg("-x").arg(deb?.path()).arg(root).status()?;
            ensure!(status.success(), "dpkg -x failed");
        }
        fs::remove_dir_all(debs)?;
        Ok(())
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A program to be run as root, by way of `sudo` if need be.
pub fn as_root(program: &Path) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.arg("-n").arg(program);
    sudo
}

/// Installs what of `packages` is missing on this machine: as root, or by way of `sudo`.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let root = is_root();
    let sudo = || Command::new("sudo").args(["-n", "true"]).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
    ensure!(
        root || sudo(),
        "missing packages, and neither root nor sudo to install them; please run:\n  apt-get install {}",
        missing.join(" ")
    );
    crate::cache::progress(&format!("installing {}", missing.join(" ")));
    for args in [&["update", "-q"][..], &["install", "-qy", "--no-install-recommends"][..]] {
        let mut c = as_root(Path::new("env"));
        c.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(args);
        if args[0] == "install" {
            c.args(&missing);
        }
        let out = c.stdin(Stdio::null()).output()?;
        ensure!(out.status.success(), "apt-get {} failed:\n{}", args[0], String::from_utf8_lossy(&out.stderr));
    }
    // What was there from another release may have had to go for it.
    let removed = self::missing(packages)?;
    ensure!(
        removed.iter().all(|package| !missing.contains(package)),
        "apt-get has not installed {}",
        removed.join(" ")
    );
    install(&removed)
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let known =
        Command::new("dpkg-query").args(["-W", "-f", "${Package} ${db:Status-Abbrev}\n"]).args(packages).output();
    let known = known.context("cannot run dpkg-query: is this Debian or a relative?")?;
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    let there =
        |p: &&str| known.lines().any(|l| l.split_once(' ').is_some_and(|(n, s)| n == *p && s.starts_with("ii")));
    Ok(packages.iter().filter(|p| !there(p)).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_sources() {
        let text = "# a comment\ndeb [arch=amd64 signed-by=/k.gpg] http://m/debian/ bookworm main contrib # why\n\
                    deb-src http://m/debian bookworm main\ndeb http://s/x bookworm-security main\n";
        let found = parse_list(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].uri, "http://m/debian/");
        assert_eq!(found[0].components, ["main", "contrib"]);
        assert_eq!(found[1].suites, ["bookworm-security"]);
    }

    #[test]
    fn deb822_sources() {
        let text = "Types: deb deb-src\n# http://old\nURIs: http://m/debian\nSuites: bookworm\n bookworm-updates\n\
                    Components: main\n\nTypes: deb\nEnabled: no\nURIs: http://off\nSuites: bookworm\nComponents: main\n";
        let found = parse_deb822(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].suites, ["bookworm", "bookworm-updates"]);
    }

    #[test]
    fn lines_name_every_suite() {
        let sources = parse_list("deb http://m/debian/ trixie main\ndeb http://s/sec trixie-security main");
        let lines = lines_for(&sources, None, "trixie", &[]).unwrap();
        assert_eq!(lines.len(), 4);
        assert!(lines[0].ends_with("http://m/debian bookworm main"));
        assert!(lines[3].ends_with("http://s/sec bookworm-security main"));
        assert!(lines_for(&[], None, "trixie", &[]).is_err());
        assert_eq!(lines_for(&[], Some("http://g"), "trixie", &[]).unwrap().len(), 3);
        let all = lines_for(&sources, None, "trixie", &NEIGHBOURS).unwrap();
        assert_eq!(all.len(), 3 + 4 + 3);
        assert!(all[3].ends_with("http://m/debian bullseye main"));
        assert!(all[8].ends_with("http://s/sec bullseye-security main"));
    }
}
