//! The checkpointer: inspects, freezes, dumps and holds a container on its source host, and ends it there or lets
//! it go on. It reads neither memory pages nor files.
//!
//! ```text
//!            Freeze              Dump                    Commit
//! (running) --------> frozen ----------> held by CRIU ----------> removed
//!     ^                 |                     |
//!     +---- RollBack ---+------- RollBack ----+
//! ```
//!
//! `PrepareFreeze` changes nothing: it has at hand what a freeze needs.
//!
//! What was changed on the host is written down before it is changed ([`notes`]), so that a checkpointer that was
//! restarted still knows how to roll back.

mod commit;
mod descriptors;
mod drift;
mod failure;
mod freeze;
mod hold;
mod inspect;
mod locks;
mod notes;
mod obstacle;
mod roll_back;
mod room;
mod segments;
mod throttle;

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use haulage_criu::mask::{DEFAULT_PARENT, PagemapMask};
use haulage_criu::swrk::Criu;
use haulage_engine::Docker;
use haulage_protocol::checkpointer::{
    Commit, Confirm, Dump, Freeze, Inspect, Locate, PrepareFreeze, RollBack, Throttle, Unthrottle,
};
use haulage_protocol::id::MigrationId;
use haulage_service::Shell;
use haulage_service::config::HostConfig;

use crate::freeze::Prepared;
use crate::hold::Session;

/// What every verb works with.
pub(crate) struct Checkpointer {
    config: HostConfig,
    docker: Docker,
    criu: Criu,
    prepared: Kept<Prepared>,
    sessions: Kept<Session>,
}

/// What is at hand of each migration.
struct Kept<T>(Mutex<HashMap<MigrationId, T>>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Kept<T> {
    /// What was there before, which may take long to drop.
    #[must_use]
    fn put(&self, migration: &MigrationId, one: T) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(migration.clone(), one)
    }

    fn take(&self, migration: &MigrationId) -> Option<T> {
        self.take_if(migration, |_| true)
    }

    fn take_if(&self, migration: &MigrationId, is_meant: impl FnOnce(&T) -> bool) -> Option<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(migration).is_some_and(is_meant).then(|| all.remove(migration)).flatten()
    }
}

/// Registers the verbs.
///
/// # Errors
/// When the engine cannot be reached, or CRIU is not installed or too old.
pub async fn serve(shell: &mut Shell) -> Result<(), Box<dyn Error + Send + Sync>> {
    let criu = Criu::find()?;
    let version = {
        let criu = criu.clone();
        tokio::task::spawn_blocking(move || criu.version()).await??
    };
    let docker = Docker::connect(shell.config.docker_socket().as_ref()).await?;
    shell.facts.insert("criu".to_owned(), version.to_string());
    // So that the first freeze does not wait for it.
    let first = criu.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = PagemapMask::prepare(&first, Path::new(DEFAULT_PARENT)) {
            tracing::warn!(%error, "criu does not work behind a mask, so no container can be frozen");
        }
    });
    let service = Arc::new(Checkpointer {
        config: shell.config.clone(),
        docker,
        criu,
        prepared: Kept::default(),
        sessions: Kept::default(),
    });
    let s = service.clone();
    tokio::task::spawn_blocking(move || throttle::end_all(&s.config)).await?;
    if let Err(error) = haulage_sys::rcu::turn_off_unused() {
        tracing::warn!(%error, "what an earlier life of this service told the kernel cannot be taken back");
    }
    let server = &mut shell.server;
    let s = service.clone();
    server.answer::<Locate, _, _>(move |_, ask| inspect::locate(s.clone(), ask)).await?;
    let s = service.clone();
    server.answer::<Inspect, _, _>(move |_, ask| inspect::inspect(s.clone(), ask)).await?;
    let s = service.clone();
    server.answer::<Throttle, _, _>(move |at, ask| throttle::throttle(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server
        .answer::<Unthrottle, _, _>(move |at, ask| throttle::unthrottle(s.clone(), at.migration, ask))
        .await?;
    let s = service.clone();
    server
        .answer::<PrepareFreeze, _, _>(move |at, ask| freeze::prepare_freeze(s.clone(), at.migration, ask))
        .await?;
    let s = service.clone();
    server.answer::<Freeze, _, _>(move |at, ask| freeze::freeze(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Dump, _, _>(move |at, ask| hold::dump(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Confirm, _, _>(move |at, _| hold::confirm(s.clone(), at.migration)).await?;
    let s = service.clone();
    server.answer::<Commit, _, _>(move |at, ask| commit::commit(s.clone(), at.migration, ask)).await?;
    server
        .answer::<RollBack, _, _>(move |at, ask| roll_back::roll_back(service.clone(), at.migration, ask))
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_been_replaced_is_not_taken_for_what_it_was() {
        let (kept, migration) = (Kept::default(), MigrationId::generate());
        assert!(kept.put(&migration, 1).is_none());
        assert_eq!(kept.put(&migration, 2), Some(1));
        assert_eq!(kept.take_if(&migration, |one| *one == 1), None);
        assert_eq!(kept.take_if(&migration, |one| *one == 2), Some(2));
        assert_eq!(kept.take(&migration), None);
    }
}
