//! `pstree.img`: the processes of the tree, by their ids in its innermost pid namespace.

use std::path::Path;

use crate::image::{ImageError, ImageKind, ImageReader};

/// A process of the images.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Process {
    /// Its id; image files such as `pagemap-<pid>.img` carry it in their names.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// Its parent, 0 for the root.
    #[prost(uint32, required, tag = "2")]
    pub parent: u32,
    /// Its process group.
    #[prost(uint32, required, tag = "3")]
    pub group: u32,
    /// Its session.
    #[prost(uint32, required, tag = "4")]
    pub session: u32,
    /// Its threads, itself among them.
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

/// The processes of the images in `dir`, the root first.
///
/// # Errors
/// When the image is missing or damaged.
pub fn read(dir: &Path) -> Result<Vec<Process>, ImageError> {
    let mut reader = ImageReader::open(&dir.join("pstree.img"), ImageKind::Pstree)?;
    let mut processes = Vec::new();
    while let Some(process) = reader.read()? {
        processes.push(process);
    }
    Ok(processes)
}
