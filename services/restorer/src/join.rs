//! CRIU's images and our pages become one set of images.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use haulage_criu::merge::{Assembly, Fill, PageSource};
use haulage_criu::pagemap::PageRun;
use haulage_criu::shared::{LeftOut, SharedObject};
use haulage_pages::process::Vpid;
use haulage_pages::range::{PageNo, PageRange};
use haulage_pages::sealed::SealedStore;
use haulage_protocol::fault::Fault;
use haulage_protocol::unit::PAGE_SIZE;

use crate::failure::{IMAGES, fault};

/// Joins the images in `received` with the sealed store in `store`; the result is in `complete`. Pages that can come
/// later are only named there. Returns the shared memory that the restore inherits, in the order of its keys.
pub(crate) fn join(received: &Path, store: &Path, complete: &Path) -> Result<Vec<OwnedFd>, Fault> {
    let store = SealedStore::open(store).map_err(fault(IMAGES))?;
    let assembly = Assembly::begin(received, complete).map_err(fault(IMAGES))?;
    if let Some((vpid, _)) = store.processes().find(|(vpid, _)| !assembly.processes().contains(&vpid.0)) {
        return Err(Fault::new(IMAGES, format!("pages have come of process {vpid}, which no image names")));
    }
    let left_out = LeftOut::read(received).map_err(fault(IMAGES))?;
    assembly.add_shared(&left_out).map_err(fault(IMAGES))?;
    for pid in assembly.processes() {
        let runs = store.pages(Vpid(*pid)).iter().collect::<Vec<_>>().into_iter();
        let mut source = Stored { store: &store, vpid: Vpid(*pid), runs };
        assembly.add_pages(*pid, &mut source, Fill::Later).map_err(fault(IMAGES))?;
    }
    let shared =
        left_out.objects.iter().map(|object| shared(&store, object)).collect::<Result<Vec<_>, _>>()?;
    if store.objects().count() != shared.len() {
        return Err(Fault::new(IMAGES, "shared memory has come that no image names"));
    }
    Ok(shared)
}

/// The memory of an object, of its length.
fn shared(store: &SealedStore, object: &SharedObject) -> Result<OwnedFd, Fault> {
    let Some((_, _, memory)) = store.objects().find(|(_, id, _)| id.0 == object.id) else {
        return Err(Fault::new(IMAGES, format!("the shared memory {} has not come", object.id)));
    };
    memory.set_len(object.size).and_then(|()| memory.try_clone()).map(Into::into).map_err(fault(IMAGES))
}

/// The stored pages of one process.
struct Stored<'a> {
    store: &'a SealedStore,
    vpid: Vpid,
    runs: std::vec::IntoIter<PageRange>,
}

impl PageSource for Stored<'_> {
    fn next_run(&mut self) -> io::Result<Option<PageRun>> {
        Ok(self.runs.next().map(|run| PageRun { start: run.start().address(), pages: run.count() }))
    }

    fn read_at(&mut self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        let count = u64::try_from(buffer.len()).unwrap_or(u64::MAX) / PAGE_SIZE;
        let range = PageRange::with_count(PageNo::containing(address), count)
            .ok_or_else(|| io::Error::other("a read beyond the address space"))?;
        self.store.read_into(self.vpid, range, buffer).map_err(io::Error::other)
    }
}
