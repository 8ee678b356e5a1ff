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
    /// The options of the mount itself, such as `ro,nosuid`.
    pub(crate) flags: String,
    /// Whether mounts beneath it show elsewhere too, or those of elsewhere here.
    pub(crate) propagates: bool,
    /// The mounted file system, as `major:minor`: two mounts with the same show the same files.
    pub(crate) device: String,
    /// Its type.
    pub(crate) kind: String,
    /// Its own options, such as `rw,size=64k`.
    pub(crate) options: String,
}

/// Links followed before a path counts as circular, as in the kernel.
const MAX_LINKS: usize = 40;

pub(crate) fn path(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/mountinfo"))
}

pub(crate) fn of_process(pid: i32) -> io::Result<Vec<MountPoint>> {
    Ok(parse(&fs::read_to_string(path(pid))?))
}

/// The lines of a mountinfo (`proc_pid_mountinfo(5)`); one that is not as that says is left out.
pub(crate) fn parse(text: &str) -> Vec<MountPoint> {
    text.lines().filter_map(parse_line).collect()
}

/// `id parent major:minor root mount-point options [optional field]... - type source super-options`
fn parse_line(line: &str) -> Option<MountPoint> {
    let mut fields = line.split(' ').skip(2);
    let (device, root, at, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let propagates = fields.by_ref().take_while(|field| *field != "-").count() > 0;
    let (kind, _source, options) = (fields.next()?, fields.next()?, fields.next()?);
    Some(MountPoint {
        root: unescape(root),
        at: unescape(at),
        flags: flags.to_owned(),
        propagates,
        device: device.to_owned(),
        kind: kind.to_owned(),
        options: unescape(options),
    })
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
                    101 90 8:1 /vol/my\\040data /data\\134x ro shared:3 master:1 - ext4 /dev/sda1 rw\nshort line\n";
        let mounts = parse(text);
        let found: Vec<_> = mounts.iter().map(|m| (m.root.as_str(), m.at.as_str(), m.propagates)).collect();
        assert_eq!(found, [("/null", "/proc/kcore", false), ("/vol/my data", "/data\\x", true)]);
        let last = mounts.last().unwrap();
        assert_eq!((last.flags.as_str(), last.kind.as_str(), last.options.as_str()), ("ro", "ext4", "rw"));
        assert_eq!(last.device, "8:1");
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
