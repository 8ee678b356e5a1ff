//! Queues of System V messages.

use std::io;

use super::{Permissions, Row, next_id, outcome, table};

/// A queue, and the messages in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its id.
    pub id: i32,
    /// Its key.
    pub key: i32,
    /// Who may use it.
    pub permissions: Permissions,
    /// How many bytes it has room for.
    pub room: u64,
    /// In their order.
    pub messages: Vec<Message>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// By which it can be asked for.
    pub kind: i64,
    /// What it says.
    pub text: Vec<u8>,
}

impl Queue {
    fn of(row: &Row) -> io::Result<Self> {
        let (id, bytes, count) = (row.number(1)?, row.number(3)?, row.number::<i64>(4)?);
        let messages = (0..count).map(|index| peek(id, index, bytes)).collect::<io::Result<_>>()?;
        let room = about(id)?.msg_qbytes;
        Ok(Self { id, key: row.number(0)?, permissions: row.permissions(2, 7, 8)?, room, messages })
    }
}

/// All queues of the calling thread's namespace, whose messages stay where they are.
///
/// # Errors
/// When the kernel does not tell; without `CONFIG_CHECKPOINT_RESTORE` it does not.
pub fn queues() -> io::Result<Vec<Queue>> {
    table("msg")?.iter().map(Queue::of).collect()
}

fn about(id: i32) -> io::Result<libc::msqid_ds> {
    let mut about = std::mem::MaybeUninit::<libc::msqid_ds>::zeroed();
    // SAFETY: IPC_STAT writes one `msqid_ds`, for which there is room.
    outcome(unsafe { libc::msgctl(id, libc::IPC_STAT, about.as_mut_ptr()) })?;
    // SAFETY: it was written to, and zeros are one too.
    Ok(unsafe { about.assume_init() })
}

/// The message with that index, which has no more than so many bytes.
fn peek(id: i32, index: i64, bytes: usize) -> io::Result<Message> {
    let mut buffer = vec![0; size_of::<i64>() + bytes];
    let flags = libc::IPC_NOWAIT | libc::MSG_COPY;
    // SAFETY: at most a number and `bytes` bytes are written, for which there is room.
    let length = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), bytes, index, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let (kind, text) = buffer.split_first_chunk().ok_or(io::ErrorKind::InvalidData)?;
    let text = text.get(..length).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Message { kind: i64::from_ne_bytes(*kind), text: text.to_vec() })
}

/// Makes a queue in the calling thread's namespace.
///
/// # Errors
/// When there is one of that id or key, or its messages find no room. A part of what it is to be may be there then.
pub fn make_queue(queue: &Queue) -> io::Result<()> {
    next_id("msg", queue.id)?;
    // SAFETY: plain numbers are passed.
    let made = outcome(unsafe { libc::msgget(queue.key, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) })?;
    if made != queue.id {
        return Err(io::Error::other(format!("the kernel has made queue {made} instead of {}", queue.id)));
    }
    let text: usize = queue.messages.iter().map(|message| message.text.len()).sum();
    let mut about = about(made)?;
    // They may be more than there is room for, if that was made less.
    about.msg_qbytes = queue.room.max(text as u64).max(queue.messages.len() as u64);
    set(made, &mut about)?;
    for Message { kind, text } in &queue.messages {
        let buffer = [&kind.to_ne_bytes()[..], text].concat();
        // SAFETY: a number and as many bytes as is said are read.
        outcome(unsafe { libc::msgsnd(made, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) })?;
    }
    about.msg_qbytes = queue.room;
    queue.permissions.put_into(&mut about.msg_perm);
    set(made, &mut about)
}

/// Removes a queue with its messages.
///
/// # Errors
/// When there is none.
pub fn remove_queue(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no memory.
    outcome(unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

fn set(id: i32, about: &mut libc::msqid_ds) -> io::Result<()> {
    // SAFETY: IPC_SET reads one `msqid_ds`.
    outcome(unsafe { libc::msgctl(id, libc::IPC_SET, about) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::IpcNamespace;

    #[test]
    fn a_queue_that_is_made_is_what_was_asked_for_and_reading_it_changes_nothing() {
        let permissions = Permissions { mode: 0o606, uid: 5, gid: 6 };
        let message = |kind, text: &[u8]| Message { kind, text: text.to_vec() };
        let messages = vec![message(9, b"first"), message(2, b""), message(i64::MAX, &[7; 3000])];
        let full = Queue { id: 98_307, key: -5, permissions, room: 100, messages };
        let empty = Queue { id: 1, key: 0, permissions, room: 16_384, messages: Vec::new() };
        let queues_there = [empty, full];
        let namespace = IpcNamespace::create().unwrap();
        let found = namespace.run(|| {
            queues_there.iter().for_each(|queue| make_queue(queue).unwrap());
            assert_eq!(queues().unwrap(), queues_there);
            let found = queues().unwrap();
            queues_there.iter().for_each(|queue| remove_queue(queue.id).unwrap());
            assert_eq!(queues().unwrap(), []);
            found
        });
        assert_eq!(found.unwrap(), queues_there);
    }
}
