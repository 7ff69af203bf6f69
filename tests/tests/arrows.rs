//! Which crate may depend on which: ARCHITECTURE.md's arrows, checked.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Every crate of the product and the crates of ours it may depend on. What is not named here may not exist.
const ALLOWED: [(&str, &[&str]); 15] = [
    ("civic", &["civic-api", "civic-loader"]),
    ("civic-api", &[]),
    ("civic-confine", &[]),
    ("civic-devices", &["civic-confine"]),
    ("civic-fork", &["civic-confine"]),
    ("civic-guest", &[]),
    ("civic-inject", &["civic-guest", "civic-loader"]),
    ("civic-jailer", &["civic-api"]),
    ("civic-loader", &[]),
    ("civic-vmm", &["civic-api", "civic-confine", "civic-devices", "civic-fork", "civic-guest", "civic-inject"]),
    // What builds and tests the product; nothing depends on these but each other.
    ("civic-fuzz", &["civic-api", "civic-devices", "civic-fork", "civic-guest", "civic-inject", "civic-vmm"]),
    ("civic-bench", &[]),
    ("civic-testbed", &[]),
    ("civic-tests", &["civic-api", "civic-bench", "civic-devices", "civic-fork", "civic-guest", "civic-vmm"]),
    ("xtask", &["civic-bench", "civic-loader", "civic-testbed"]),
];

/// The crates of this workspace with those of ours that they use, tests included.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out =
        Command::new(cargo).args(["metadata", "--format-version", "1", "--no-deps", "--offline"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: BTreeSet<_> = packages.iter().map(|p| text(&p["name"])).collect();
    let uses = |p: &serde_json::Value| {
        let names = p["dependencies"].as_array().unwrap().iter().map(|d| text(&d["name"]));
        let name = text(&p["name"]);
        // A crate may switch its own features on for its tests.
        names.filter(|n| ours.contains(n) && *n != name).collect()
    };
    packages.iter().map(|p| (text(&p["name"]), uses(p))).collect()
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let allowed = BTreeMap::from(ALLOWED);
    let arrows = arrows();
    assert!(arrows.contains_key("civic-vmm"));
    for (name, uses) in &arrows {
        let allowed = allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} has no place in ARCHITECTURE.md"));
        let wrong: Vec<_> = uses.iter().filter(|u| !allowed.contains(&u.as_str())).collect();
        assert!(wrong.is_empty(), "{name} must not depend on {wrong:?}");
    }
}
