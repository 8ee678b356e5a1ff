//! The mounts that a process sees (/proc/PID/mountinfo).

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPoint {
    /// What of the mounted file system is seen here; for a bind of a file, its name.
    pub(crate) root: String,
    /// Where.
    pub(crate) at: String,
}

/// Links followed before a path counts as circular, as in the kernel.
const MAX_LINKS: usize = 40;

pub(crate) fn path(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/mountinfo"))
}

pub(crate) fn of_process(pid: i32) -> io::Result<Vec<MountPoint>> {
    Ok(parse(&fs::read_to_string(path(pid))?))
}

/// Fields 4 and 5 of each line (proc_pid_mountinfo(5)).
pub(crate) fn parse(text: &str) -> Vec<MountPoint> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(3);
            Some(MountPoint { root: unescape(fields.next()?), at: unescape(fields.next()?) })
        })
        .collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(part.get(3..).unwrap_or_default());
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

/// The path that `path` leads to when `root` is "/", with all symbolic links followed and none of them leading out.
/// None when it does not exist or is circular.
pub(crate) fn resolve_in(root: &Path, path: &str) -> Option<String> {
    let mut done = PathBuf::from("/");
    let mut left: Vec<String> = names(Path::new(path));
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            done.pop();
            continue;
        }
        let next = done.join(&name);
        let on_host = root.join(next.strip_prefix("/").ok()?);
        if !fs::symlink_metadata(&on_host).ok()?.is_symlink() {
            done = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        let target = fs::read_link(&on_host).ok()?;
        if target.is_absolute() {
            done = PathBuf::from("/");
        }
        left.extend(names(&target));
    }
    done.into_os_string().into_string().ok()
}

/// The names of a path, last first.
fn names(path: &Path) -> Vec<String> {
    path.components()
        .rev()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
            Component::ParentDir => Some("..".to_owned()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_root_and_place() {
        let text = "100 90 0:5 /null /proc/kcore rw,nosuid - devtmpfs udev rw\n\
                    101 90 8:1 /vol/my\\040data /data\\134x rw - ext4 /dev/sda1 rw\nshort line\n";
        let mounts = parse(text);
        assert_eq!(
            mounts,
            [
                MountPoint { root: "/null".into(), at: "/proc/kcore".into() },
                MountPoint { root: "/vol/my data".into(), at: "/data\\x".into() },
            ]
        );
    }

    #[test]
    fn links_are_followed_inside_the_root_only() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("run/secrets")).unwrap();
        fs::create_dir(root.path().join("var")).unwrap();
        std::os::unix::fs::symlink("/run", root.path().join("var/run")).unwrap();
        std::os::unix::fs::symlink("../../../run", root.path().join("var/up")).unwrap();
        std::os::unix::fs::symlink("circle", root.path().join("circle")).unwrap();
        let resolve = |path| resolve_in(root.path(), path);
        assert_eq!(resolve("/var/run/secrets").as_deref(), Some("/run/secrets"));
        assert_eq!(resolve("/var/up/secrets").as_deref(), Some("/run/secrets"));
        assert_eq!(resolve("/run/secrets/").as_deref(), Some("/run/secrets"));
        assert_eq!(resolve("/circle"), None);
        assert_eq!(resolve("/etc/shadow"), None);
    }
}
