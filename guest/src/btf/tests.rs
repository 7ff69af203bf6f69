use proptest::prelude::*;

use super::*;
use crate::testing::{Types, put};

/// `task_struct` with all that members can be, and a function or two.
fn sample() -> Types {
    let mut types = Types::default();
    let int = types.int("int", 4);
    let long = types.int("long unsigned int", 8);
    let character = types.int("char", 1);
    let size = types.add("size_t", 8, false, long, 0, &[]);
    let constant = types.add("", 10, false, character, 0, &[]);
    let path = types.pointer(constant);
    let string = types.pointer(character);
    let strings = types.pointer(string);
    let comm = types.array(character, 16);
    let inner = types.structure("entity", 64, &[("time", size, 192), ("names", comm, 256)]);
    let entities = types.array(inner, 3);
    let state = types.union("", 8, &[("__state", int), ("whole", long)]);
    let bits = types.bits("flags", 8, &[("one", int, 3, 2), ("word", int, 32, 0)]);
    let members = [("", state, 64), ("se", inner, 128), ("list", entities, 640), ("flags", bits, 2176)];
    let task = types.structure("task_struct", 280, &members);
    let task_type = types.add("task_t", 8, false, task, 0, &[]);
    types.structure("twice", 16, &[("never", task_type, 0)]);
    types.enumeration("colour", &[("RED", 0), ("GREEN", u32::MAX)]);
    types.enumeration64("wide", &[("FAR", 1 << 40)]);
    types.add("opaque", 7, true, 0, 0, &[]);
    let pointer = types.pointer(task);
    let init = types.prototype(int, &[("", pointer), ("", path)]);
    let init = types.pointer(init);
    let setup = types.prototype(pointer, &[("path", path), ("argv", strings), ("init", init), ("n", size)]);
    types.function("setup", setup);
    let nothing = types.prototype(0, &[]);
    types.function("schedule", nothing);
    let print = types.prototype(int, &[("format", path), ("", 0)]);
    types.function("printk", print);
    types.function("printk", nothing);
    types
}

fn parsed(types: &Types) -> Btf {
    Btf::parse(&types.finish()).unwrap()
}

#[test]
fn members_are_found_through_unnamed_ones_and_names() {
    let btf = parsed(&sample());
    let member = |of, path| btf.member(of, path).map(|member| (member.offset, member.size, member.elements));
    assert_eq!(member("task_struct", "__state"), Ok((8, 4, None)));
    assert_eq!(member("task_t", "whole"), Ok((8, 8, None)));
    assert_eq!(member("task_struct", "se.time"), Ok((40, 8, None)));
    assert_eq!(member("task_struct", "list"), Ok((80, 192, Some(3))));
    assert_eq!(member("task_struct", "list.names"), Ok((112, 16, Some(16))));
    assert_eq!(member("twice", "never.se"), Ok((16, 64, None)));
    assert_eq!(member("task_struct", "flags.word"), Ok((276, 4, None)));
    assert_eq!((btf.size("task_struct"), btf.size("size_t"), btf.size("wide")), (Ok(280), Ok(8), Ok(8)));
    let comm = btf.member("entity", "names").unwrap().of;
    let (element, count) = btf.array(comm).unwrap();
    assert_eq!((btf.type_name(element), count, btf.kind(comm)), ("char".into(), 16, Some(Kind::Array)));
    assert_eq!(btf.array(element), None);
}

#[test]
fn what_has_no_place_is_told() {
    let btf = parsed(&sample());
    let bits = btf.member("task_struct", "flags.one").unwrap_err();
    let (of, member) = ("task_struct".to_owned(), "flags.one".to_owned());
    assert_eq!(bits, TypeError::BitField { of, member, first_bit: 2179, bits: 2 });
    for path in ["nothing", "", "se.nothing", "se.", ".", "__state.x"] {
        assert!(matches!(btf.member("task_struct", path), Err(TypeError::NoMember { .. })), "{path}");
    }
    for name in ["nothing", "", "schedule", "int", "colour"] {
        assert_eq!(btf.member(name, "x"), Err(TypeError::NoType { name: name.into() }));
    }
    assert_eq!(btf.size("opaque"), Err(TypeError::NoType { name: "opaque".into() }));
}

#[test]
fn enumerators_have_signs_and_64_bits() {
    let btf = parsed(&sample());
    let values = ["RED", "GREEN", "FAR"].map(|name| btf.enumerator(name));
    assert_eq!(values, [Ok(0), Ok(-1), Ok(1 << 40)]);
    assert_eq!(btf.enumerator("BLUE"), Err(TypeError::NoType { name: "BLUE".into() }));
}

#[test]
fn prototypes_are_written_as_in_c() {
    let btf = parsed(&sample());
    let text = |name| btf.prototypes(name).iter().map(ToString::to_string).collect::<Vec<_>>();
    let setup = "struct task_struct *setup(const char *path, char **argv, int (*init)(struct task_struct *, const char *), \
                 size_t n)";
    assert_eq!(text("setup"), [setup]);
    assert_eq!(text("schedule"), ["void schedule(void)"]);
    assert_eq!(text("printk"), ["int printk(const char *format, ...)", "void printk(void)"]);
    assert_eq!(text("task_struct"), [""; 0]);
    let parameters = &btf.prototypes("setup")[0].parameters;
    assert_eq!((parameters.len(), parameters[1].name.as_str(), parameters[1].kind.as_str()), (4, "argv", "char **"));
}

#[test]
fn types_have_their_names_in_c() {
    let mut types = sample();
    let int = 1;
    let array = types.array(int, 4);
    let pointer = types.pointer(array);
    let pointers = types.array(pointer, 2);
    let constant = types.add("", 10, false, pointer, 0, &[]);
    let volatile = types.add("", 9, false, int, 0, &[]);
    let restrict = types.add("", 11, false, volatile, 0, &[]);
    let opaque = types.add("opaque", 7, true, 0, 0, &[]);
    let unnamed = types.structure("", 4, &[]);
    let btf = parsed(&types);
    let names = [pointer, pointers, constant, restrict, opaque, unnamed, 0, 9999].map(|id| btf.type_name(TypeId(id)));
    assert_eq!(names[..4], ["int (*)[4]", "int (*[2])[4]", "int (*const)[4]", "volatile int"]);
    assert_eq!(names[4..], ["union opaque", "struct {…}", "void", "…"]);
}

#[test]
fn an_unknown_kind_ends_the_types() {
    let mut types = sample();
    let known = parsed(&types).count();
    let id = types.add("new", 20, false, 0, 0, &[]);
    types.int("behind", 4);
    let btf = parsed(&types);
    assert_eq!((btf.count(), btf.unknown()), (known, Some(Unknown { kind: 20, id: TypeId(id) })));
    assert!(btf.size("behind").is_err() && btf.size("task_struct").is_ok());
}

#[test]
fn types_that_contain_each_other_have_an_end() {
    let mut types = sample();
    let next = types.add("", 8, false, 0, 0, &[]);
    let named = types.add("named", 8, false, next + 1, 0, &[]);
    let itself = types.structure("itself", 8, &[("", named + 1, 0), ("", named + 1, 0), ("array", named + 2, 0)]);
    types.array(itself + 1, u32::MAX);
    let pointer = types.pointer(itself + 2);
    let round = types.prototype(pointer, &[("", pointer), ("", pointer), ("", pointer)]);
    types.function("round", round);
    types.function("lost", u32::MAX);
    let btf = parsed(&types);
    assert!(matches!(btf.size("named"), Err(TypeError::Damaged { .. })));
    assert!(matches!(btf.member("itself", "array"), Err(TypeError::Damaged { .. })));
    assert!(matches!(btf.member("itself", "x"), Err(TypeError::Damaged { .. })));
    for prototype in btf.prototypes("round").iter().chain(&btf.prototypes("lost")) {
        assert!(prototype.to_string().len() < 4096);
    }
}

#[test]
fn the_larger_description_is_taken() {
    let (small, large) = (sample(), {
        let mut types = sample();
        types.int("more", 4);
        types
    });
    let image = [&[0; 100][..], &small.finish(), &[0; 5], &large.finish(), &HEAD].concat();
    assert_eq!(Btf::find(&image).unwrap().count(), parsed(&large).count());
    assert_eq!(Btf::find(&image[..100]).unwrap_err(), NoBtf::NotFound);
    assert_eq!(Btf::find(&HEAD).unwrap_err(), NoBtf::Damaged);
    let mut few = Types::default();
    few.int("int", 4);
    assert_eq!(Btf::parse(&few.finish()).unwrap_err(), NoBtf::Damaged);
    assert_eq!(Btf::parse(b"").unwrap_err(), NoBtf::NotFound);
    let btf = parsed(&small);
    assert_eq!(btf.bytes(), small.finish().len() - HEADER);
}

proptest! {
    #[test]
    fn damage_does_no_harm(damage in proptest::collection::vec((8_usize..1000, any::<u8>()), 1..24)) {
        let mut bytes = sample().finish();
        for (at, value) in damage {
            let at = at % bytes.len();
            put(&mut bytes, at, &[value]);
        }
        let Ok(btf) = Btf::parse(&bytes) else { return Ok(()) };
        for path in ["__state", "se.time", "list.names", "flags.one"] {
            let _ = btf.member("task_struct", path);
        }
        for id in 0..=btf.count() as u32 {
            prop_assert!(btf.type_name(TypeId(id)).len() < 1024);
            let _ = (btf.size_of(TypeId(id)), btf.array(TypeId(id)));
        }
        for function in ["setup", "printk"] {
            let _ = btf.prototypes(function);
        }
        let _ = btf.enumerator("FAR");
    }
}
