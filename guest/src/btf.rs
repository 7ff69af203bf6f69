//! The kernel's description of its own types (BTF, `Documentation/bpf/btf.rst`), as it is in read-only data since 5.2.
//!
//! ```text
//!  magic 0xeb9f (2) · version 1 · flags · length of the header (4) · offset and length of types (8), of strings (8)
//!  type     name (4) · kind, flag, number of what follows (4) · size, or type (4) · what follows, by its kind
//! ```
//!
//! Types are numbered from 1 in the order in which they stand; 0 is `void`. They may refer to each other in any way, so whatever
//! follows references counts its steps. A kind that is not known ends the reading, as its length is not known either: the types before it
//! are good, and [`Btf::unknown`] tells.

mod prototype;

pub use prototype::{Parameter, Prototype};

use memchr::memmem;

use crate::bytes::{string_at, u32_at};
use crate::symbols::{LONGEST_NAME, NameIndex};

/// Magic, version and flags, and the length of the header.
const HEAD: [u8; 8] = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
const HEADER: usize = 24;
/// The most bytes of types, and of strings.
const MOST_BYTES: usize = 32 << 20;
/// The most types.
const MOST_TYPES: usize = 1 << 20;
/// Headers that are looked at.
const MOST_HEADERS: usize = 16;
/// The fewest types that are believed to be a kernel's.
const FEWEST_TYPES: usize = 8;
/// How long a chain of qualifiers and names of types may be, and how deep types may lie in each other.
const DEPTH: usize = 32;
/// Members looked at for one question.
const MOST_MEMBERS: usize = 1 << 17;

/// Why there are no types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoBtf {
    /// No header.
    #[error("the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF)")]
    NotFound,
    /// A header, and no types.
    #[error("the kernel's description of its types (BTF) is damaged")]
    Damaged,
}

/// Why a question about types has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// There is no such type.
    #[error("the kernel has no type '{name}'")]
    NoType {
        /// Its name.
        name: String,
    },
    /// The type has no such member.
    #[error("the kernel's '{of}' has no member '{member}'")]
    NoMember {
        /// The type.
        of: String,
        /// The member.
        member: String,
    },
    /// The member is a bit field, which has no address.
    #[error("'{member}' of the kernel's '{of}' is a bit field: {bits} bits from bit {first_bit} on")]
    BitField {
        /// The type.
        of: String,
        /// The member.
        member: String,
        /// Its first bit, counted from the type's first byte.
        first_bit: u64,
        /// Its width.
        bits: u32,
    },
    /// Types refer to each other endlessly, or to what is not there.
    #[error("the kernel's description of '{name}' is damaged")]
    Damaged {
        /// What was asked for.
        name: String,
    },
}

/// A type's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TypeId(pub u32);

/// What a type is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `void`.
    Void,
    /// An integer, `bool` or `char`.
    Int,
    /// A pointer.
    Pointer,
    /// An array.
    Array,
    /// A structure.
    Struct,
    /// A union.
    Union,
    /// An enumeration of 32-bit values.
    Enum,
    /// A structure or union that is not described.
    Forward,
    /// A name for a type.
    Typedef,
    /// `volatile`.
    Volatile,
    /// `const`.
    Const,
    /// `restrict`.
    Restrict,
    /// A function.
    Function,
    /// What a function takes and returns.
    Prototype,
    /// A per-CPU variable.
    Variable,
    /// A section of variables.
    Section,
    /// A floating-point number.
    Float,
    /// An attribute of a declaration.
    DeclarationTag,
    /// An attribute of a type.
    TypeTag,
    /// An enumeration of 64-bit values.
    Enum64,
}

impl Kind {
    /// By its number, with the bytes that follow each type of it: a fixed number, and so many for each of what it is made of.
    fn by_number(number: u32) -> Option<(Self, usize, usize)> {
        Some(match number {
            1 => (Self::Int, 4, 0),
            2 => (Self::Pointer, 0, 0),
            3 => (Self::Array, 12, 0),
            4 => (Self::Struct, 0, 12),
            5 => (Self::Union, 0, 12),
            6 => (Self::Enum, 0, 8),
            7 => (Self::Forward, 0, 0),
            8 => (Self::Typedef, 0, 0),
            9 => (Self::Volatile, 0, 0),
            10 => (Self::Const, 0, 0),
            11 => (Self::Restrict, 0, 0),
            12 => (Self::Function, 0, 0),
            13 => (Self::Prototype, 0, 8),
            14 => (Self::Variable, 4, 0),
            15 => (Self::Section, 0, 12),
            16 => (Self::Float, 0, 0),
            17 => (Self::DeclarationTag, 4, 0),
            18 => (Self::TypeTag, 0, 0),
            19 => (Self::Enum64, 0, 12),
            _ => return None,
        })
    }
}

/// A member of a structure or union.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the first of the type that was asked about.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its type.
    pub of: TypeId,
    /// If it is an array: how many elements it has.
    pub elements: Option<u32>,
}

/// A kind that is not known, at which the reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The kind.
    pub kind: u32,
    /// The type that is of it.
    pub id: TypeId,
}

/// All types.
#[derive(Debug)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type is in `types`, from number 1 on.
    starts: Vec<u32>,
    /// By name.
    index: NameIndex,
    unknown: Option<Unknown>,
}

/// One type: its twelve bytes, and what follows.
#[derive(Clone, Copy)]
struct Type<'a> {
    kind: Kind,
    flag: bool,
    name: u32,
    /// Its size or the type that it refers to.
    value: u32,
    more: &'a [u8],
}

impl Btf {
    /// Finds the types in an image: the most, should there be more than one description.
    pub fn find(image: &[u8]) -> Result<Self, NoBtf> {
        let mut best: Result<Self, _> = Err(NoBtf::NotFound);
        for at in memmem::find_iter(image, &HEAD).take(MOST_HEADERS) {
            match (Self::parse(&image[at..]), &best) {
                (Ok(found), Ok(known)) if found.count() <= known.count() => {}
                (Ok(found), _) => best = Ok(found),
                (Err(_), Err(_)) => best = Err(NoBtf::Damaged),
                (Err(_), Ok(_)) => {}
            }
        }
        best
    }

    /// Reads the types that begin with `bytes`, which may go on behind them.
    pub fn parse(bytes: &[u8]) -> Result<Self, NoBtf> {
        if !bytes.starts_with(&HEAD) {
            return Err(NoBtf::NotFound);
        }
        let section = |field: usize| {
            let (offset, len) = (u32_at(bytes, field)? as usize, u32_at(bytes, field + 4)? as usize);
            bytes.get(HEADER + offset..HEADER + offset + len).filter(|_| len <= MOST_BYTES)
        };
        let (Some(types), Some(strings)) = (section(8), section(16)) else { return Err(NoBtf::Damaged) };
        let (starts, unknown) = starts(types);
        if starts.len() < FEWEST_TYPES {
            return Err(NoBtf::Damaged);
        }
        let name = |start: &u32| text(strings, u32_at(types, *start as usize)?);
        let index = NameIndex::new(starts.iter().map(|start| name(start).unwrap_or_default()));
        Ok(Self { types: types.to_vec(), strings: strings.to_vec(), starts, index, unknown })
    }

    /// How many types there are, without `void`.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// Bytes of types and strings.
    pub fn bytes(&self) -> usize {
        self.types.len() + self.strings.len()
    }

    /// Where the reading ended early.
    pub fn unknown(&self) -> Option<Unknown> {
        self.unknown
    }

    /// What a type is.
    pub fn kind(&self, id: TypeId) -> Option<Kind> {
        self.get(id).map(|of| of.kind)
    }

    /// The structure or union of this name, or the one that a type of this name stands for.
    pub fn composite(&self, name: &str) -> Result<TypeId, TypeError> {
        let composite = |id: &TypeId| matches!(self.kind(*id), Some(Kind::Struct | Kind::Union));
        let named = |id: TypeId| (self.kind(id)? == Kind::Typedef).then(|| self.plain(id))?;
        let found = self.named(name).find(composite).or_else(|| self.named(name).filter_map(named).find(composite));
        found.ok_or_else(|| TypeError::NoType { name: name.to_owned() })
    }

    /// The size in bytes of the structure, union, enumeration, integer or named type of this name.
    pub fn size(&self, name: &str) -> Result<u64, TypeError> {
        let sized =
            |id: &TypeId| !matches!(self.kind(*id), None | Some(Kind::Function | Kind::Forward | Kind::Variable));
        let Some(id) = self.named(name).find(sized) else { return Err(TypeError::NoType { name: name.to_owned() }) };
        self.size_of(id).ok_or_else(|| TypeError::Damaged { name: name.to_owned() })
    }

    /// The size in bytes of a type.
    pub fn size_of(&self, id: TypeId) -> Option<u64> {
        let (mut id, mut count) = (id, 1_u64);
        for _ in 0..DEPTH {
            let plain = self.plain(id)?;
            let of = self.get(plain)?;
            let each = match of.kind {
                Kind::Array => {
                    count = count.checked_mul(u32_at(of.more, 8)?.into())?;
                    id = TypeId(u32_at(of.more, 0)?);
                    continue;
                }
                Kind::Pointer => 8,
                Kind::Int | Kind::Struct | Kind::Union | Kind::Enum | Kind::Enum64 | Kind::Float | Kind::Section => {
                    u64::from(of.value)
                }
                _ => return None,
            };
            return count.checked_mul(each);
        }
        None
    }

    /// A member of the structure or union `of`: `path` is its name, or names with dots between them. Members of unnamed members are
    /// found as if they were the type's own, and of arrays there is the first element.
    pub fn member(&self, of: &str, path: &str) -> Result<Member, TypeError> {
        let mut id = self.composite(of)?;
        let damaged = || TypeError::Damaged { name: format!("{of}.{path}") };
        let mut first_bit = 0_u64;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let found = self.find_member(id, name).ok_or_else(damaged)?;
            let Some(found) = found else {
                return Err(TypeError::NoMember { of: of.to_owned(), member: path.to_owned() });
            };
            first_bit = first_bit.checked_add(found.first_bit).ok_or_else(damaged)?;
            if found.bits != 0 || !first_bit.is_multiple_of(8) {
                let (of, member) = (of.to_owned(), path.to_owned());
                return Err(TypeError::BitField { of, member, first_bit, bits: found.bits });
            }
            if names.peek().is_none() {
                let size = self.size_of(found.of).ok_or_else(damaged)?;
                let elements = self.array(found.of).map(|(_, elements)| elements);
                return Ok(Member { offset: first_bit / 8, size, of: found.of, elements });
            }
            id = self.element(found.of).ok_or_else(damaged)?;
        }
        Err(TypeError::NoMember { of: of.to_owned(), member: path.to_owned() })
    }

    /// If the type is an array: the type of its elements, and how many they are.
    pub fn array(&self, id: TypeId) -> Option<(TypeId, u32)> {
        let of = self.get(self.plain(id)?)?;
        (of.kind == Kind::Array).then(|| Some((TypeId(u32_at(of.more, 0)?), u32_at(of.more, 8)?)))?
    }

    /// The value of an enumerator, whatever enumeration it is in.
    pub fn enumerator(&self, name: &str) -> Result<i64, TypeError> {
        let found = (1..=self.starts.len() as u32).find_map(|id| {
            let of = self.get(TypeId(id))?;
            let width = match of.kind {
                Kind::Enum => 8,
                Kind::Enum64 => 12,
                _ => return None,
            };
            let wanted = of.more.chunks_exact(width).find(|chunk| {
                u32_at(chunk, 0).and_then(|at| text(&self.strings, at)).is_some_and(|found| found == name)
            })?;
            let low = u32_at(wanted, 4)?;
            Some(match of.kind {
                // The flag says whether values have a sign.
                Kind::Enum if of.flag => i64::from(low as i32),
                Kind::Enum => i64::from(low),
                _ => i64::from(u32_at(wanted, 8)?) << 32 | i64::from(low),
            })
        });
        found.ok_or_else(|| TypeError::NoType { name: name.to_owned() })
    }

    /// What the function of this name takes and returns: as many answers as there are functions of this name that differ.
    pub fn prototypes(&self, function: &str) -> Vec<Prototype> {
        let mut found = Vec::new();
        for id in self.named(function).filter(|id| self.kind(*id) == Some(Kind::Function)).take(DEPTH) {
            let prototype = self.get(id).and_then(|of| prototype::read(self, function, TypeId(of.value)));
            found.extend(prototype.filter(|prototype| !found.contains(prototype)));
        }
        found
    }

    /// The name of a type in C, without a declarator.
    pub fn type_name(&self, id: TypeId) -> String {
        prototype::type_name(self, id)
    }

    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = TypeId> {
        // Most types have no name; they are not what is meant by an empty one.
        let ids = self.index.find(name).filter(|_| !name.is_empty()).map(|at| TypeId(at as u32 + 1));
        ids.filter(move |id| {
            self.get(*id).and_then(|of| text(&self.strings, of.name)).is_some_and(|found| found == name)
        })
    }

    /// A type without its qualifiers and names.
    fn plain(&self, id: TypeId) -> Option<TypeId> {
        let mut id = id;
        for _ in 0..DEPTH {
            let of = self.get(id)?;
            match of.kind {
                Kind::Typedef | Kind::Volatile | Kind::Const | Kind::Restrict | Kind::TypeTag => id = TypeId(of.value),
                _ => return Some(id),
            }
        }
        None
    }

    /// The type of an array's elements; of what is no array, itself.
    fn element(&self, id: TypeId) -> Option<TypeId> {
        let mut id = self.plain(id)?;
        for _ in 0..DEPTH {
            match self.array(id) {
                Some((element, _)) => id = self.plain(element)?,
                None => return Some(id),
            }
        }
        None
    }

    fn get(&self, id: TypeId) -> Option<Type<'_>> {
        let Some(number) = (id.0 as usize).checked_sub(1) else {
            return Some(Type { kind: Kind::Void, flag: false, name: 0, value: 0, more: &[] });
        };
        let start = *self.starts.get(number)? as usize;
        let [name, info, value] = [0, 4, 8].map(|field| u32_at(&self.types, start + field));
        let info = info?;
        let (kind, fixed, each) = Kind::by_number(info >> 24 & 0x1f)?;
        let len = fixed + each * (info & 0xffff) as usize;
        let more = self.types.get(start + 12..start + 12 + len)?;
        Some(Type { kind, flag: info >> 31 == 1, name: name?, value: value?, more })
    }

    /// Looks for a member, through unnamed ones; nothing when types are damaged.
    fn find_member(&self, id: TypeId, name: &str) -> Option<Option<Found>> {
        if name.is_empty() {
            return Some(None);
        }
        let mut looks = 0;
        let mut open = vec![(self.plain(id)?, 0_u64)];
        while let Some((id, before)) = open.pop() {
            let of = self.get(id)?;
            if !matches!(of.kind, Kind::Struct | Kind::Union) {
                continue;
            }
            for member in of.more.as_chunks::<12>().0 {
                looks += 1;
                if looks > MOST_MEMBERS {
                    return None;
                }
                let [called, kind, place] = [0, 4, 8].map(|field| u32_at(member, field));
                let (called, kind, place) = (called?, TypeId(kind?), place?);
                let (first_bit, bits) = if of.flag { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
                let first_bit = before.checked_add(first_bit.into())?;
                if text(&self.strings, called)? == name {
                    return Some(Some(Found { first_bit, bits, of: kind }));
                }
                if called == 0 && bits == 0 {
                    open.push((self.plain(kind)?, first_bit));
                }
            }
        }
        Some(None)
    }
}

struct Found {
    first_bit: u64,
    bits: u32,
    of: TypeId,
}

/// Where each type begins, and what ended the reading, if not the last type.
fn starts(types: &[u8]) -> (Vec<u32>, Option<Unknown>) {
    let mut starts = Vec::new();
    let mut at = 0;
    while at < types.len() && starts.len() < MOST_TYPES {
        let Some(info) = u32_at(types, at + 4) else { break };
        let kind = info >> 24 & 0x1f;
        let Some((_, fixed, each)) = Kind::by_number(kind) else {
            return (starts.clone(), Some(Unknown { kind, id: TypeId(starts.len() as u32 + 1) }));
        };
        let end = at + 12 + fixed + each * (info & 0xffff) as usize;
        if end > types.len() {
            break;
        }
        starts.push(at as u32);
        at = end;
    }
    (starts, None)
}

fn text(strings: &[u8], at: u32) -> Option<&str> {
    std::str::from_utf8(string_at(strings, at as usize, LONGEST_NAME)?).ok()
}

#[cfg(test)]
mod tests;
