//! A container that has come to life here answers clients only while somebody can say that it may.
//!
//! ```text
//!  Restore          nobody is heard for 10 s           Verify, Adopt           Adopt
//! ---------> heard ---------------------------> mute -----------------> heard --------> its own
//! ```
//!
//! Between the restore and the adoption a host may be cut off. An operator may then vouch that it is dead, and the
//! source goes on. Were the copy here still talking when the host is back, two would answer for one address until
//! the sweep has removed it. So it is silenced while nobody is heard, and goes on when it is asked for again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use haulage_criu::quiet;
use haulage_engine::Engine;
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::Restorer;
use crate::failure::{self, ENGINE, STATE, blocking, fault};
use crate::notes::Notes;

/// How long nobody may be heard. Another coordinator takes a migration over within less.
const UNHEARD_FOR: Duration = Duration::from_secs(10);

/// The containers that are watched.
#[derive(Debug, Default)]
pub(crate) struct Guards(Mutex<HashMap<MigrationId, Guard>>);

#[derive(Debug)]
struct Guard {
    /// Dropped to end the watch.
    _heard: oneshot::Sender<()>,
    watch: JoinHandle<()>,
}

impl Guards {
    /// Somebody has been heard who asks for the container, whose first process is `init`.
    pub(crate) fn watch(&self, dir: PathBuf, migration: &MigrationId, init: i32) {
        let (sender, heard) = oneshot::channel();
        let watch = tokio::spawn(watch(dir, migration.clone(), init, heard));
        let guard = Guard { _heard: sender, watch };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(migration.clone(), guard);
    }

    /// Ends the watch. What it was doing at that moment is done when this returns.
    pub(crate) async fn dismiss(&self, migration: &MigrationId) {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(migration);
        let Some(Guard { _heard, watch }) = guard else { return };
        drop(_heard);
        if let Err(error) = watch.await {
            tracing::error!(%migration, %error, "the guard of a container had died");
        }
    }
}

async fn watch(dir: PathBuf, migration: MigrationId, init: i32, heard: oneshot::Receiver<()>) {
    tokio::select! {
        _ = heard => return,
        () = tokio::time::sleep(UNHEARD_FOR) => {}
    }
    match blocking(move || silence(&dir, init)).await {
        Ok(()) => tracing::warn!(%migration, init, "no coordinator is heard, the container here is silenced"),
        // It may have ended.
        Err(fault) => tracing::warn!(%migration, init, %fault, "the container here was not silenced"),
    }
}

fn silence(dir: &Path, init: i32) -> Result<(), Fault> {
    let namespace = quiet::namespace_of(init).map_err(fault(STATE))?;
    let Some(mut notes) = Notes::read(dir).map_err(fault(STATE))? else { return Ok(()) };
    if notes.arp_ignore.is_none() {
        notes.arp_ignore = Some(quiet::present(&namespace).map_err(fault(STATE))?);
        notes.write(dir).map_err(fault(STATE))?;
    }
    if quiet::is_silent(&namespace).map_err(fault(STATE))? {
        return Ok(());
    }
    let change = quiet::Change::to_silence(&namespace).map_err(fault(STATE))?;
    quiet::hush(&namespace, change).map_err(fault(STATE))
}

/// Lets the container of these notes talk again, if it was silenced. The watch must have been dismissed.
pub(crate) async fn unmute(service: &Restorer, dir: &Path, notes: &mut Notes) -> Result<(), Fault> {
    let (Some(setting), Some(id)) = (notes.arp_ignore.clone(), notes.container.clone()) else {
        return Ok(());
    };
    let state = service.docker.inspect(&id).await.map_err(|error| failure::engine(&error))?;
    let init = state.state().map_err(fault(ENGINE))?.pid;
    // What has ended needs no voice.
    if init > 0 {
        blocking(move || {
            let namespace = quiet::namespace_of(init).map_err(fault(STATE))?;
            quiet::restore(&namespace, &setting).map_err(fault(STATE))
        })
        .await?;
    }
    notes.arp_ignore = None;
    notes.store(dir).await?;
    tracing::info!(container = id, "a coordinator is heard, the container talks again");
    Ok(())
}

/// Watches what a restorer has left that ended while nobody had decided.
pub(crate) async fn watch_again(service: &Arc<Restorer>, left: Vec<(MigrationId, Notes)>) {
    for (migration, notes) in left.into_iter().filter(|(_, notes)| notes.armed) {
        let Some(id) = notes.container else { continue };
        let found = service.docker.inspect(&id).await;
        match found.map(|found| found.state()) {
            Ok(Ok(state)) if state.running && state.pid > 0 => {
                service.guards.watch(service.dir(&migration), &migration, state.pid);
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%migration, %error, "not watched"),
            Err(error) => tracing::warn!(%migration, %error, "not watched"),
        }
    }
}
