//! Who watches a container's writes. Two that do so at once would each find only a part of what is written: the
//! protection of pages is one for both. So a look for a plan gives way to a migration, and never begins beside one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::lease::Lease;

/// Another plan looks at the container.
pub(crate) const WATCHED: FaultCode = FaultCode::known("already_watched");

/// Those who watch on this host.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    watchers: Mutex<Vec<Watcher>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Watcher {
    id: u64,
    /// The container, by the file that lists its processes.
    procs: String,
    who: Who,
}

#[derive(Debug)]
enum Who {
    Migration(MigrationId),
    Look { is_over: bool },
}

/// Somebody watches until this is dropped, and after what was tracked.
#[derive(Debug)]
pub(crate) struct Watch {
    watched: Arc<Watched>,
    id: u64,
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, Vec<Watcher>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: &Arc<Self>, watchers: &mut Vec<Watcher>, procs: &str, who: Who) -> Watch {
        let id = watchers.iter().map(|watcher| watcher.id).max().unwrap_or(0).saturating_add(1);
        watchers.push(Watcher { id, procs: procs.to_owned(), who });
        Watch { watched: self.clone(), id }
    }

    /// A migration watches from now on. Blocks until looks at the container, which are told to end, have ended.
    pub(crate) fn migrate(self: &Arc<Self>, procs: &str, migration: MigrationId) -> Watch {
        let mut watchers = self.lock();
        loop {
            let mut looks =
                watchers.iter_mut().filter(|watcher| watcher.procs == procs).filter_map(|watcher| {
                    match &mut watcher.who {
                        Who::Look { is_over } => Some(is_over),
                        Who::Migration(_) => None,
                    }
                });
            let Some(is_over) = looks.next() else { break };
            *is_over = true;
            self.changed.notify_all();
            watchers = self.changed.wait(watchers).unwrap_or_else(PoisonError::into_inner);
        }
        self.admit(&mut watchers, procs, Who::Migration(migration))
    }

    /// A plan looks from now on.
    ///
    /// # Errors
    /// When somebody watches the container already.
    pub(crate) fn look(self: &Arc<Self>, procs: &str) -> Result<Watch, Fault> {
        let mut watchers = self.lock();
        let found = watchers.iter().find(|watcher| watcher.procs == procs);
        match found.map(|watcher| &watcher.who) {
            Some(Who::Migration(migration)) => Err(Lease { migration: migration.clone() }.held()),
            Some(Who::Look { .. }) => Err(Fault::new(WATCHED, "another plan looks at the container")
                .remedy("try again when it is done")),
            None => Ok(self.admit(&mut watchers, procs, Who::Look { is_over: false })),
        }
    }
}

impl Watch {
    /// Waits for some time.
    ///
    /// # Errors
    /// When the look has to end, since a migration begins.
    pub(crate) fn wait(&self, time: Duration) -> Result<(), Fault> {
        let goes_on = |watchers: &mut Vec<Watcher>| {
            let own = watchers.iter().find(|watcher| watcher.id == self.id);
            !matches!(own, Some(Watcher { who: Who::Look { is_over: true }, .. }))
        };
        let waited = self.watched.changed.wait_timeout_while(self.watched.lock(), time, goes_on);
        match waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            true => Ok(()),
            false => Err(Fault::new(code::LEASE_HELD, "a migration of the container has begun")
                .remedy("wait for it: see `haul ls`")),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watched.lock().retain(|watcher| watcher.id != self.id);
        self.watched.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "/cgroup/web/cgroup.procs";
    const NEVER: Duration = Duration::from_secs(600);

    #[test]
    fn a_look_is_refused_beside_a_migration_or_another_look_and_goes_on_beside_other_containers() {
        let watched = Arc::<Watched>::default();
        let migration = MigrationId::generate();
        let moving = watched.migrate(WEB, migration.clone());
        let refused = watched.look(WEB).unwrap_err();
        assert_eq!(refused.code, code::LEASE_HELD);
        assert!(refused.message.contains(migration.as_str()));
        let other = watched.look("/cgroup/db/cgroup.procs").unwrap();
        assert!(other.wait(Duration::from_millis(1)).is_ok());
        drop(moving);
        let look = watched.look(WEB).unwrap();
        assert_eq!(watched.look(WEB).unwrap_err().code, WATCHED);
        drop(look);
        assert!(watched.look(WEB).is_ok());
    }

    #[test]
    fn a_migration_ends_a_look_and_waits_until_it_has_ended() {
        let watched = Arc::<Watched>::default();
        let look = watched.look(WEB).unwrap();
        let looking = std::thread::spawn(move || (look.wait(NEVER), look));
        let second = watched.clone();
        let moving = std::thread::spawn(move || second.migrate(WEB, MigrationId::generate()));
        let (ended, look) = looking.join().unwrap();
        assert_eq!(ended.unwrap_err().code, code::LEASE_HELD);
        assert!(!moving.is_finished(), "what the look tracked is tracked still");
        drop(look);
        let moving = moving.join().unwrap();
        assert_eq!(watched.look(WEB).unwrap_err().code, code::LEASE_HELD);
        drop(moving);
    }
}
