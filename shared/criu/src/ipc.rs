//! The System V objects of a container whose IPC namespace CRIU is not told of, in a file beside the images.
//!
//! CRIU carries shared memory with the namespace that it is in, and reads and writes all of it while the container stands
//! still. So where there is much of it CRIU runs inside that namespace, here and in the restore, and takes it for a part of
//! the world. What is in the namespace is written down here, and made again in the one that the restored container gets:
//! the segments themselves are in there already, with what is in them.
//!
//! ```text
//!   at the freeze: IpcState::of ── ipc.json ──▶ (with the images) ──▶ provide: semaphores, queues, settings
//!                                                                     CRIU: a segment's memory as a file, in its place
//!                                                                     before anything runs: shmat in its place, finish
//! ```
//! CRIU could attach no segment that it has not made itself (`open_shmem_sysv` of `criu/shmem.c`), so whoever restores has
//! the processes do it. As with CRIU, an object belongs to root as its creator afterwards, times of its use are not kept, nor
//! is what a process has noted to be undone when it ends (`SEM_UNDO`).

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use haulage_sys::attach::{Attachment, Part};
use haulage_sys::ipc::{self, IpcNamespace, Load, Message, Permissions, Queue, Segment, Semaphores};
use serde::{Deserialize, Serialize};

use crate::smaps;

/// The name of the file, which is not there where CRIU carries the namespace.
const NAME: &str = "ipc.json";
/// The version of its format; another one is refused, not guessed at.
const FORMAT: u32 = 1;
/// The longest file that is read, in bytes.
const MAX_SIZE: u64 = 256 << 20;
/// What has settings of a namespace, below [`SETTINGS_OF`]; those that CRIU carries too (`ipc_sysctl_req` of `criu/ipc_ns.c`).
const SETTINGS: [&str; 12] = [
    "kernel/sem",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/shmmax",
    "kernel/shmall",
    "kernel/shmmni",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];
const SETTINGS_OF: &str = "/proc/sys";
/// The kernel ends segments that nobody has attached.
const ENDS_UNATTACHED: &str = "kernel/shm_rmid_forced";
/// So much is written down, while all stand still; containers that use messages and semaphores at all have a fraction of it.
const MOST: Load = Load { semaphores: 65_536, messages: 16_384, bytes: 1 << 20 };
/// The most bytes of a new queue.
const QUEUE_ROOM: &str = "kernel/msgmnb";

/// What is in an IPC namespace, and who has what of it attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcState {
    format: u32,
    /// Of the kernel's, by their names.
    settings: Vec<(String, String)>,
    segments: Vec<Kept<SegmentIs>>,
    semaphores: Vec<Kept<Vec<u16>>>,
    queues: Vec<Kept<QueueIs>>,
    /// In any order.
    pub attached: Vec<Attached>,
}

/// An object with what all of them have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept<T> {
    id: i32,
    key: i32,
    mode: u32,
    uid: u32,
    gid: u32,
    is: T,
}

impl<T> Kept<T> {
    fn new(id: i32, key: i32, permissions: Permissions, is: T) -> Self {
        let Permissions { mode, uid, gid } = permissions;
        Self { id, key, mode, uid, gid, is }
    }

    fn permissions(&self) -> Permissions {
        Permissions { mode: self.mode, uid: self.uid, gid: self.gid }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct SegmentIs {
    size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct QueueIs {
    room: u64,
    messages: Vec<(i64, Vec<u8>)>,
}

/// A segment that a process has attached. Addresses are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The process, by its id in its innermost pid namespace.
    pub pid: u32,
    /// The segment.
    pub id: i32,
    /// Where its first byte is.
    pub start: u64,
    /// It was attached for reading only.
    pub read_only: bool,
    /// All of it, in address order.
    pub parts: Vec<AttachedPart>,
}

/// A part of a segment that is mapped in one way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedPart {
    /// Its first byte.
    pub start: u64,
    /// The byte after its last.
    pub end: u64,
    /// `PROT_…` bits.
    pub prot: u32,
    /// A bit for each advice of `madvise(2)` that is in force.
    pub advice: u64,
}

impl Attached {
    /// Whether its parts adjoin from its first byte on, with no advice but what mappings are told to have.
    fn is_sound(&self) -> bool {
        let mut next = self.start;
        self.parts.iter().all(|part| {
            let adjoins = part.start == next && part.start < part.end;
            next = part.end;
            adjoins && part.advice & !smaps::all_advice() == 0
        })
    }

    /// As it is to be attached again.
    pub fn attachment(&self) -> Attachment {
        let part = |part: &AttachedPart| Part {
            start: part.start,
            end: part.end,
            prot: part.prot,
            advice: part.advice,
        };
        let parts = self.parts.iter().map(part).collect();
        Attachment { id: self.id, start: self.start, read_only: self.read_only, parts }
    }
}

impl IpcState {
    /// That of a namespace, in which nobody does anything at the moment; nobody has anything attached, as far as this tells.
    ///
    /// # Errors
    /// When the kernel does not tell, or there is too much besides segments.
    pub fn of(namespace: &IpcNamespace) -> io::Result<Self> {
        namespace.run(Self::of_this_thread)?
    }

    fn of_this_thread() -> io::Result<Self> {
        let Load { semaphores, messages, bytes } = Load::of_this_thread()?;
        if semaphores > MOST.semaphores || messages > MOST.messages || bytes > MOST.bytes {
            return Err(io::Error::other("there are too many messages or semaphores"));
        }
        let mut settings = Vec::new();
        for name in SETTINGS.into_iter().chain([ENDS_UNATTACHED]) {
            match fs::read_to_string(setting(name)) {
                // Without queues of POSIX.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                value => settings.push((name.to_owned(), value?.trim().to_owned())),
            }
        }
        let segments = ipc::segments()?.into_iter().map(|is| {
            let Segment { id, key, size, permissions, .. } = is;
            Kept::new(id, key, permissions, SegmentIs { size })
        });
        let semaphores = ipc::semaphores()?.into_iter().map(|is| {
            let Semaphores { id, key, permissions, values } = is;
            Kept::new(id, key, permissions, values)
        });
        let queues = ipc::queues()?.into_iter().map(|is| {
            let Queue { id, key, permissions, room, messages } = is;
            let messages = messages.into_iter().map(|Message { kind, text }| (kind, text)).collect();
            Kept::new(id, key, permissions, QueueIs { room, messages })
        });
        let (segments, semaphores, queues) = (segments.collect(), semaphores.collect(), queues.collect());
        Ok(Self { format: FORMAT, settings, segments, semaphores, queues, attached: Vec::new() })
    }

    /// The segments: the id of each, and its length in bytes.
    pub fn segments(&self) -> impl Iterator<Item = (i32, u64)> + '_ {
        self.segments.iter().map(|segment| (segment.id, segment.is.size))
    }

    /// Why the namespace cannot be made elsewhere as it is, if it cannot.
    pub fn obstacle(&self) -> Option<&'static str> {
        let setting = |wanted| {
            let mut all = self.settings.iter();
            all.find(|(name, _)| name == wanted).and_then(|(_, value)| value.parse::<u64>().ok())
        };
        let most = setting(QUEUE_ROOM).unwrap_or(0);
        if setting(ENDS_UNATTACHED) != Some(0) {
            return Some("segments end when nobody has them attached");
        }
        if self.segments.iter().any(|segment| segment.mode & ipc::LOCKED != 0) {
            return Some("a segment is locked into memory");
        }
        if self.queues.iter().any(|queue| queue.is.room > most) {
            return Some("a queue of messages has more room than one can get");
        }
        None
    }

    /// Writes it beside the images in `images`.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write(&self, images: &Path) -> io::Result<()> {
        fs::write(images.join(NAME), serde_json::to_vec(self)?)
    }

    /// That beside the images in `images`; nothing where CRIU has carried the namespace.
    ///
    /// # Errors
    /// `InvalidData` when it is of another format or not understood.
    pub fn read(images: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(images.join(NAME)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_SIZE).read_to_end(&mut bytes)?;
        let read: Self = serde_json::from_slice(&bytes)?;
        match read.format {
            FORMAT if read.attached.iter().all(Attached::is_sound) => Ok(Some(read)),
            FORMAT => Err(io::Error::new(ErrorKind::InvalidData, "attached parts that do not adjoin")),
            format => {
                let message = format!("{NAME} has format {format}, and {FORMAT} is understood");
                Err(io::Error::new(ErrorKind::InvalidData, message))
            }
        }
    }

    /// Makes all that is in the namespace but segments, which are there, and ends what is none of it.
    ///
    /// # Errors
    /// When something cannot be made, or a segment is not there as it was. All may be tried again.
    pub fn provide(&self, namespace: &IpcNamespace) -> io::Result<()> {
        namespace.run(|| {
            self.check_segments()?;
            // Of another try.
            ipc::semaphores()?.iter().try_for_each(|set| ipc::remove_semaphores(set.id))?;
            ipc::queues()?.iter().try_for_each(|queue| ipc::remove_queue(queue.id))?;
            for (name, value) in &self.settings {
                let path = setting(name);
                let now = match fs::read_to_string(&path) {
                    // Without queues of POSIX, of which a container with any is not dumped.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    now => now?,
                };
                if SETTINGS.contains(&name.as_str()) && now.trim() != value {
                    fs::write(path, value)?;
                }
            }
            for set in &self.semaphores {
                let (permissions, values) = (set.permissions(), set.is.clone());
                ipc::make_semaphores(&Semaphores { id: set.id, key: set.key, permissions, values })?;
            }
            for queue in &self.queues {
                let messages =
                    queue.is.messages.iter().map(|(kind, text)| Message { kind: *kind, text: text.clone() });
                let (permissions, messages) = (queue.permissions(), messages.collect());
                let (id, key, room) = (queue.id, queue.key, queue.is.room);
                ipc::make_queue(&Queue { id, key, permissions, room, messages })?;
            }
            Ok(())
        })?
    }

    fn check_segments(&self) -> io::Result<()> {
        let there = ipc::segments()?;
        for segment in &self.segments {
            // One that is to be gone when it is detached has lost its key.
            let is_same = |other: &&Segment| {
                (other.id, other.size) == (segment.id, segment.is.size)
                    && (other.key == segment.key || segment.mode & ipc::DESTROYED != 0)
            };
            if !there.iter().any(|other| is_same(&other)) {
                let message = format!("the System V segment {} has not come as it is", segment.id);
                return Err(io::Error::other(message));
            }
        }
        for other in there.iter().filter(|other| self.segments.iter().all(|segment| segment.id != other.id)) {
            ipc::remove_segment(other.id)?;
        }
        Ok(())
    }

    /// Has the segments, which everybody could attach so far, be whose they are. All that have some attached have it again.
    ///
    /// # Errors
    /// When one is not there.
    pub fn finish(&self, namespace: &IpcNamespace) -> io::Result<()> {
        namespace.run(|| {
            for segment in &self.segments {
                ipc::set_segment(segment.id, segment.permissions())?;
                if segment.mode & ipc::DESTROYED != 0 {
                    ipc::remove_segment(segment.id)?;
                }
            }
            Ok(())
        })?
    }
}

fn setting(name: &str) -> PathBuf {
    Path::new(SETTINGS_OF).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permissions() -> Permissions {
        Permissions { mode: 0o640, uid: 12, gid: 13 }
    }

    /// A namespace with one of each, and the segment's memory.
    fn filled() -> (IpcNamespace, File) {
        let namespace = IpcNamespace::create().unwrap();
        let make = || {
            let memory = ipc::make_segment(32_770, 0x51, 5000)?;
            ipc::set_segment(32_770, permissions())?;
            let (permissions, values) = (permissions(), vec![3, 0]);
            ipc::make_semaphores(&Semaphores { id: 4, key: 0x52, permissions, values })?;
            let messages = vec![Message { kind: 5, text: b"said".to_vec() }];
            ipc::make_queue(&Queue { id: 32_769, key: 0x53, permissions, room: 9000, messages })?;
            fs::write(setting("kernel/msgmax"), "9001")?;
            Ok::<_, io::Error>(memory)
        };
        let memory = namespace.run(make).unwrap().unwrap();
        (namespace, memory)
    }

    #[test]
    fn what_is_in_a_namespace_is_made_again_around_segments_that_are_there() {
        let (namespace, _memory) = filled();
        let state = IpcState::of(&namespace).unwrap();
        assert_eq!(state.obstacle(), None);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(IpcState::read(dir.path()).unwrap(), None);
        state.write(dir.path()).unwrap();
        let state = IpcState::read(dir.path()).unwrap().unwrap();
        assert_eq!(state, IpcState::of(&namespace).unwrap());

        let other = IpcNamespace::create().unwrap();
        assert!(state.provide(&other).unwrap_err().to_string().contains("32770"));
        let make = || [ipc::make_segment(32_770, 0x51, 5000), ipc::make_segment(7, 0, 4096)];
        let _memory = other.run(make).unwrap().map(Result::unwrap);
        state.provide(&other).unwrap();
        state.provide(&other).unwrap();
        assert_ne!(IpcState::of(&other).unwrap(), state, "not yet");
        state.finish(&other).unwrap();
        assert_eq!(IpcState::of(&other).unwrap(), state);
    }

    #[test]
    fn what_cannot_be_made_elsewhere_is_an_obstacle() {
        let (namespace, _memory) = filled();
        namespace.run(|| fs::write(setting("kernel/msgmnb"), "8999").unwrap()).unwrap();
        assert!(IpcState::of(&namespace).unwrap().obstacle().unwrap().contains("room"));
        namespace.run(|| fs::write(setting("kernel/msgmnb"), "16384").unwrap()).unwrap();
        assert_eq!(IpcState::of(&namespace).unwrap().obstacle(), None);
        let mut state = IpcState::of(&namespace).unwrap();
        state.segments[0].mode |= ipc::LOCKED;
        assert!(state.obstacle().unwrap().contains("locked"));
        namespace.run(|| fs::write(setting(ENDS_UNATTACHED), "1").unwrap()).unwrap();
        assert!(IpcState::of(&namespace).unwrap().obstacle().unwrap().contains("attached"));
    }

    #[test]
    fn what_would_take_too_long_to_read_is_not_read() {
        let (namespace, _memory) = filled();
        let queue = |id, texts: Vec<Vec<u8>>| {
            let messages = texts.into_iter().map(|text| Message { kind: 1, text }).collect();
            Queue { id, key: 0, permissions: permissions(), room: 2 << 20, messages }
        };
        let (most, bytes) = (usize::try_from(MOST.messages).unwrap(), usize::try_from(MOST.bytes).unwrap());
        namespace.run(|| fs::write(setting(QUEUE_ROOM), "4194304")).unwrap().unwrap();
        for (id, texts) in [(2, vec![vec![7; 8192]; bytes / 8192]), (3, vec![Vec::new(); most])] {
            namespace.run(|| ipc::make_queue(&queue(id, texts))).unwrap().unwrap();
            let error = IpcState::of(&namespace).unwrap_err();
            assert!(error.to_string().contains("too many"), "{error}");
            namespace.run(|| ipc::remove_queue(id)).unwrap().unwrap();
            assert!(IpcState::of(&namespace).is_ok());
        }
    }

    #[test]
    fn attached_parts_that_cannot_be_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = IpcState::of(&IpcNamespace::create().unwrap()).unwrap();
        let part = |start, end, advice| AttachedPart { start, end, prot: 3, advice };
        let mut refuses = |parts| {
            state.attached = vec![Attached { pid: 1, id: 1, start: 0x1000, read_only: false, parts }];
            state.write(dir.path()).unwrap();
            IpcState::read(dir.path()).is_err()
        };
        assert!(!refuses(vec![part(0x1000, 0x3000, 1 << 16), part(0x3000, 0x4000, 0)]));
        assert!(refuses(vec![part(0x3000, 0x1000, 0)]), "it ends before it begins");
        assert!(refuses(vec![part(0x1000, 0x2000, 0), part(0x3000, 0x4000, 0)]), "there is a gap");
        assert!(refuses(vec![part(0x1000, 0x2000, 1 << 9)]), "MADV_REMOVE is no state");
    }

    #[test]
    fn another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = IpcState::of(&IpcNamespace::create().unwrap()).unwrap();
        state.format += 1;
        state.write(dir.path()).unwrap();
        assert_eq!(IpcState::read(dir.path()).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
