//! `inventory.img`: what the other images are.

use std::path::Path;

use crate::image::{ImageError, ImageKind, ImageReader};

/// `CRTOOLS_IMAGES_V1_1`, the only version that CRIU writes since 2015.
const IMAGES_VERSION: u32 = 2;

#[derive(Clone, PartialEq, prost::Message)]
struct InventoryEntry {
    #[prost(uint32, required, tag = "1")]
    img_version: u32,
}

/// Checks that the images in `dir` are of a version that we know, and complete as far as the inventory tells: CRIU
/// writes it last but for its statistics.
///
/// # Errors
/// [`ImageError::Unknown`] for another version; a directory without an inventory shows as `NotFound`.
pub fn check(dir: &Path) -> Result<(), ImageError> {
    let path = dir.join("inventory.img");
    let mut reader = ImageReader::open(&path, ImageKind::Inventory)?;
    let entry: InventoryEntry = reader.read()?.ok_or_else(|| reader.damaged("it is empty"))?;
    if entry.img_version == IMAGES_VERSION {
        Ok(())
    } else {
        Err(reader.unknown(format!("images of version {}", entry.img_version)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageWriter;

    #[test]
    fn only_the_known_version_passes() {
        for (img_version, good) in [(IMAGES_VERSION, true), (1, false), (3, false)] {
            let dir = tempfile::tempdir().unwrap();
            let mut writer =
                ImageWriter::create(&dir.path().join("inventory.img"), ImageKind::Inventory).unwrap();
            writer.append(&InventoryEntry { img_version }).unwrap();
            writer.finish().unwrap();
            assert_eq!(check(dir.path()).is_ok(), good, "version {img_version}");
        }
        assert!(matches!(check(Path::new("/nonexistent")), Err(ImageError::Io { .. })));
    }
}
