use super::*;

#[test]
fn virtualisation_is_a_cpu_flag() {
    assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vme svm\n"));
    assert!(has_virtualisation("flags : vmx\n"));
    assert!(!has_virtualisation("model name : svm vmx\nflags : fpu svm_lock\nvmx flags : vnmi\n"));
    assert!(!has_virtualisation(""));
}

#[test]
fn a_kvm_for_bare_metal_code_only_fails() {
    assert_eq!(stock_kernels(true).status, Status::Ok);
    let check = stock_kernels(false);
    assert_eq!(check.status, Status::Fail);
    assert!(check.fix.unwrap().contains("testbed"));
}

#[test]
fn open_file_limits() {
    let line =
        |limit: &str| format!("Max processes   1 1 processes\nMax open files            {limit}   524288  files\n");
    assert_eq!(open_files(&line("1024")).status, Status::Ok);
    assert_eq!(open_files(&line("256")).status, Status::Warn);
    assert_eq!(open_files(&line("unlimited")).status, Status::Ok);
    assert_eq!(open_files("").status, Status::Warn);
}

#[test]
fn run_directories() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run_directory(dir.path()).status, Status::Ok);
    let new = dir.path().join("a/b");
    assert_eq!(run_directory(&new).status, Status::Ok);
    assert!(!new.exists(), "looking must not make it");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "looking leaves nothing behind");
    assert_eq!(run_directory(&dir.path().join("x".repeat(60))).status, Status::Warn);
    fs::write(dir.path().join("file"), "").unwrap();
    assert_eq!(run_directory(&dir.path().join("file")).status, Status::Fail);
    assert_eq!(run_directory(&dir.path().join("file/below")).status, Status::Fail);
}

#[test]
fn userfaultfd_is_needed_for_forks_only() {
    let refused = || Err(io::Error::from(ErrorKind::PermissionDenied));
    let check = userfaultfd(&support::Support { syscall: refused(), device: refused() });
    assert_eq!(check.status, Status::Warn);
    let check = userfaultfd(&support::Support { syscall: Ok(1), device: refused() });
    assert_eq!(check.status, Status::Warn);
    assert!(check.found.contains("lacks MISSING_SHMEM, MINOR_SHMEM"), "{}", check.found);
    let check = userfaultfd(&support::Support { syscall: refused(), device: Ok(u64::MAX) });
    assert_eq!(check.status, Status::Ok);
}

#[test]
fn io_urings() {
    assert_eq!(io_uring(Ok(()), "").status, Status::Ok);
    for (errno, disabled, found, fix) in [
        (libc::EPERM, "2", "io_uring_disabled=2", "sysctl"),
        (libc::EPERM, "0", "forbidden", "seccomp"),
        (libc::EPERM, "", "forbidden", "seccomp"),
        (libc::ENOSYS, "", "missing", "CONFIG_IO_URING"),
        (libc::ENOMEM, "0", "refused", "ulimit"),
        (libc::EMFILE, "0", "refused", "io_uring_setup(2)"),
    ] {
        let check = io_uring(Err(io::Error::from_raw_os_error(errno)), disabled);
        assert_eq!(check.status, Status::Warn, "disks work without");
        assert!(check.found.contains(found) && check.fix.as_ref().unwrap().contains(fix), "{check:?}");
    }
}

#[test]
fn cgroups() {
    assert_eq!(cgroup("0::/user.slice", "cpuset cpu io memory").status, Status::Ok);
    assert_eq!(cgroup("0::/", "").status, Status::Warn);
    assert_eq!(cgroup("5:memory:/x", "").status, Status::Warn);
}

#[test]
fn huge_pages_of_the_host() {
    for (shmem, usable, status) in [
        (Some("advise"), true, Status::Ok),
        (Some("always"), true, Status::Ok),
        (Some("never"), true, Status::Warn),
        (Some("always"), false, Status::Warn),
        (None, false, Status::Warn),
    ] {
        let check = huge_pages_where(shmem, usable);
        assert_eq!((check.status, check.fix.is_some()), (status, status == Status::Warn), "{check:?}");
    }
}

#[test]
fn the_whole_report() {
    let dir = tempfile::tempdir().unwrap();
    let report = examine(dir.path());
    let mut names: Vec<_> = report.checks.iter().map(|check| check.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), report.checks.len(), "names are unique");
    for check in &report.checks {
        assert_eq!(check.status == Status::Ok, check.fix.is_none(), "{check:?}");
        assert!(!check.found.is_empty() && !check.why.is_empty(), "{check:?}");
    }
    assert_eq!(report.can_run, report.checks.iter().all(|check| check.status != Status::Fail));
}
