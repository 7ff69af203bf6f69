//! What `--disk`, `--net` and `--vsock` take: `key=value` pairs and words, with commas between. A comma in a value is doubled.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use civic_api::launch::{MovedDisk, MovedNet};
use civic_api::{ByteSize, DiskConfig, DiskFormat, ForksConfig, MacAddr, NetConfig, RateLimit, STORE_ID, VsockConfig};

/// `path=FILE[,id=ID][,ro|overlay][,format=raw|qcow2][,backing][,queues=N][,bps=SIZE][,iops=N]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    id: Option<String>,
    /// Its id is not yet known.
    disk: DiskConfig,
}

/// `tap=NAME[,mac=ADDRESS][,id=ID][,queues=N][,mtu=N][,rx-bps=SIZE][,rx-pps=N][,tx-bps=SIZE][,tx-pps=N]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    id: Option<String>,
    /// Its id is not yet known.
    net: NetConfig,
}

/// `uds=PATH[,cid=N]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec(VsockConfig);

impl DiskSpec {
    /// The disk for the configuration; `index` makes its id where it has none.
    pub fn config(&self, index: usize) -> DiskConfig {
        let id = self.id.clone().unwrap_or_else(|| format!("disk{index}"));
        DiskConfig { id, ..self.disk.clone() }
    }

    /// The same with its texts changed.
    pub fn with(&self, change: impl Fn(&str) -> String) -> Self {
        let path = self.disk.path.to_str().map_or_else(|| self.disk.path.clone(), |path| change(path).into());
        Self { id: self.id.as_deref().map(&change), disk: DiskConfig { path, ..self.disk.clone() } }
    }

    /// Where a restored VM's disk is now.
    pub fn moved(&self) -> Result<MovedDisk, String> {
        match &self.id {
            Some(id) if self.disk == DiskConfig::new("", &self.disk.path) => {
                Ok(MovedDisk { id: id.clone(), path: self.disk.path.clone() })
            }
            _ => Err(moved_form("id=ID,path=FILE")),
        }
    }
}

impl NetSpec {
    /// The network card for the configuration; `index` makes its id where it has none.
    pub fn config(&self, index: usize) -> NetConfig {
        let id = self.id.clone().unwrap_or_else(|| format!("net{index}"));
        NetConfig { id, ..self.net.clone() }
    }

    /// The same with its texts changed.
    pub fn with(&self, change: impl Fn(&str) -> String) -> Self {
        Self { id: self.id.as_deref().map(&change), net: NetConfig { tap: change(&self.net.tap), ..self.net.clone() } }
    }

    /// The tap that a restored VM's network card is on now.
    pub fn moved(&self) -> Result<MovedNet, String> {
        match &self.id {
            Some(id) if self.net == NetConfig::new("", &self.net.tap) => {
                Ok(MovedNet { id: id.clone(), tap: self.net.tap.clone() })
            }
            _ => Err(moved_form("id=ID,tap=NAME")),
        }
    }
}

/// `PATH[,overlay][,id=ID]`: a disk of tools, for forks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSpec(DiskConfig);

impl StoreSpec {
    /// The disk as it was given.
    pub fn unnumbered(&self) -> &DiskConfig {
        &self.0
    }

    /// The disk, for the child of this number.
    pub fn config(&self, number: usize) -> DiskConfig {
        let path = self.0.path.to_str().map(|path| path.replace("{n}", &number.to_string()).into());
        DiskConfig { path: path.unwrap_or_else(|| self.0.path.clone()), ..self.0.clone() }
    }
}

impl FromStr for StoreSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "FILE[,overlay][,ro][,format=raw|qcow2][,id=ID]";
        let (path, rest) = match split(text).split_first() {
            Some((path, rest)) if !path.is_empty() => (path.clone(), rest.to_vec()),
            _ => return Err(format!("no file: write {FORM}")),
        };
        // The rest as for any disk.
        let doubled = |text: &str| text.replace(',', ",,");
        let fields = std::iter::once(format!("path={}", doubled(&path))).chain(rest.iter().map(|field| doubled(field)));
        let spec: DiskSpec = fields.collect::<Vec<_>>().join(",").parse()?;
        let id = spec.id.unwrap_or_else(|| STORE_ID.into());
        Ok(Self(DiskConfig { id, ..spec.disk }))
    }
}

/// `--forks`.
#[derive(Clone, Debug)]
pub struct ForksSpec(pub ForksConfig);

impl VsockSpec {
    /// The device for the configuration.
    pub fn config(&self) -> VsockConfig {
        self.0.clone()
    }

    /// Where a restored VM's unix socket is to be now.
    pub fn moved(&self) -> Result<PathBuf, String> {
        match self.0.cid {
            None => Ok(self.0.uds.clone()),
            Some(_) => Err(moved_form("uds=PATH")),
        }
    }
}

fn moved_form(form: &str) -> String {
    format!("a restored VM's devices are as they were saved: write {form} for one that is elsewhere now")
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "path=FILE[,id=ID][,ro|overlay][,format=raw|qcow2][,backing][,queues=N][,bps=SIZE][,iops=N]";
        let mut fields = Fields::parse(text, FORM)?;
        let path = fields.take("path").ok_or_else(|| format!("no path: write {FORM}"))?;
        let id = fields.take("id");
        let format = match fields.take("format").as_deref() {
            None | Some("raw") => DiskFormat::Raw,
            Some("qcow2") => DiskFormat::Qcow2,
            Some(other) => return Err(format!("format: '{other}' is none: give raw or qcow2")),
        };
        let disk = DiskConfig {
            read_only: fields.take_word("ro"),
            format,
            backing: fields.take_word("backing"),
            overlay: fields.take_word("overlay"),
            queues: fields.take_number("queues")?,
            rate: fields.take_rate("bps", "iops")?,
            ..DiskConfig::new("", path)
        };
        fields.end()?;
        Ok(Self { id, disk })
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str =
            "tap=NAME[,mac=ADDRESS][,id=ID][,queues=N][,mtu=N][,rx-bps=SIZE][,rx-pps=N][,tx-bps=SIZE][,tx-pps=N]";
        let mut fields = Fields::parse(text, FORM)?;
        let tap = fields.take("tap").ok_or_else(|| format!("no tap: write {FORM}"))?;
        let id = fields.take("id");
        let net = NetConfig {
            mac: fields.take_parsed::<MacAddr>("mac")?,
            queues: fields.take_number("queues")?,
            mtu: fields.take_number("mtu")?,
            rx_rate: fields.take_rate("rx-bps", "rx-pps")?,
            tx_rate: fields.take_rate("tx-bps", "tx-pps")?,
            ..NetConfig::new("", tap)
        };
        fields.end()?;
        Ok(Self { id, net })
    }
}

impl FromStr for ForksSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "[memory=SIZE][,disk=SIZE][,dir=DIR]";
        let mut fields = Fields::parse(text, FORM)?;
        let memory_bytes = fields.take_parsed::<ByteSize>("memory")?.map(|size| size.0);
        let disk_bytes = fields.take_parsed::<ByteSize>("disk")?.map(|size| size.0);
        let dir = fields.take("dir").map(PathBuf::from);
        fields.end()?;
        Ok(Self(ForksConfig { memory_bytes, disk_bytes, dir }))
    }
}

impl FromStr for VsockSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "uds=PATH[,cid=N]";
        let mut fields = Fields::parse(text, FORM)?;
        let uds = fields.take("uds").ok_or_else(|| format!("no uds: write {FORM}"))?.into();
        let cid = fields.take_number("cid")?;
        fields.end()?;
        Ok(Self(VsockConfig { uds, cid }))
    }
}

/// `key=value` and words, separated by commas.
pub(crate) struct Fields {
    form: &'static str,
    /// A word has no value.
    fields: BTreeMap<String, Option<String>>,
}

impl Fields {
    pub(crate) fn parse(text: &str, form: &'static str) -> Result<Self, String> {
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
    pub(crate) fn take(&mut self, key: &str) -> Option<String> {
        // A key without a value stays, for `end` to complain about.
        self.fields.get(key)?.as_ref()?;
        self.fields.remove(key)?
    }

    /// The value of `key`, parsed.
    pub(crate) fn take_parsed<T: FromStr<Err: Display>>(&mut self, key: &str) -> Result<Option<T>, String> {
        self.take(key).map(|text| text.parse().map_err(|error| format!("{key}: {error}"))).transpose()
    }

    /// The value of `key`, a whole number.
    pub(crate) fn take_number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, String> {
        let number = |text: String| text.parse().map_err(|_| format!("{key}: '{text}' is no number that fits"));
        self.take(key).map(number).transpose()
    }

    /// A rate, by the keys of its bytes and its operations.
    fn take_rate(&mut self, bytes: &str, operations: &str) -> Result<Option<RateLimit>, String> {
        let bytes_per_second = self.take_parsed::<ByteSize>(bytes)?.map(|size| size.0);
        let operations_per_second = self.take_number(operations)?;
        let limited = bytes_per_second.is_some() || operations_per_second.is_some();
        Ok(limited.then_some(RateLimit { bytes_per_second, operations_per_second }))
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
    pub(crate) fn end(self) -> Result<(), String> {
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

    fn disk(text: &str) -> DiskConfig {
        text.parse::<DiskSpec>().unwrap_or_else(|error| panic!("{text}: {error}")).config(3)
    }

    fn net(text: &str) -> NetConfig {
        text.parse::<NetSpec>().unwrap_or_else(|error| panic!("{text}: {error}")).config(1)
    }

    fn complains<T: FromStr<Err = String> + std::fmt::Debug>(text: &str, part: &str) {
        let error = text.parse::<T>().unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }

    fn rate(bytes_per_second: Option<u64>, operations_per_second: Option<u64>) -> Option<RateLimit> {
        Some(RateLimit { bytes_per_second, operations_per_second })
    }

    #[test]
    fn stores() {
        let store = |text: &str| text.parse::<StoreSpec>().unwrap_or_else(|error| panic!("{text}: {error}")).config(7);
        assert_eq!(store("tools.img"), DiskConfig::new("civic-store", "tools.img"));
        let overlay = DiskConfig { overlay: true, ..DiskConfig::new("mine", "a,b-7.img") };
        assert_eq!(store("a,,b-{n}.img,overlay,id=mine"), overlay);
        complains::<StoreSpec>("", "no file");
        complains::<StoreSpec>("tools.img,rw", "'rw' means nothing");
    }

    #[test]
    fn disks() {
        assert_eq!(disk("path=root.img"), DiskConfig::new("disk3", "root.img"));
        let data = DiskConfig { read_only: true, ..DiskConfig::new("data", "/a b=c") };
        assert_eq!(disk("path=/a b=c,ro,id=data"), data);
        assert_eq!(disk("id=x,path=a,,b,format=raw"), DiskConfig::new("x", "a,b"));
        let all = DiskConfig {
            format: DiskFormat::Qcow2,
            backing: true,
            queues: Some(4),
            rate: rate(Some(100 << 20), Some(1000)),
            ..DiskConfig::new("disk3", "a")
        };
        assert_eq!(disk("path=a,format=qcow2,backing,queues=4,bps=100M,iops=1000"), all);
        assert_eq!(disk("path=a,bps=1K").rate, rate(Some(1024), None));
        assert_eq!(disk("path=a,iops=7").rate, rate(None, Some(7)));
        for (text, part) in [
            ("", "no path"),
            ("root.img", "no path"),
            ("path=", "no value"),
            ("path", "no path"),
            ("path=a,path=b", "'path' is given twice"),
            ("path=a,ro=1", "'ro' means nothing"),
            ("path=a,id", "'id' means nothing"),
            ("path=a,", "'' means nothing"),
            ("path=a,format=vmdk", "format: 'vmdk'"),
            ("path=a,format", "'format' means nothing"),
            ("path=a,backing=b", "'backing' means nothing"),
            ("path=a,queues=many", "queues: 'many' is no number"),
            ("path=a,queues=65536", "queues: '65536' is no number that fits"),
            ("path=a,bps=fast", "bps: 'fast' is not a size"),
            ("path=a,iops=1K", "iops: '1K' is no number"),
            ("path=a,mtu=1500", "'mtu' means nothing"),
        ] {
            complains::<DiskSpec>(text, part);
        }
    }

    #[test]
    fn network_cards() {
        let mac = Some(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!(net("tap=tap0,mac=52:54:00:12:34:56,id=lan"), NetConfig { mac, ..NetConfig::new("lan", "tap0") });
        assert_eq!(net("tap=tap0"), NetConfig::new("net1", "tap0"));
        let all = NetConfig {
            queues: Some(2),
            mtu: Some(9000),
            rx_rate: rate(Some(1 << 20), Some(2)),
            tx_rate: rate(Some(3 << 20), Some(4)),
            ..NetConfig::new("net1", "t")
        };
        assert_eq!(net("tap=t,queues=2,mtu=9000,rx-bps=1M,rx-pps=2,tx-bps=3M,tx-pps=4"), all);
        assert_eq!((net("tap=t,rx-pps=2").tx_rate, net("tap=t,tx-bps=2").rx_rate), (None, None));
        for (text, part) in [
            ("mac=1", "no tap"),
            ("tap=a,mac=1", "mac: '1' is not a MAC address"),
            ("tap=a,ro", "'ro'"),
            ("tap=a,mtu=65536", "mtu: '65536' is no number that fits"),
            ("tap=a,tx-bps=-1", "tx-bps: '-1' is not a size"),
            ("tap=a,bps=1M", "'bps' means nothing"),
        ] {
            complains::<NetSpec>(text, part);
        }
    }

    #[test]
    fn what_a_restore_may_move() {
        let disk = |text: &str| text.parse::<DiskSpec>().unwrap().moved();
        assert_eq!(disk("id=data,path=/new"), Ok(MovedDisk { id: "data".into(), path: "/new".into() }));
        for more in ["path=/new", "id=a,path=/new,ro", "id=a,path=/new,queues=2", "id=a,path=/new,format=qcow2"] {
            assert!(disk(more).unwrap_err().contains("id=ID,path=FILE"), "{more}");
        }
        let net = |text: &str| text.parse::<NetSpec>().unwrap().moved();
        assert_eq!(net("id=lan,tap=t"), Ok(MovedNet { id: "lan".into(), tap: "t".into() }));
        for more in ["tap=t", "id=lan,tap=t,mac=52:54:00:12:34:56", "id=lan,tap=t,rx-bps=1M"] {
            assert!(net(more).unwrap_err().contains("id=ID,tap=NAME"), "{more}");
        }
        let vsock = |text: &str| text.parse::<VsockSpec>().unwrap().moved();
        assert_eq!(vsock("uds=/v"), Ok(PathBuf::from("/v")));
        assert!(vsock("uds=/v,cid=3").unwrap_err().contains("uds=PATH"));
    }

    #[test]
    fn forks() {
        let forks = |text: &str| text.parse::<ForksSpec>().unwrap().0;
        let (memory_bytes, dir) = (Some(1 << 30), Some("/scratch".into()));
        assert_eq!(forks("dir=/scratch,memory=1G"), ForksConfig { memory_bytes, dir, disk_bytes: None });
        assert_eq!(forks("disk=2M").disk_bytes, Some(2 << 20));
        for (text, part) in [("1G", "'1G' means nothing"), ("memory=x", "memory: 'x'"), ("", "means nothing")] {
            complains::<ForksSpec>(text, part);
        }
    }

    #[test]
    fn vsocks() {
        let vsock = |text: &str| text.parse::<VsockSpec>().unwrap().config();
        assert_eq!(vsock("uds=/v"), VsockConfig { uds: "/v".into(), cid: None });
        assert_eq!(vsock("cid=7,uds=a,,b"), VsockConfig { uds: "a,b".into(), cid: Some(7) });
        for (text, part) in [("/v", "no uds"), ("uds=/v,cid=x", "cid: 'x' is no number"), ("uds=/v,port=1", "'port'")] {
            complains::<VsockSpec>(text, part);
        }
    }
}
