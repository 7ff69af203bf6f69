//! Types in the making.

/// A description of types (BTF).
#[derive(Debug)]
pub struct Types {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Default for Types {
    fn default() -> Self {
        Self { types: Vec::new(), strings: vec![0], count: 0 }
    }
}

impl Types {
    /// One more type: its name, kind, flag, size or other type, and what follows; `parts` is how many parts that has. Returns its number.
    pub fn add(&mut self, name: &str, kind: u32, flag: bool, value: u32, parts: u32, more: &[u32]) -> u32 {
        let name = self.string(name);
        for word in [name, u32::from(flag) << 31 | kind << 24 | parts, value].iter().chain(more) {
            self.types.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(text.bytes());
        self.strings.push(0);
        at
    }

    /// An integer.
    pub fn int(&mut self, name: &str, bytes: u32) -> u32 {
        self.add(name, 1, false, bytes, 0, &[bytes * 8])
    }

    /// A pointer.
    pub fn pointer(&mut self, to: u32) -> u32 {
        self.add("", 2, false, to, 0, &[])
    }

    /// An array.
    pub fn array(&mut self, of: u32, count: u32) -> u32 {
        self.add("", 3, false, 0, 0, &[of, 1, count])
    }

    /// A structure, of members with name, type and first bit.
    pub fn structure(&mut self, name: &str, bytes: u32, members: &[(&str, u32, u32)]) -> u32 {
        let members: Vec<_> = members.iter().flat_map(|(name, of, bit)| [self.string(name), *of, *bit]).collect();
        self.add(name, 4, false, bytes, members.len() as u32 / 3, &members)
    }

    /// A union, of members with name and type.
    pub fn union(&mut self, name: &str, bytes: u32, members: &[(&str, u32)]) -> u32 {
        let members: Vec<_> = members.iter().flat_map(|(name, of)| [self.string(name), *of, 0]).collect();
        self.add(name, 5, false, bytes, members.len() as u32 / 3, &members)
    }

    /// A type with fields of bits: name, type, first bit and width.
    pub fn bits(&mut self, name: &str, bytes: u32, members: &[(&str, u32, u32, u32)]) -> u32 {
        let members: Vec<_> =
            members.iter().flat_map(|(name, of, bit, width)| [self.string(name), *of, bit | width << 24]).collect();
        self.add(name, 4, true, bytes, members.len() as u32 / 3, &members)
    }

    /// An enumeration.
    pub fn enumeration(&mut self, name: &str, values: &[(&str, u32)]) -> u32 {
        let values: Vec<_> = values.iter().flat_map(|(name, value)| [self.string(name), *value]).collect();
        self.add(name, 6, true, 4, values.len() as u32 / 2, &values)
    }

    /// An enumeration of 64-bit values.
    pub fn enumeration64(&mut self, name: &str, values: &[(&str, u64)]) -> u32 {
        let value = |(name, value): &(&str, u64)| [self.string(name), *value as u32, (*value >> 32) as u32];
        let values: Vec<_> = values.iter().flat_map(value).collect();
        self.add(name, 19, false, 8, values.len() as u32 / 3, &values)
    }

    /// What a function takes and returns.
    pub fn prototype(&mut self, returns: u32, parameters: &[(&str, u32)]) -> u32 {
        let parameters: Vec<_> = parameters.iter().flat_map(|(name, of)| [self.string(name), *of]).collect();
        self.add("", 13, false, returns, parameters.len() as u32 / 2, &parameters)
    }

    /// A function.
    pub fn function(&mut self, name: &str, prototype: u32) -> u32 {
        self.add(name, 12, false, prototype, 0, &[])
    }

    /// All of them, with the header.
    pub fn finish(&self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types, types, strings] {
            bytes.extend(u32::to_le_bytes(word));
        }
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }
}
