//! Sets of System V semaphores.

use std::io;

use super::{Permissions, Row, next_id, outcome, table};

/// No set has more (`sem_check_semmsl` of the kernel's `ipc/ipc_sysctl.c`).
const MOST: usize = 1 << 16;

/// A set of semaphores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Semaphores {
    /// Its id.
    pub id: i32,
    /// Its key.
    pub key: i32,
    /// Who may use it.
    pub permissions: Permissions,
    /// What each of them is at.
    pub values: Vec<u16>,
}

impl Semaphores {
    fn of(row: &Row) -> io::Result<Self> {
        let (id, count) = (row.number(1)?, row.number(3)?);
        // By now it might be another set.
        let mut values = vec![0_u16; MOST];
        // SAFETY: GETALL writes as many numbers as the set has, for which there is room.
        outcome(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
        values.truncate(count);
        Ok(Self { id, key: row.number(0)?, permissions: row.permissions(2, 4, 5)?, values })
    }
}

/// All sets of the calling thread's namespace.
///
/// # Errors
/// When the kernel does not tell.
pub fn semaphores() -> io::Result<Vec<Semaphores>> {
    table("sem")?.iter().map(Semaphores::of).collect()
}

/// Makes a set in the calling thread's namespace.
///
/// # Errors
/// When there is one of that id or key, or it is larger than may be. A part of what it is to be may be there then.
pub fn make_semaphores(set: &Semaphores) -> io::Result<()> {
    next_id("sem", set.id)?;
    let count = set.values.len().try_into().map_err(io::Error::other)?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;
    // SAFETY: plain numbers are passed.
    let made = outcome(unsafe { libc::semget(set.key, count, flags) })?;
    if made != set.id {
        return Err(io::Error::other(format!("the kernel has made set {made} instead of {}", set.id)));
    }
    // SAFETY: SETALL reads as many numbers as the set has, which there are.
    outcome(unsafe { libc::semctl(made, 0, libc::SETALL, set.values.as_ptr()) })?;
    let mut about = std::mem::MaybeUninit::<libc::semid_ds>::zeroed();
    // SAFETY: IPC_STAT writes one `semid_ds`, for which there is room.
    outcome(unsafe { libc::semctl(made, 0, libc::IPC_STAT, about.as_mut_ptr()) })?;
    // SAFETY: it was written to, and zeros are one too.
    let mut about = unsafe { about.assume_init() };
    set.permissions.put_into(&mut about.sem_perm);
    // SAFETY: IPC_SET reads one `semid_ds`.
    outcome(unsafe { libc::semctl(made, 0, libc::IPC_SET, &raw mut about) }).map(drop)
}

/// Removes a set.
///
/// # Errors
/// When there is none.
pub fn remove_semaphores(id: i32) -> io::Result<()> {
    // SAFETY: plain numbers are passed.
    outcome(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::IpcNamespace;

    #[test]
    fn a_set_that_is_made_is_what_was_asked_for() {
        let permissions = Permissions { mode: 0o620, uid: 3, gid: 4 };
        let sets = [(32_769, 0x77, vec![5, 0, 32_767]), (32_771, 0, vec![1])]
            .map(|(id, key, values)| Semaphores { id, key, permissions, values });
        let namespace = IpcNamespace::create().unwrap();
        let found = namespace.run(|| {
            sets.iter().for_each(|set| make_semaphores(set).unwrap());
            assert!(make_semaphores(&sets[0]).is_err());
            let found = semaphores().unwrap();
            sets.iter().for_each(|set| remove_semaphores(set.id).unwrap());
            assert_eq!(semaphores().unwrap(), []);
            found
        });
        assert_eq!(found.unwrap(), sets);
    }
}
