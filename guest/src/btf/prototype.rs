//! Types and functions, written as C has them.

use std::fmt;

use super::{Btf, DEPTH, Kind, TypeId, text};
use crate::bytes::u32_at;

/// The most parameters of a function.
const MOST_PARAMETERS: usize = 64;
/// The longest text of a type; what would be longer is cut off. Types that contain each other have no end.
const LONGEST: usize = 512;

/// How deep a parameter's own type may be: enough for a function pointer that takes others.
const BRIEF: usize = 10;

/// What a function takes and returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prototype {
    /// The function's name.
    pub name: String,
    /// What it returns: `int`, `struct file *`, ….
    pub returns: String,
    /// What it takes.
    pub parameters: Vec<Parameter>,
    /// Whether more may follow (`…`).
    pub variadic: bool,
}

/// A parameter of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name; of function pointers' parameters it is empty.
    pub name: String,
    /// Its type, as C writes it without a name.
    pub kind: String,
    /// Its type.
    pub of: TypeId,
}

impl fmt::Display for Prototype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parameters: Vec<_> = self.parameters.iter().map(|p| join(&p.kind, &p.name)).collect();
        if self.variadic {
            parameters.push("...".into());
        }
        if parameters.is_empty() {
            parameters.push("void".into());
        }
        write!(f, "{}({})", join(&self.returns, &self.name), parameters.join(", "))
    }
}

/// A type with a name: inside the parentheses of a function pointer, before the brackets of an array, else behind.
fn join(kind: &str, name: &str) -> String {
    let inside = kind.find("(*").map(|at| at + 2 + kind[at + 2..].bytes().take_while(|c| *c == b'*').count());
    match inside.or_else(|| kind.find('[')) {
        Some(at) => format!("{}{name}{}", &kind[..at], &kind[at..]),
        None if name.is_empty() || kind.ends_with('*') => format!("{kind}{name}"),
        None => format!("{kind} {name}"),
    }
}

/// The function that is of type `id`.
pub(super) fn read(btf: &Btf, name: &str, id: TypeId) -> Option<Prototype> {
    let (returns, mut parameters) = parts(btf, id)?;
    // The last one of those that take more is of no type and has no name.
    let variadic = parameters.last().is_some_and(|(name, of)| *of == TypeId(0) && name.is_empty());
    if variadic {
        parameters.pop();
    }
    let parameters =
        parameters.into_iter().map(|(name, of)| Parameter { name: name.to_owned(), kind: type_name(btf, of), of });
    let parameters = parameters.collect();
    Some(Prototype { name: name.to_owned(), returns: type_name(btf, returns), parameters, variadic })
}

fn parts(btf: &Btf, id: TypeId) -> Option<(TypeId, Vec<(&str, TypeId)>)> {
    let of = btf.get(id).filter(|of| of.kind == Kind::Prototype)?;
    let parameters = of.more.as_chunks::<8>().0;
    if parameters.len() > MOST_PARAMETERS {
        return None;
    }
    let parameter = |bytes: &[u8; 8]| Some((text(&btf.strings, u32_at(bytes, 0)?)?, TypeId(u32_at(bytes, 4)?)));
    Some((TypeId(of.value), parameters.iter().map(parameter).collect::<Option<_>>()?))
}

pub(super) fn type_name(btf: &Btf, id: TypeId) -> String {
    let mut text = declare(btf, id, String::new(), DEPTH);
    if text.len() > LONGEST {
        let cut = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        text.truncate(cut);
        text.push('…');
    }
    text
}

/// Writes a declaration from the inside out: `inner` is what has been written of it so far.
fn declare(btf: &Btf, id: TypeId, inner: String, depth: usize) -> String {
    let base = |name: &str| if inner.is_empty() { name.to_owned() } else { format!("{name} {inner}") };
    let Some(of) = btf.get(id).filter(|_| depth > 0 && inner.len() <= LONGEST) else { return base("…") };
    let next = TypeId(of.value);
    let called = text(&btf.strings, of.name).filter(|name| !name.is_empty()).unwrap_or("{…}");
    match of.kind {
        Kind::Void => base("void"),
        Kind::Int | Kind::Float | Kind::Typedef => base(called),
        Kind::Struct => base(&format!("struct {called}")),
        // The flag says which of the two is not described.
        Kind::Forward => base(&format!("{} {called}", if of.flag { "union" } else { "struct" })),
        Kind::Union => base(&format!("union {called}")),
        Kind::Enum | Kind::Enum64 => base(&format!("enum {called}")),
        Kind::Pointer => declare(btf, next, format!("*{inner}"), depth - 1),
        Kind::Const => qualified(btf, next, "const", inner, depth),
        Kind::Volatile => qualified(btf, next, "volatile", inner, depth),
        Kind::Restrict | Kind::TypeTag => declare(btf, next, inner, depth - 1),
        Kind::Array => {
            let [element, count] = [0, 8].map(|field| u32_at(of.more, field).unwrap_or_default());
            declare(btf, TypeId(element), format!("{}[{count}]", grouped(inner)), depth - 1)
        }
        Kind::Prototype => {
            let Some((returns, parameters)) = parts(btf, id) else { return base("…") };
            let brief = depth.min(BRIEF) - 1;
            let mut list = String::new();
            for (n, (_, of)) in parameters.iter().enumerate() {
                if list.len() > LONGEST {
                    break;
                }
                list.push_str(if n == 0 { "" } else { ", " });
                list.push_str(&declare(btf, *of, String::new(), brief));
            }
            declare(btf, returns, format!("{}({list})", grouped(inner)), depth - 1)
        }
        Kind::Function | Kind::Variable | Kind::Section | Kind::DeclarationTag => base(called),
    }
}

/// Pointers to arrays and functions are in parentheses.
fn grouped(inner: String) -> String {
    if inner.starts_with('*') { format!("({inner})") } else { inner }
}

/// A qualifier stands before a plain type, and behind the star of a pointer.
fn qualified(btf: &Btf, of: TypeId, word: &str, inner: String, depth: usize) -> String {
    if btf.kind(of) == Some(Kind::Pointer) {
        let space = if inner.is_empty() { "" } else { " " };
        declare(btf, of, format!("{word}{space}{inner}"), depth - 1)
    } else {
        format!("{word} {}", declare(btf, of, inner, depth - 1))
    }
}
