//! The container's place among the cgroups of version 2.
//!
//! runc puts CRIU into the container's cgroup and, on version 1, tells it that this is the root of those in the
//! images. On version 2 runc 1.1 does not tell (`criuApplyCgroups` in its `libcontainer`): the processes would go where
//! they were on the source, out of the reach of the limits, and of the engine. So CRIU is told here, by a configuration
//! file of its own, which runc passes on. A runc that tells it says the same. The file also has what the images leave to
//! the restore.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::statfs;
use serde_json::{Map, Value};

use crate::failure::Failure;

/// Where the one hierarchy of version 2 is mounted.
const UNIFIED: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// The annotation that names CRIU's configuration file to runc, and the one that it uses without.
const ANNOTATION: &str = "org.criu.config";
const DEFAULT_CONFIGURATION: &str = "/etc/criu/runc.conf";
/// Ours, in the working directory.
const CONFIGURATION: &str = "criu.conf";
/// Where runc makes the scopes of containers whose bundle names no slice.
const DEFAULT_SLICE: &str = "system.slice";

/// Has the bundle give CRIU a configuration file of the container's own, in `work`, which tells it the cgroup that runc
/// makes for the container, where runc does not.
///
/// # Errors
/// [`Failure::Cgroup`]; the bundle is then not to be used.
pub(crate) fn tell(bundle: &Path, id: &str, systemd: bool, work: &Path) -> Result<(), Failure> {
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).map_err(cgroup)?).map_err(cgroup)?;
    let mut place = String::new();
    if is_unified().map_err(cgroup)? {
        let given = config.pointer("/linux/cgroupsPath").and_then(Value::as_str).unwrap_or_default();
        let found = if systemd { scope(given, id) } else { directory(given, id) }.map_err(cgroup)?;
        let found = found.to_str().filter(|place| !place.contains(char::is_whitespace));
        let found = found.ok_or_else(|| cgroup(format!("the cgroup {given:?} cannot be told to criu")))?;
        place = format!("cgroup-root {found}\n");
    }

    let config = config.as_object_mut().ok_or_else(|| cgroup("the bundle's configuration is no object"))?;
    let annotations = config.entry("annotations").or_insert(Value::Null);
    if annotations.is_null() {
        *annotations = Value::Object(Map::new());
    }
    let annotations = annotations.as_object_mut().ok_or_else(|| cgroup("the annotations are no object"))?;
    // What the host's administrator has set stays.
    let theirs = annotations.get(ANNOTATION).and_then(Value::as_str).unwrap_or(DEFAULT_CONFIGURATION);
    let theirs = match fs::read_to_string(theirs) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => String::new(),
        read => read.map_err(cgroup)?,
    };
    let ours = work.join(CONFIGURATION);
    fs::write(&ours, format!("{theirs}\n{place}")).map_err(cgroup)?;
    let ours = ours.to_str().ok_or_else(|| cgroup("the working directory is not UTF-8"))?;
    annotations.insert(ANNOTATION.to_owned(), ours.into());
    fs::write(&path, Value::Object(std::mem::take(config)).to_string()).map_err(cgroup)
}

/// Adds `lines` to the configuration in `work`.
///
/// # Errors
/// [`Failure::Cgroup`].
pub(crate) fn add_configuration(work: &Path, lines: &str) -> Result<(), Failure> {
    let file = fs::File::options().append(true).open(work.join(CONFIGURATION));
    file.and_then(|mut file| io::Write::write_all(&mut file, lines.as_bytes())).map_err(cgroup)
}

fn cgroup(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::Cgroup(error.into())
}

fn is_unified() -> io::Result<bool> {
    Ok(u64::try_from(statfs(UNIFIED)?.f_type).is_ok_and(|magic| magic == CGROUP2_MAGIC))
}

/// The cgroup that runc makes by itself: a path from the root, or one beside its own.
fn directory(given: &str, id: &str) -> io::Result<PathBuf> {
    let given = Path::new(if given.is_empty() { id } else { given });
    if given.is_absolute() {
        return Ok(given.to_owned());
    }
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::"));
    let own = own.ok_or_else(|| io::Error::other("this process is in no cgroup of version 2"))?;
    Ok(Path::new(own).parent().unwrap_or(Path::new("/")).join(given))
}

/// The cgroup of the unit that runc has systemd make: `slice:prefix:name`, see `systemd.slice(5)` for where a slice is.
fn scope(given: &str, id: &str) -> io::Result<PathBuf> {
    let default = format!(":runc:{id}");
    let given = if given.is_empty() { &default } else { given };
    let malformed = || io::Error::other(format!("{given:?} is not of the form slice:prefix:name"));
    let [slice, prefix, name] = given.split(':').collect::<Vec<_>>().try_into().map_err(|_| malformed())?;
    let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
    let slice = slice.strip_suffix(".slice").filter(|slice| !slice.contains('/')).ok_or_else(malformed)?;
    let mut path = PathBuf::from("/");
    if slice != "-" {
        let dashes = slice.match_indices('-').map(|(at, _)| at).chain([slice.len()]);
        path.extend(dashes.filter_map(|end| slice.get(..end)).map(|slice| format!("{slice}.slice")));
    }
    path.push(if name.ends_with(".slice") { name.to_owned() } else { format!("{prefix}-{name}.scope") });
    if path.components().any(|part| matches!(part, Component::ParentDir)) {
        return Err(malformed());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_that_runc_makes() {
        assert_eq!(directory("/docker/abc", "abc").unwrap(), Path::new("/docker/abc"));
        assert!(directory("", "abc").unwrap().ends_with("abc"));
        assert!(directory("", "abc").unwrap().is_absolute());
        let scoped = |given| scope(given, "abc").unwrap();
        assert_eq!(scoped("system.slice:docker:abc"), Path::new("/system.slice/docker-abc.scope"));
        assert_eq!(scoped(""), Path::new("/system.slice/runc-abc.scope"));
        assert_eq!(scoped("-.slice:docker:abc"), Path::new("/docker-abc.scope"));
        assert_eq!(scoped("a-b-c.slice:p:n"), Path::new("/a.slice/a-b.slice/a-b-c.slice/p-n.scope"));
        assert_eq!(scoped("a.slice:p:n.slice"), Path::new("/a.slice/n.slice"));
        for malformed in ["/docker/abc", "a:b:c", "a/b.slice:p:n", "a.slice:p:/../n"] {
            assert!(scope(malformed, "abc").is_err(), "{malformed}");
        }
    }
}
