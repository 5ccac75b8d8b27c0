//! How much memory this process may use.

use std::fs::read_to_string;
use std::path::Path;

/// The least of the machine's memory and the limits of the control groups that this process is in, in bytes; `None`
/// where the system does not say.
pub fn memory_limit() -> Option<u64> {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let machine = read_to_string("/proc/meminfo").ok().and_then(|info| total(&info));
    machine.into_iter().chain(group_limit(Path::new("/sys/fs/cgroup"), &groups)).min()
}

/// The machine's memory from `/proc/meminfo`, whose first line is `MemTotal: N kB`.
fn total(info: &str) -> Option<u64> {
    let kib: u64 = info.lines().next()?.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

/// The least limit of the control groups that `/proc/self/cgroup` names, `0::PATH` in version 2 and
/// `N:memory:PATH` in version 1, and of those around them: cgroups(7).
fn group_limit(root: &Path, groups: &str) -> Option<u64> {
    let limits = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            "memory" => (root.join("memory"), "memory.limit_in_bytes"),
            _ => return None,
        };
        let around = Path::new(path.trim_start_matches('/')).ancestors();
        // A group without a limit says `max`.
        around
            .filter_map(|group| read_to_string(root.join(group).join(file)).ok())
            .filter_map(|limit| limit.trim().parse().ok())
            .min()
    };
    groups.lines().filter_map(limits).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_group_around_the_process_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "memory.max", "max\n");
        write(root, "user/memory.max", "3000\n");
        write(root, "user/shell/memory.max", "max\n");
        write(root, "other/memory.max", "10\n");
        assert_eq!(group_limit(root, "0::/user/shell\n"), Some(3000));
        assert_eq!(group_limit(root, "0::/\n"), None);
        write(root, "memory/box/memory.limit_in_bytes", "2000\n");
        write(root, "memory/memory.limit_in_bytes", "9223372036854771712\n");
        let both = "5:cpu,cpuacct:/user\n4:memory:/box/inner\n0::/user/shell\n";
        assert_eq!(group_limit(root, both), Some(2000));
        assert_eq!(group_limit(root, "not a group"), None);
    }

    #[test]
    fn the_machine_has_what_meminfo_says() {
        assert_eq!(total("MemTotal:       24684084 kB\nMemFree: 1 kB\n"), Some(24_684_084 << 10));
        assert_eq!(total(""), None);
        assert!(cfg!(not(target_os = "linux")) || memory_limit().unwrap() > 1 << 20);
    }
}
