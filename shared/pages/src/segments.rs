//! The System V segments of a store, in an IPC namespace that the restored container gets.
//!
//! A segment cannot be made of memory that is there. So it is made when it is first heard of, with its id, and its memory is
//! filled like that of any other object: by a file that the kernel has of it.

use std::fs::{self, File};
use std::io;

use haulage_sys::ipc::{self, IpcNamespace, PRIVATE};

/// How many segments the namespace of whoever writes to it may have.
const MOST_SEGMENTS: &str = "/proc/sys/kernel/shmmni";

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    namespace: Option<IpcNamespace>,
}

impl Segments {
    /// Makes a segment, in place of one with its id or key, of which the source knows better. Until the container has it,
    /// everybody may attach it.
    ///
    /// # Errors
    /// When the kernel refuses: one that is larger than this host's memory, for example.
    pub(crate) fn make(&mut self, (id, key, size): (i32, i32, u64)) -> io::Result<File> {
        let namespace = match self.namespace.take() {
            Some(namespace) => namespace,
            None => {
                let namespace = IpcNamespace::create()?;
                // As many as the source may have. What it allows the container comes at the restore.
                namespace.run(|| fs::write(MOST_SEGMENTS, ipc::MOST_SEGMENTS.to_string()))??;
                namespace
            }
        };
        let namespace = self.namespace.insert(namespace);
        namespace.run(|| {
            let is_in_the_way = |other: &ipc::Segment| other.id == id || key != PRIVATE && other.key == key;
            for other in ipc::segments()?.iter().filter(|other| is_in_the_way(other)) {
                ipc::remove_segment(other.id)?;
            }
            ipc::make_segment(id, key, size)
        })?
    }

    /// Whether any was made: what they are in.
    pub(crate) fn into_namespace(self) -> Option<File> {
        self.namespace.map(IpcNamespace::into_file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_takes_the_place_of_one_with_its_key_or_id() {
        let mut segments = Segments::default();
        let made = [(5, 70, 4096), (32_768, 70, 8192), (32_768, 0, 4096), (32_769, 0, 4096)];
        let memory = made.map(|segment| segments.make(segment).unwrap());
        let namespace = segments.into_namespace().unwrap();
        let namespace = IpcNamespace::from(std::os::fd::OwnedFd::from(namespace));
        let there = namespace.run(ipc::segments).unwrap().unwrap();
        let there: Vec<_> = there.iter().map(|is| (is.id, is.key, is.size)).collect();
        assert_eq!(there, made[2..]);
        let most = namespace.run(|| fs::read_to_string(MOST_SEGMENTS)).unwrap().unwrap();
        assert_eq!(most.trim(), ipc::MOST_SEGMENTS.to_string());
        drop(memory);
        assert!(Segments::default().make((1, 0, 1 << 60)).is_err());
    }
}
