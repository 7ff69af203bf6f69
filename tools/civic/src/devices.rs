//! What `--disk` and `--net` take: `key=value` pairs and words, with commas between. A comma in a value is doubled.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use civic_api::{DiskConfig, MacAddr, NetConfig};

/// `path=FILE[,id=ID][,ro]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    path: PathBuf,
    id: Option<String>,
    read_only: bool,
}

/// `tap=NAME[,mac=ADDRESS][,id=ID]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    tap: String,
    mac: Option<MacAddr>,
    id: Option<String>,
}

impl DiskSpec {
    /// The disk for the configuration; `index` makes its id where it has none.
    pub fn config(&self, index: usize) -> DiskConfig {
        let id = self.id.clone().unwrap_or_else(|| format!("disk{index}"));
        DiskConfig { id, path: self.path.clone(), read_only: self.read_only }
    }
}

impl NetSpec {
    /// The network card for the configuration; `index` makes its id where it has none.
    pub fn config(&self, index: usize) -> NetConfig {
        let id = self.id.clone().unwrap_or_else(|| format!("net{index}"));
        NetConfig { id, tap: self.tap.clone(), mac: self.mac }
    }
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "path=FILE[,id=ID][,ro]";
        let mut fields = Fields::parse(text, FORM)?;
        let path = fields.take("path").ok_or_else(|| format!("no path: write {FORM}"))?.into();
        let (id, read_only) = (fields.take("id"), fields.take_word("ro"));
        fields.end()?;
        Ok(Self { path, id, read_only })
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "tap=NAME[,mac=ADDRESS][,id=ID]";
        let mut fields = Fields::parse(text, FORM)?;
        let tap = fields.take("tap").ok_or_else(|| format!("no tap: write {FORM}"))?;
        let mac = fields.take("mac").map(|mac| mac.parse().map_err(|error| format!("mac: {error}"))).transpose()?;
        let id = fields.take("id");
        fields.end()?;
        Ok(Self { tap, mac, id })
    }
}

struct Fields {
    form: &'static str,
    /// A word has no value.
    fields: BTreeMap<String, Option<String>>,
}

impl Fields {
    fn parse(text: &str, form: &'static str) -> Result<Self, String> {
        let mut fields = BTreeMap::new();
        for field in split(text) {
            let (key, value) = match field.split_once('=') {
                Some((_, "")) => return Err(format!("'{field}' has no value: write {form}")),
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (field.clone(), None),
            };
            if fields.insert(key.clone(), value).is_some() {
                return Err(format!("'{key}' is given twice"));
            }
        }
        Ok(Self { form, fields })
    }

    /// The value of `key`.
    fn take(&mut self, key: &str) -> Option<String> {
        // A key without a value stays, for `end` to complain about.
        self.fields.get(key)?.as_ref()?;
        self.fields.remove(key)?
    }

    /// Whether the word is there.
    fn take_word(&mut self, word: &str) -> bool {
        let there = self.fields.get(word) == Some(&None);
        if there {
            self.fields.remove(word);
        }
        there
    }

    /// Complains about what nobody took.
    fn end(self) -> Result<(), String> {
        match self.fields.first_key_value() {
            None => Ok(()),
            Some((key, _)) => Err(format!("'{key}' means nothing here: write {}", self.form)),
        }
    }
}

/// Splits at single commas; two stand for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        if c != ',' {
            parts[last].push(c);
        } else if chars.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let check = |text: &str, path: &str, id: &str, ro: bool| {
            let config = text.parse::<DiskSpec>().unwrap().config(3);
            assert_eq!(config, DiskConfig { id: id.into(), path: path.into(), read_only: ro }, "{text}");
        };
        check("path=root.img", "root.img", "disk3", false);
        check("path=/a b=c,ro,id=data", "/a b=c", "data", true);
        check("id=x,path=a,,b", "a,b", "x", false);
        for (text, part) in [
            ("", "no path"),
            ("root.img", "no path"),
            ("path=", "no value"),
            ("path", "no path"),
            ("path=a,path=b", "'path' is given twice"),
            ("path=a,rw", "'rw' means nothing"),
            ("path=a,ro=1", "'ro' means nothing"),
            ("path=a,id", "'id' means nothing"),
            ("path=a,", "'' means nothing"),
        ] {
            let error = text.parse::<DiskSpec>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn network_cards() {
        let net = "tap=tap0,mac=52:54:00:12:34:56,id=lan".parse::<NetSpec>().unwrap().config(0);
        let mac = Some(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!(net, NetConfig { id: "lan".into(), tap: "tap0".into(), mac });
        let net = "tap=tap0".parse::<NetSpec>().unwrap().config(1);
        assert_eq!(net, NetConfig { id: "net1".into(), tap: "tap0".into(), mac: None });
        for (text, part) in
            [("mac=1", "no tap"), ("tap=a,mac=1", "mac: '1' is not a MAC address"), ("tap=a,ro", "'ro'")]
        {
            let error = text.parse::<NetSpec>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
