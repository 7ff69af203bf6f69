//! What the code that is placed in a guest needs of its kernel, or why it cannot be placed there.
//!
//! Found by symbol and type, never by version: what a kernel has not, or has otherwise, is named. Each of these is the same from 5.10 to
//! 7.3; where the kernel has types (BTF), the number of parameters is compared.

use civic_guest::current::CurrentError;
use civic_guest::kernel::{Kernel, MemberError, SymbolError};
use civic_guest::memory::Gva;
use serde::{Deserialize, Serialize};

/// Why a kernel is not one that we can start a program in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It lacks a function.
    #[error("the guest's kernel has no function {name} that can be called")]
    Function {
        /// Its name.
        name: &'static str,
        /// Why.
        source: SymbolError,
    },
    /// A function takes other parameters.
    #[error("the guest's kernel has another {name} than we know: {prototype}")]
    Prototype {
        /// Its name.
        name: &'static str,
        /// As it is there.
        prototype: String,
    },
    /// It lacks a member of a type, or all types.
    #[error("the guest's kernel does not tell where {name} is: it needs its type information (CONFIG_DEBUG_INFO_BTF)")]
    Member {
        /// Type and member.
        name: &'static str,
        /// Why.
        source: MemberError,
    },
    /// A member is further away than any can be.
    #[error("the guest's kernel says that {name} is at {offset}")]
    Offset {
        /// Type and member.
        name: &'static str,
        /// Where it is said to be.
        offset: u64,
    },
    /// Where the running task is, is not known.
    #[error("the guest's kernel does not tell which task a CPU runs")]
    Current(#[from] CurrentError),
    /// It checks whom its pointers to functions point to.
    #[error(
        "the guest's kernel checks the types of functions that it calls through pointers (kCFI), which is not supported"
    )]
    ControlFlow,
}

/// Addresses of functions, and offsets of members in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the kernel's own names")]
pub struct Targets {
    pub call_usermodehelper_setup: Gva,
    pub call_usermodehelper_exec: Gva,
    pub get_fs_type: Gva,
    pub vfs_kern_mount: Gva,
    pub set_fs_pwd: Gva,
    pub filp_open: Gva,
    pub kernel_write: Gva,
    pub fput: Gva,
    pub fput_sync: Gva,
    pub task_work_run: Gva,
    pub mntput: Gva,
    /// Of the running task from GS.
    pub current: i32,
    pub task_fs: u32,
    pub task_flags: u32,
    pub mount_root: u32,
    pub info_path: u32,
    pub info_retval: u32,
}

impl Targets {
    /// Of this kernel.
    ///
    /// # Errors
    /// What it lacks.
    pub fn of(kernel: &Kernel) -> Result<Self, Unfit> {
        // Both schemes put the expected types' hashes before functions.
        if kernel.symbol("__cfi_schedule").is_ok() {
            return Err(Unfit::ControlFlow);
        }
        let function = |name: &'static str, parameters: usize| {
            let at = kernel.function(name).map_err(|source| Unfit::Function { name, source })?;
            let prototypes = kernel.prototypes(name).unwrap_or_default();
            match prototypes.iter().find(|prototype| prototype.parameters.len() != parameters) {
                Some(other) => Err(Unfit::Prototype { name, prototype: other.to_string() }),
                None => Ok(at),
            }
        };
        let member = |name: &'static str, of: &str, path: &str| {
            let found = kernel.member(of, path).map_err(|source| Unfit::Member { name, source })?;
            u32::try_from(found.offset).map_err(|_| Unfit::Offset { name, offset: found.offset })
        };
        Ok(Self {
            call_usermodehelper_setup: function("call_usermodehelper_setup", 7)?,
            call_usermodehelper_exec: function("call_usermodehelper_exec", 2)?,
            get_fs_type: function("get_fs_type", 1)?,
            vfs_kern_mount: function("vfs_kern_mount", 4)?,
            set_fs_pwd: function("set_fs_pwd", 2)?,
            filp_open: function("filp_open", 3)?,
            kernel_write: function("kernel_write", 4)?,
            fput: function("fput", 1)?,
            fput_sync: function("__fput_sync", 1)?,
            task_work_run: function("task_work_run", 0)?,
            mntput: function("mntput", 1)?,
            current: kernel.current()?.displacement,
            task_fs: member("task_struct.fs", "task_struct", "fs")?,
            task_flags: member("task_struct.flags", "task_struct", "flags")?,
            mount_root: member("vfsmount.mnt_root", "vfsmount", "mnt_root")?,
            info_path: member("subprocess_info.path", "subprocess_info", "path")?,
            info_retval: member("subprocess_info.retval", "subprocess_info", "retval")?,
        })
    }
}
