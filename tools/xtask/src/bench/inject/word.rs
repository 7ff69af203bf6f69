//! The program whose first word is waited for: a static one without a library that does nothing before.

/// Where it is loaded.
const BASE: u64 = 0x40_0000;
/// Of an ELF header and of a program header (System V ABI, ELF-64).
const HEADERS: u64 = 64 + 56;

/// What it does: opens the console, writes its argument and the end of a line there, ends.
const CODE: [u8; 78] = [
    0x48, 0x8b, 0x5c, 0x24, 0x10, // mov rbx, [rsp + 16]: the argument
    0x48, 0x8d, 0x3d, 0x35, 0x00, 0x00, 0x00, // lea rdi, [rip + path]
    0xbe, 0x01, 0x01, 0x00, 0x00, // mov esi, O_WRONLY | O_NOCTTY
    0x31, 0xd2, // xor edx, edx
    0xb8, 0x02, 0x00, 0x00, 0x00, // mov eax, open
    0x0f, 0x05, // syscall
    0x89, 0xc7, // mov edi, eax
    0x48, 0x89, 0xde, // mov rsi, rbx
    0xb8, 0x00, 0x00, 0x00, 0x00, // mov eax, 0
    0xff, 0xc2, // count: inc edx
    0x38, 0x04, 0x16, // cmp [rsi + rdx], al
    0x75, 0xf9, // jne count
    0xc6, 0x04, 0x16, 0x0a, // mov byte [rsi + rdx], '\n'
    0xff, 0xc2, // inc edx
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, write
    0x0f, 0x05, // syscall
    0x31, 0xff, // xor edi, edi
    0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, exit
    0x0f, 0x05, // syscall
    b'/', b'd', b'e', b'v', b'/', b'c', b'o', b'n', b's', b'o', b'l', b'e', 0, // path
];

/// Its file.
pub fn program() -> Vec<u8> {
    let mut file = Vec::new();
    let len = HEADERS + CODE.len() as u64;
    // ELFCLASS64, ELFDATA2LSB, version 1; ET_EXEC, EM_X86_64.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([2_u16, 62].map(u16::to_le_bytes).as_flattened());
    file.extend(1_u32.to_le_bytes());
    // The entry, where the program headers are, no sections.
    file.extend([BASE + HEADERS, 64, 0].map(u64::to_le_bytes).as_flattened());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).as_flattened());
    // PT_LOAD, to be read and executed: all of the file.
    file.extend([1_u32, 5].map(u32::to_le_bytes).as_flattened());
    file.extend([0, BASE, BASE, len, len, 0x1000].map(u64::to_le_bytes).as_flattened());
    file.extend(CODE);
    file
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    /// Where it runs here it says so on the console, if this system has one; its end is seen everywhere.
    #[test]
    fn it_is_a_program_that_ends_well() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("word");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Command::new(&path).arg("civic").status().unwrap().success());
    }

    #[test]
    fn its_word_is_its_argument() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("word");
        // Standard output in place of the console.
        let mut file = program();
        let at = file.windows(12).position(|bytes| bytes == b"/dev/console").unwrap();
        file[at..at + 13].copy_from_slice(b"/dev/fd/1\0\0\0\0");
        std::fs::write(&path, file).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let (mut here, there) = std::io::pipe().unwrap();
        assert!(Command::new(&path).arg("a word").stdout(there).status().unwrap().success());
        let mut said = String::new();
        here.read_to_string(&mut said).unwrap();
        assert_eq!(said, "a word\n");
    }
}
