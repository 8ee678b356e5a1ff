//! CRIU's images and our pages become one set of images.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

use haulage_criu::descriptors::LeftOutMemfd;
use haulage_criu::ipc::IpcState;
use haulage_criu::merge::{Assembly, Fill, PageSource};
use haulage_criu::pagemap::PageRun;
use haulage_criu::shared::{LeftOut, SharedObject};
use haulage_pages::process::Vpid;
use haulage_pages::range::{PageNo, PageRange};
use haulage_pages::sealed::SealedStore;
use haulage_protocol::fault::Fault;
use haulage_protocol::unit::PAGE_SIZE;
use haulage_sys::ipc::IpcNamespace;
use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals};

use crate::failure::{IMAGES, fault};

/// What of `st_mode` are permissions.
const PERMISSIONS: u32 = 0o7777;

/// What a restore finds beside images.
#[derive(Debug)]
pub(crate) struct Provided {
    /// The shared memory that it inherits, in the order of its keys.
    pub(crate) shared: Vec<OwnedFd>,
    /// The IPC namespace that it is done in, if it is not in the images, with all that is in it.
    pub(crate) ipc: Option<OwnedFd>,
}

/// Joins the images in `received` with the sealed store in `store`; the result is in `complete`. Pages that can come
/// later are only named there.
pub(crate) fn join(received: &Path, store: &Path, complete: &Path) -> Result<Provided, Fault> {
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
    // What has come besides was not hidden from CRIU, which has dumped it: memory of its own, mostly, by which it works in
    // the container while its pages are read.
    let shared = left_out.objects.iter().map(|object| shared(&store, object)).collect::<Result<_, _>>()?;
    let state = IpcState::read(received).map_err(fault(IMAGES))?;
    let ipc = state.map(|state| provide(&store, &state)).transpose().map_err(fault(IMAGES))?;
    Ok(Provided { shared, ipc })
}

/// The IPC namespace in which the System V segments are that have come, with the rest of what was in it.
fn provide(store: &SealedStore, state: &IpcState) -> io::Result<OwnedFd> {
    let namespace = store.namespace().ok_or_else(|| io::Error::other("no System V segment has come"))?;
    let namespace = IpcNamespace::from(OwnedFd::from(namespace.try_clone()?));
    state.provide(&namespace)?;
    Ok(namespace.into_file().into())
}

/// The memory of an object, of its length; of a memfd, with all that it is besides. Nothing is written to it any more but
/// by the container.
fn shared(store: &SealedStore, object: &SharedObject) -> Result<OwnedFd, Fault> {
    let Some((_, _, memory)) = store.objects().find(|(_, id, _)| id.0 == object.id) else {
        return Err(Fault::new(IMAGES, format!("the shared memory {} has not come", object.id)));
    };
    memory.set_len(object.size).map_err(fault(IMAGES))?;
    if let Some(memfd) = &object.memfd {
        finish(memory, memfd).map_err(fault(IMAGES))?;
    }
    memory.try_clone().map(Into::into).map_err(fault(IMAGES))
}

fn finish(memory: &File, is: &LeftOutMemfd) -> io::Result<()> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", memory.as_raw_fd()))?;
    let expected = [b"/memfd:", &is.name[..], b" (deleted)"].concat();
    if name.as_os_str().as_bytes() != expected {
        let expected = String::from_utf8_lossy(&is.name);
        return Err(io::Error::other(format!("{} has come for the memfd {expected}", name.display())));
    }
    fchown(memory, Some(is.uid), Some(is.gid))?;
    memory.set_permissions(Permissions::from_mode(is.mode & PERMISSIONS))?;
    let seals = SealFlags::from_bits_retain(is.seals);
    // Nobody adds any where one keeps others away, though it be there already.
    if fcntl_get_seals(memory)? != seals {
        fcntl_add_seals(memory, seals)?;
    }
    Ok(())
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
