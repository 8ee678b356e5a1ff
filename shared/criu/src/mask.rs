//! The masked pagemap: how memory that we track is kept out of CRIU's dump.
//!
//! CRIU decides by `/proc/<pid>/pagemap` which pages to dump. It is run in a private mount namespace in which a sparse
//! file covers that of every process: the true entries for what CRIU shall dump, holes, that is "not present", for what
//! it shall not. Covering CRIU's own pagemap with holes makes it find the `PAGEMAP_SCAN` ioctl unsupported and read.
//!
//! Shared memory it dumps by its mappings, which it knows from `/proc/<pid>/smaps`. A copy without those that are ours
//! covers that file ([`crate::smaps`]), and without the counts of pages, which nobody needs and the kernel takes long
//! for; and a directory without its descriptors covers `/proc/<pid>/fd` ([`crate::descriptors`]).
//!
//! CRIU caches what it finds out about the kernel in `/run/criu.kdat`. A cache left by a CRIU without the mask says
//! that the ioctl works, and one left by a masked CRIU says that it does not; so the masked one gets a cache of its
//! own, which is made once for a program of CRIU's and a process of ours.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use haulage_sys::Pid;
use haulage_sys::mount_ns::{bind_in, spawn_in_private_mounts};

use crate::cause::Cause;
use crate::descriptors;
use crate::dump::{self, DumpError, Ipc, Network};
use crate::image::PAGE_SIZE;
use crate::shared::LeftOutMapping;
use crate::smaps::{self, SmapsError};
use crate::swrk::{Criu, RpcError, Worker, WorkerView};

/// A tmpfs that every Linux host has.
pub const DEFAULT_PARENT: &str = "/dev/shm";

/// The size of a pagemap of a 57-bit address space, in bytes. A shorter file would make CRIU read at its end forever.
const PAGEMAP_SIZE: u64 = 1 << (57 - 12 + 3);
/// Above this lies the kernel's half of the address space, where `[vsyscall]` is listed too.
const USER_END: u64 = 1 << 56;
const DIR_PREFIX: &str = "haul-mask-";
/// Bytes of pagemap that stand for a page.
const ENTRY: u64 = 8;
/// Pagemaps are copied in pieces of this size, in bytes (64 MiB of address space).
const PIECE: usize = 128 << 10;
/// From so many bytes of mappings on it is worth it to keep the kernel from counting their pages.
const COUNTED: u64 = 16 << 20;
/// `TMPFS_MAGIC` of `linux/magic.h`: other file systems cannot hold a file of that size.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// The directory and the name of CRIU's cache (`criu/kerndat.c`).
const RUN_DIR: &str = "/run";
const CACHE_NAME: &str = "criu.kdat";
/// How often CRIU is started if the place for its cache goes each time. It takes other CRIUs that start in the very same
/// milliseconds, one for each.
const ATTEMPTS: u32 = 10;

/// The mask could not be made. Nothing of it is left, and CRIU would see everything as it is.
#[derive(Debug, thiserror::Error)]
pub enum MaskError {
    /// The file system said no.
    #[error("cannot use {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The parent directory cannot hold sparse files of that size.
    #[error("{0} is not on tmpfs")]
    NotTmpfs(PathBuf),
    /// The mappings of a process are not those that were to be hidden.
    #[error("cannot leave mappings of process {pid} out")]
    Smaps {
        /// Whose.
        pid: i32,
        /// Why.
        source: SmapsError,
    },
    /// CRIU does not work behind the mask.
    #[error("criu cannot work with a masked pagemap: {0}")]
    Unfit(Cause),
}

/// Masked pagemaps, in a directory that is removed when this is dropped, or swept when this process died before.
#[derive(Debug)]
pub struct PagemapMask {
    dir: PathBuf,
    /// Locked as long as the directory is in use.
    _lock: File,
    hole: PathBuf,
    cache: PathBuf,
    covered: Vec<(PathBuf, PathBuf)>,
    criu: Criu,
    hides_descriptors: bool,
    waiting: Option<Waiting>,
}

/// A CRIU that was started behind the mask before there was anything to cover.
#[derive(Debug)]
struct Waiting {
    worker: Worker,
    namespaces: (Network, Ipc),
    hides_descriptors: bool,
}

/// What masked CRIUs find out about the kernel: the content of their cache, and of which program it is.
#[derive(Debug, Default)]
pub(crate) struct Findings(Mutex<Option<(Signature, Vec<u8>)>>);

impl Findings {
    fn of(&self, program: &Signature) -> Option<Vec<u8>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|(of, _)| of == program).map(|(_, cache)| cache.clone())
    }

    fn keep(&self, program: Signature, cache: Vec<u8>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((program, cache));
    }
}

/// Tells a program from the one that replaces it.
#[derive(Debug, PartialEq, Eq)]
struct Signature {
    inode: (u64, u64),
    changed: (i64, i64),
}

impl Signature {
    fn of(program: &Path) -> io::Result<Self> {
        let is = fs::metadata(program)?;
        Ok(Self { inode: (is.dev(), is.ino()), changed: (is.ctime(), is.ctime_nsec()) })
    }
}

impl PagemapMask {
    /// Makes ready for processes to be covered. The first time this runs CRIU for its cache, and makes ready what tells
    /// the flags of mappings, which takes some 80 ms.
    ///
    /// # Errors
    /// When `parent` is not on tmpfs, or CRIU fails its own check behind the mask.
    pub fn prepare(criu: &Criu, parent: &Path) -> Result<Self, MaskError> {
        if rustix::fs::statfs(parent).map_err(|errno| at(parent)(errno.into()))?.f_type != TMPFS_MAGIC {
            return Err(MaskError::NotTmpfs(parent.to_owned()));
        }
        let (dir, lock) = make_dir(parent)?;
        let run = dir.join("run");
        let mask = Self {
            hole: dir.join("hole"),
            cache: run.join(CACHE_NAME),
            covered: Vec::new(),
            hides_descriptors: false,
            dir,
            _lock: lock,
            criu: criu.clone(),
            waiting: None,
        };
        criu.vm_flags();
        sparse(&mask.hole)?;
        fs::create_dir(&run).map_err(at(&run))?;
        let program = Signature::of(criu.program()).map_err(at(criu.program()))?;
        match criu.findings.of(&program) {
            Some(cache) => fs::write(&mask.cache, cache).map_err(at(&mask.cache))?,
            None => {
                mask.make_cache(criu, run)?;
                criu.findings.keep(program, fs::read(&mask.cache).map_err(at(&mask.cache))?);
            }
        }
        Ok(mask)
    }

    /// Starts CRIU for the dump of the tree of `pid`, which need not be frozen yet: to start takes it longer than many a
    /// dump. `network` is that of the dump's request, and `hides_descriptors` whether any are likely to be covered; if
    /// either turns out otherwise, the dump starts another CRIU. What it says before it has a log goes to `work`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn call_criu(
        &mut self,
        pid: i32,
        namespaces: (Network, Ipc),
        hides_descriptors: bool,
        work: &Path,
    ) -> Result<(), DumpError> {
        let view = |mask: &Self| Ok(WorkerView { hides_descriptors, ..mask.bare_view()? });
        let worker = self.start_worker(view, pid, namespaces, work)?;
        self.waiting = Some(Waiting { worker, namespaces, hides_descriptors });
        Ok(())
    }

    /// A CRIU behind what `view` says. The place that its cache covers can go in the very moment: any other CRIU removes
    /// one that it finds stale before it makes its own, and where `/run` is on a disk it makes none at all.
    pub(crate) fn start_worker(
        &self,
        view: impl Fn(&Self) -> Result<WorkerView, MaskError>,
        pid: i32,
        namespaces: (Network, Ipc),
        work: &Path,
    ) -> Result<Worker, DumpError> {
        let start = || dump::start_worker(&self.criu, Some(&view(self)?), pid, namespaces, work);
        let is_there = || self.criu.program().exists();
        for _ in 1..ATTEMPTS {
            match start() {
                Ok(worker) if !self.covers_cache(&worker) => {}
                Err(DumpError::Rpc(RpcError::Start { source, .. }))
                    if source.kind() == ErrorKind::NotFound && is_there() => {}
                other => return other,
            }
        }
        start()
    }

    /// Whether the CRIU that waits will do for a dump with these namespaces, in which descriptors are likely to be covered or
    /// not. If not, another is started in the dump.
    pub fn would_serve(&self, namespaces: (Network, Ipc), hides_descriptors: bool) -> bool {
        self.waiting.as_ref().is_some_and(|waiting| self.serves(waiting, namespaces, hides_descriptors))
    }

    fn serves(&self, waiting: &Waiting, namespaces: (Network, Ipc), hides_descriptors: bool) -> bool {
        waiting.namespaces == namespaces
            && waiting.hides_descriptors == hides_descriptors
            && waiting.worker.is_alive()
            && self.covers_cache(&waiting.worker)
    }

    /// The CRIU that waits, if it is of use for a dump with these namespaces: it sees everything that is covered.
    pub(crate) fn take_waiting(&mut self, namespaces: (Network, Ipc)) -> Result<Option<Worker>, MaskError> {
        let Some(waiting) = self.waiting.take() else { return Ok(None) };
        if !self.serves(&waiting, namespaces, self.hides_descriptors) {
            tracing::info!(
                "the CRIU that waited has ended, or is not of the kind that is needed: another is started"
            );
            return Ok(None);
        }
        bind_in(waiting.worker.pid(), &self.covered).map_err(at(&self.dir))?;
        Ok(Some(waiting.worker))
    }

    /// Whether a CRIU will find our cache when it has its request: whoever removes the file beneath it, as every CRIU does that
    /// finds it stale, takes what covers it away in all mount namespaces.
    fn covers_cache(&self, worker: &Worker) -> bool {
        let seen = format!("/proc/{}/root{RUN_DIR}/{CACHE_NAME}", worker.pid());
        let inode = |path: &Path| fs::metadata(path).map(|is| (is.dev(), is.ino()));
        inode(Path::new(&seen)).ok().is_some_and(|seen| inode(&self.cache).is_ok_and(|ours| ours == seen))
    }

    /// Covers process `pid` (an id in our own pid namespace): its memory in `hidden` (addresses in bytes, page-aligned)
    /// is absent for CRIU, all else as it is now. The process must be frozen and stay so until the dump is over.
    ///
    /// # Errors
    /// When the process is gone or its pagemap cannot be read.
    pub fn cover(&mut self, pid: i32, hidden: &[Range<u64>]) -> Result<(), MaskError> {
        self.cover_shared(pid, hidden, &[], &[]).map(drop)
    }

    /// As [`Self::cover`], and of the shared mappings `unknown` (addresses, each exactly one mapping) CRIU does not
    /// even know, nor of private ones in `needless`, all of which are hidden, as far as images can describe them. They
    /// are returned, for [`crate::shared::LeftOut`].
    ///
    /// # Errors
    /// As there, and when some of them are not there.
    pub fn cover_shared(
        &mut self,
        pid: i32,
        hidden: &[Range<u64>],
        unknown: &[Range<u64>],
        needless: &[Range<u64>],
    ) -> Result<Vec<LeftOutMapping>, MaskError> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let (maps, real, copy) = (proc.join("maps"), proc.join("pagemap"), self.dir.join(pid.to_string()));
        let mappings = read_maps(&maps).map_err(at(&maps))?;
        let pagemap = File::open(&real).map_err(at(&real))?;
        let masked = sparse(&copy)?;
        let hidden: Vec<_> = hidden.iter().chain(unknown).cloned().collect();
        for shown in subtract(&mappings, &hidden) {
            copy_entries(&pagemap, &masked, shown).map_err(at(&real))?;
        }
        self.covered.push((copy, real));
        let short = if bytes(&mappings) >= COUNTED { self.short_smaps(pid, &proc) } else { None };
        match short {
            None if unknown.is_empty() && needless.is_empty() => Ok(Vec::new()),
            short => self.cover_smaps(pid, &proc, short, unknown, needless),
        }
    }

    fn cover_smaps(
        &mut self,
        pid: i32,
        proc: &Path,
        short: Option<String>,
        unknown: &[Range<u64>],
        needless: &[Range<u64>],
    ) -> Result<Vec<LeftOutMapping>, MaskError> {
        let (real, copy) = (proc.join("smaps"), self.dir.join(format!("{pid}.smaps")));
        let smaps = match short {
            Some(short) => short,
            None => String::from_utf8_lossy(&fs::read(&real).map_err(at(&real))?).into_owned(),
        };
        let without = smaps::without(&smaps, unknown, needless);
        let (rest, mappings) = without.map_err(|source| MaskError::Smaps { pid, source })?;
        fs::write(&copy, rest).map_err(at(&copy))?;
        self.covered.push((copy, real));
        Ok(mappings)
    }

    /// A `smaps` with no more than CRIU and we read, where the flags of mappings can be had without the kernel's.
    fn short_smaps(&self, pid: i32, proc: &Path) -> Option<String> {
        let flags = self.criu.vm_flags()?;
        let short = || {
            let told = flags.of(Pid::from_raw(pid).ok_or(ErrorKind::InvalidInput)?)?;
            let maps = fs::read(proc.join("maps"))?;
            let short = smaps::from_maps(&String::from_utf8_lossy(&maps), &told);
            short.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "maps has other mappings"))
        };
        short().inspect_err(|error| tracing::info!(pid, %error, "flags of mappings are read from smaps")).ok()
    }

    /// Has process `pid` have the descriptors of `shown` and no others for CRIU: each a number and what it is a link to.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn cover_descriptors(&mut self, pid: i32, shown: &[(u32, PathBuf)]) -> Result<(), MaskError> {
        let directory = self.dir.join(format!("{pid}.fd"));
        descriptors::make_directory(&directory, shown).map_err(at(&directory))?;
        self.covered.push((directory, PathBuf::from(format!("/proc/{pid}/fd"))));
        self.hides_descriptors = true;
        Ok(())
    }

    pub(crate) fn view(&self) -> Result<WorkerView, MaskError> {
        let mut view = self.bare_view()?;
        view.binds.extend(self.covered.iter().cloned());
        view.hides_descriptors = self.hides_descriptors;
        Ok(view)
    }

    /// With nothing covered but what is CRIU's own.
    fn bare_view(&self) -> Result<WorkerView, MaskError> {
        let cache = Path::new(RUN_DIR).join(CACHE_NAME);
        // Something must be there to be covered. CRIU takes an empty cache for a stale one and makes it anew.
        match File::options().write(true).create_new(true).open(&cache) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(at(&cache)(error)),
            _ => {}
        }
        let binds = vec![(self.cache.clone(), cache)];
        Ok(WorkerView { binds, over_own_pagemap: Some(self.hole.clone()), hides_descriptors: false })
    }

    /// `criu check` in one process, unlike the RPC's: it leaves the cache that a masked dump would find out itself.
    fn make_cache(&self, criu: &Criu, run: PathBuf) -> Result<(), MaskError> {
        let log = self.dir.join("check.log");
        let mut cmd = Command::new(criu.program());
        cmd.arg("check").arg("-o").arg(&log).arg("-v2").current_dir(&self.dir);
        cmd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let binds = [(run, PathBuf::from(RUN_DIR))];
        let status = spawn_in_private_mounts(cmd, &binds, Some(&self.hole))
            .and_then(|mut child| child.wait())
            .map_err(at(criu.program()))?;
        if status.success() && self.cache.is_file() {
            Ok(())
        } else {
            Err(MaskError::Unfit(Cause::of_log(&log, None)))
        }
    }
}

impl Drop for PagemapMask {
    fn drop(&mut self) {
        self.waiting = None;
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot remove the masked pagemaps");
        }
    }
}

/// Makes a directory for a mask in `parent`, locked, after removing those of processes that died.
fn make_dir(parent: &Path) -> Result<(PathBuf, File), MaskError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Held while a directory is there that is not locked yet: nobody sweeps it meanwhile.
    let whole = File::open(parent).map_err(at(parent))?;
    whole.lock().map_err(at(parent))?;
    for entry in fs::read_dir(parent).map_err(at(parent))? {
        let entry = entry.map_err(at(parent))?;
        if entry.file_name().as_encoded_bytes().starts_with(DIR_PREFIX.as_bytes()) {
            let dir = entry.path();
            // One that is in use is locked; one that cannot be removed does not keep us from our own.
            if File::open(&dir).is_ok_and(|lock| lock.try_lock().is_ok()) {
                let _ = fs::remove_dir_all(&dir);
            }
        }
    }
    let name = format!("{DIR_PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let dir = parent.join(name);
    fs::DirBuilder::new().mode(0o700).create(&dir).map_err(at(&dir))?;
    let lock = File::open(&dir).map_err(at(&dir))?;
    lock.lock().map_err(at(&dir))?;
    Ok((dir, lock))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> MaskError {
    let path = path.to_owned();
    move |source| MaskError::Io { path, source }
}

fn sparse(path: &Path) -> Result<File, MaskError> {
    let file = File::create_new(path).map_err(at(path))?;
    file.set_len(PAGEMAP_SIZE).map_err(at(path))?;
    Ok(file)
}

/// The address ranges of a `/proc/<pid>/maps`, ascending.
fn read_maps(path: &Path) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    for line in BufReader::new(File::open(path)?).split(b'\n') {
        let line = line?;
        let range =
            line.split(|byte| *byte == b' ').next().and_then(parse_range).ok_or(ErrorKind::InvalidData)?;
        if range.start < USER_END {
            ranges.push(range);
        }
    }
    Ok(ranges)
}

fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

fn parse_range(text: &[u8]) -> Option<Range<u64>> {
    let (start, end) = std::str::from_utf8(text).ok()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    (start < end).then_some(start..end)
}

/// What of `all` (ascending) is not in `hidden` (in any order).
fn subtract(all: &[Range<u64>], hidden: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut hidden: Vec<_> = hidden.iter().filter(|range| range.start < range.end).collect();
    hidden.sort_by_key(|range| range.start);
    let mut shown = Vec::new();
    let mut first = 0;
    for range in all {
        // Both lists ascend, so those that end before this range matter to none that follows. They may overlap one
        // another; then this stops early, which costs time only.
        while hidden.get(first).is_some_and(|hide| hide.end <= range.start) {
            first += 1;
        }
        let mut at = range.start;
        for hide in hidden.iter().skip(first).take_while(|hide| hide.start < range.end) {
            if hide.start > at {
                shown.push(at..hide.start);
            }
            at = at.max(hide.end);
        }
        if at < range.end {
            shown.push(at..range.end);
        }
    }
    shown
}

/// "Pte is a guard region" of `Documentation/admin-guide/mm/pagemap.rst` (Linux 6.15 and later), in an entry's last
/// byte.
const GUARD_IN_LAST_BYTE: u8 = 1 << (58 - 56);

/// Copies the pagemap entries of the addresses in `shown`, leaving holes where there is nothing. Guards are nothing:
/// their entries say that something is in swap, and who believes it fails to read it.
fn copy_entries(from: &File, to: &File, shown: Range<u64>) -> io::Result<()> {
    let entries = shown.start / PAGE_SIZE * ENTRY..shown.end.div_ceil(PAGE_SIZE) * ENTRY;
    let mut buffer = vec![0; PIECE];
    for offset in entries.clone().step_by(PIECE) {
        // At most PIECE.
        let length = (entries.end - offset).min(PIECE as u64) as usize;
        let piece = buffer.get_mut(..length).unwrap_or_default();
        from.read_exact_at(piece, offset)?;
        let (entries, _) = piece.as_chunks_mut::<{ ENTRY as usize }>();
        let is_guard = |entry: &[u8]| entry.last().is_some_and(|byte| byte & GUARD_IN_LAST_BYTE != 0);
        entries.iter_mut().filter(|entry| is_guard(*entry)).for_each(|entry| entry.fill(0));
        if piece.iter().any(|byte| *byte != 0) {
            to.write_all_at(piece, offset)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "mask_tests.rs"]
mod tests;
