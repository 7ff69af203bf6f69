//! What compilers call without being told to: the functions that the C library would have.
//!
//! In assembly, for a compiler may make a call of `memset` of any loop that is one.
#![allow(unsafe_code)]

use core::arch::global_asm;

global_asm!(
    ".globl memcpy, memmove, memset, memcmp, bcmp, strlen",
    // (rdi: to, rsi: from, rdx: count) -> to. In words first: where there are no fast bytes, as in emulators, that is eight times as fast.
    "memcpy:",
    "    mov rax, rdi",
    "3:  mov rcx, rdx",
    "    shr rcx, 3",
    "    rep movsq",
    "    mov ecx, edx",
    "    and ecx, 7",
    "    rep movsb",
    "    ret",
    // The same; backwards if `from < to < from + count`.
    "memmove:",
    "    mov rax, rdi",
    "    mov rcx, rdx",
    "    mov r8, rdi",
    "    sub r8, rsi",
    "    cmp r8, rdx",
    "    jae 3b",
    "    lea rdi, [rdi + rdx - 1]",
    "    lea rsi, [rsi + rdx - 1]",
    "    std",
    "    rep movsb",
    "    cld",
    "    ret",
    // (rdi: to, esi: byte, rdx: count) -> to
    "memset:",
    "    mov r8, rdi",
    "    movzx eax, sil",
    "    mov rcx, 0x0101010101010101",
    "    imul rax, rcx",
    "    mov rcx, rdx",
    "    shr rcx, 3",
    "    rep stosq",
    "    mov ecx, edx",
    "    and ecx, 7",
    "    rep stosb",
    "    mov rax, r8",
    "    ret",
    // (rdi: a, rsi: b, rdx: count) -> a less than, equal to, greater than b: negative, 0, positive
    "memcmp:",
    "bcmp:",
    "    xor eax, eax",
    "    mov rcx, rdx",
    // Nothing compared is equal.
    "    cmp rax, rax",
    "    repe cmpsb",
    "    je 2f",
    "    movzx eax, byte ptr [rdi - 1]",
    "    movzx ecx, byte ptr [rsi - 1]",
    "    sub eax, ecx",
    "2:  ret",
    // (rdi: string) -> its length
    "strlen:",
    "    xor eax, eax",
    "    mov rcx, -1",
    "    repne scasb",
    "    mov rax, rcx",
    "    not rax",
    "    dec rax",
    "    ret",
);
