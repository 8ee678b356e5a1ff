//! Facts about a process that plain files tell.

use std::fs;
use std::io;

/// Sets how readily the kernel kills this process when memory is short: -1000 (never) to 1000 (first).
///
/// # Errors
/// `EACCES` for a lower value without `CAP_SYS_RESOURCE`, `EINVAL` outside the range. The value is unchanged then.
pub fn set_oom_score_adj(value: i16) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", value.to_string())
}

/// What [`set_oom_score_adj`] set.
///
/// # Errors
/// When the file cannot be read or is not a number.
pub fn oom_score_adj() -> io::Result<i16> {
    let text = fs::read_to_string("/proc/self/oom_score_adj")?;
    text.trim().parse().map_err(|source| io::Error::new(io::ErrorKind::InvalidData, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_score_reads_back() {
        let before = oom_score_adj().unwrap();
        set_oom_score_adj(before.max(100)).unwrap();
        assert_eq!(oom_score_adj().unwrap(), before.max(100));
        assert!(set_oom_score_adj(2000).is_err());
    }
}
