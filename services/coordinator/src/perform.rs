//! One effect, performed: the request is made out of the record, the answer becomes a [`Success`].

use std::time::Duration;

use futures_util::future::join_all;
use haulage_migration::pace::Pacing;
use haulage_migration::{Effect, Migration, Phase, Success, allowance, forecast, round_within};
use haulage_protocol::checkpointer::{
    Commit, Confirm, Dump, Freeze, Inspect, Inspected, Locate, Located, Network, PrepareFreeze, RollBack,
    SourceRoot, SourceTmpfs, Throttle, Unthrottle,
};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{ContainerId, HostId, Round, Step};
use haulage_protocol::page_shipper::{
    ClosePages, FinalRound, OpenPages, PagesOpened, RunRound, StartTracking,
};
use haulage_protocol::restorer::{
    Adopt, Check, Create, Created, Prepare, Restore, TakePackets, Undo, Verify,
};
use haulage_protocol::rpc::{Command, Rpc, Service};
use haulage_protocol::syncer::{
    CloseFiles, FilesOpened, OpenFiles, PersistFiles, PullImage, PushImage, SyncFiles, SyncRoot, TargetRoot,
};
use haulage_protocol::version::Version;
use haulage_service::now;

use crate::Coordinator;

/// How long a service may be silent before an effect counts as failed.
const SILENCE: Duration = Duration::from_secs(10);

/// An effect was asked for before the facts that it needs: a defect of the machine, never of a peer.
fn missing(what: &str) -> Fault {
    Fault::new(code::INTERNAL, format!("the record lacks {what}"))
}

struct Ask<'a> {
    coordinator: &'a Coordinator,
    record: &'a Migration,
    step: Step,
}

/// Performs `effect` under number `step`. Safe to repeat.
pub(crate) async fn perform(
    coordinator: &Coordinator,
    record: &Migration,
    step: Step,
    effect: Effect,
) -> Result<Success, Fault> {
    let ask = Ask { coordinator, record, step };
    let us = &record.job.id;
    match effect {
        Effect::Locate => ask.locate().await,
        Effect::Inspect => {
            let container = record.job.container.clone();
            let shared_binds = record.job.options.shared_binds.clone();
            let inspected = ask.source(Inspect { container, shared_binds }).await?;
            Ok(Success::Inspected(Box::new(inspected)))
        }
        Effect::Check => ask.check().await.map(Success::Checked),
        Effect::AcquireLease => {
            coordinator.leases.acquire(ask.container()?, us).await?;
            Ok(Success::Unit)
        }
        Effect::ConfirmLease => {
            coordinator.leases.confirm(ask.container()?, us).await?;
            Ok(Success::Unit)
        }
        Effect::ReleaseLease => {
            coordinator.leases.release(ask.container()?, us).await?;
            Ok(Success::Unit)
        }
        Effect::PushImage => {
            ask.source(PushImage { image: ask.inspected()?.image.clone() }).await.map(Success::Pushed)
        }
        Effect::PullImage => {
            ask.target(PullImage { image: ask.inspected()?.image.clone() }).await.map(Success::Pulled)
        }
        Effect::Create => {
            let Inspected { spec, memory, images, .. } = ask.inspected()?;
            let create = Create { spec: spec.clone(), memory: *memory, images: *images };
            ask.target(create).await.map(Success::Created)
        }
        Effect::OpenPages => {
            let open = OpenPages { token: record.token.clone(), memory: ask.inspected()?.memory };
            ask.target(open).await.map(Success::PagesOpened)
        }
        Effect::OpenFiles => {
            let tmpfs = ask.inspected()?.tmpfs.clone();
            let open = OpenFiles { token: record.token.clone(), roots: ask.created()?.roots.clone(), tmpfs };
            ask.target(open).await.map(Success::FilesOpened)
        }
        Effect::SyncFiles => ask.sync(ask.roots()?, false).await,
        Effect::SyncTmpfs => ask.sync(ask.tmpfs_roots()?, false).await,
        Effect::SyncFrozen => ask.sync(ask.roots()?, true).await,
        Effect::ShipImages => {
            let dumped = record.facts.dumped.as_ref().ok_or_else(|| missing("the dump"))?;
            let images = SourceRoot { root: "images".to_owned(), path: dumped.images.clone() };
            ask.sync(ask.placed(&[images])?, true).await
        }
        Effect::StartTracking => {
            let start = StartTracking {
                cgroup_procs: ask.inspected()?.cgroup_procs.clone(),
                address: ask.pages()?.address.clone(),
                token: record.token.clone(),
                transfer: record.job.options.transfer,
                memory: ask.inspected()?.memory,
                policy: record.job.options.policy,
            };
            ask.source(start).await.map(Success::Tracking)
        }
        Effect::RunRound(round) => ask.source(ask.round(round)).await.map(Success::Round),
        Effect::Throttle(keep) => {
            ask.source(Throttle { container: ask.container()?.clone(), keep }).await.map(|_| Success::Unit)
        }
        Effect::Unthrottle => {
            ask.source(Unthrottle { container: ask.container()?.clone() }).await.map(|_| Success::Unit)
        }
        Effect::PrepareFreeze => {
            ask.source(PrepareFreeze { freeze: ask.freeze()? }).await.map(|_| Success::Unit)
        }
        Effect::Freeze => ask.source(ask.freeze()?).await.map(Success::Frozen),
        Effect::Prepare => {
            let container = ask.created()?.container.clone();
            let (store, descriptors) = (ask.pages()?.store.clone(), ask.inspected()?.descriptors.clone());
            ask.target(Prepare { container, store, descriptors }).await.map(Success::Prepared)
        }
        Effect::TakePackets => {
            ask.target(TakePackets { container: ask.created()?.container.clone() }).await?;
            Ok(Success::Unit)
        }
        Effect::Dump => {
            let network = network(record);
            let tmpfs = ask.tmpfs()?.map(|(tmpfs, _)| tmpfs.clone()).collect();
            ask.source(Dump { container: ask.container()?.clone(), network, tmpfs })
                .await
                .map(Success::Dumped)
        }
        Effect::FinalRound => {
            ask.source(FinalRound { post_copy: record.is_post_copy() }).await.map(Success::Final)
        }
        Effect::Restore => {
            let container = ask.created()?.container.clone();
            let (store, tmpfs) = (ask.pages()?.store.clone(), ask.files()?.tmpfs.clone());
            ask.target(Restore { container, store, tmpfs }).await.map(Success::Restored)
        }
        Effect::Verify => {
            ask.target(Verify { container: ask.created()?.container.clone() }).await.map(Success::Verified)
        }
        Effect::ConfirmHold => ask.source(Confirm {}).await.map(|_| Success::Unit),
        Effect::PersistFiles => {
            ask.target(PersistFiles { roots: ask.created()?.roots.clone() }).await.map(|_| Success::Unit)
        }
        Effect::CommitSource => {
            ask.source(Commit { container: ask.container()?.clone() }).await.map(|_| Success::Unit)
        }
        Effect::Adopt => {
            ask.target(Adopt { container: ask.created()?.container.clone() }).await.map(|_| Success::Unit)
        }
        Effect::UndoTarget => ask.target(Undo {}).await.map(|_| Success::Unit),
        Effect::RollBackSource => {
            ask.source(RollBack { container: ask.container()?.clone() }).await.map(Success::RolledBack)
        }
        Effect::CloseSourcePages => ask.source(ClosePages {}).await.map(|_| Success::Unit),
        Effect::CloseTargetPages => ask.target(ClosePages {}).await.map(|_| Success::Unit),
        Effect::CloseSourceFiles => ask.source(CloseFiles {}).await.map(|_| Success::Unit),
        Effect::CloseTargetFiles => ask.target(CloseFiles {}).await.map(|_| Success::Unit),
    }
}

impl Ask<'_> {
    async fn host<R: Rpc>(&self, host: &HostId, body: R) -> Result<R::Reply, Fault> {
        let command = Command {
            version: Version::CURRENT,
            migration: self.record.job.id.clone(),
            epoch: self.record.epoch,
            step: self.step,
            floor: self.record.pending.keys().next().copied().unwrap_or(self.step),
            body,
        };
        self.coordinator.nats.call(host, &command, SILENCE).await
    }

    async fn source<R: Rpc>(&self, body: R) -> Result<R::Reply, Fault> {
        let host = self.record.source().ok_or_else(|| missing("the source host"))?;
        self.host(host, body).await
    }

    async fn target<R: Rpc>(&self, body: R) -> Result<R::Reply, Fault> {
        self.host(&self.record.job.to, body).await
    }

    fn round(&self, round: Round) -> RunRound {
        let (rounds, options) = (&self.record.facts.rounds, &self.record.job.options);
        let fixed = self.record.fixed().cost;
        let now = now();
        let Pacing { interval, pause } = self.record.pacing(now);
        let last = self.record.phase == Phase::Settle;
        let after_preparing = last && self.record.settled() == 0;
        RunRound {
            round,
            rate: forecast(rounds, fixed).rate,
            allowance: allowance(rounds, options, fixed),
            last,
            pause,
            interval,
            within: round_within(options, fixed, self.record.pre_copied(now), after_preparing),
        }
    }

    fn freeze(&self) -> Result<Freeze, Fault> {
        let Inspected { container, spec, .. } = self.inspected()?;
        Ok(Freeze { container: container.clone(), spec: Some(spec.clone()), network: network(self.record) })
    }

    fn inspected(&self) -> Result<&Inspected, Fault> {
        self.record.facts.inspected.as_ref().ok_or_else(|| missing("the inspection"))
    }

    fn container(&self) -> Result<&ContainerId, Fault> {
        Ok(&self.inspected()?.container)
    }

    fn created(&self) -> Result<&Created, Fault> {
        self.record.facts.created.as_ref().ok_or_else(|| missing("the container on the target"))
    }

    fn pages(&self) -> Result<&PagesOpened, Fault> {
        self.record.facts.pages.as_ref().ok_or_else(|| missing("the page store"))
    }

    fn files(&self) -> Result<&FilesOpened, Fault> {
        self.record.facts.files.as_ref().ok_or_else(|| missing("the file session"))
    }

    /// What the source has and the target has a place for.
    fn roots(&self) -> Result<Vec<SyncRoot>, Fault> {
        let mut roots = self.placed(&self.inspected()?.roots)?;
        roots.extend(self.tmpfs_roots()?);
        Ok(roots)
    }

    fn tmpfs_roots(&self) -> Result<Vec<SyncRoot>, Fault> {
        let roots = self.tmpfs()?.map(|(tmpfs, place)| SyncRoot {
            root: tmpfs.root(),
            source: tmpfs.at.clone(),
            target: place.path.clone(),
            tmpfs: Some(tmpfs.clone()),
        });
        Ok(roots.collect())
    }

    /// Every tmpfs that the target has made, as it is on the source and there.
    fn tmpfs(&self) -> Result<impl Iterator<Item = (&SourceTmpfs, &TargetRoot)>, Fault> {
        let (all, made) = (&self.inspected()?.tmpfs, &self.files()?.tmpfs);
        Ok(made
            .iter()
            .filter_map(|place| Some((all.iter().find(|tmpfs| tmpfs.root() == place.root)?, place))))
    }

    fn placed(&self, sources: &[SourceRoot]) -> Result<Vec<SyncRoot>, Fault> {
        let places = &self.created()?.roots;
        let placed = sources.iter().filter_map(|SourceRoot { root, path }| {
            let place = places.iter().find(|place| place.root == *root)?;
            Some(SyncRoot {
                root: root.clone(),
                source: path.clone(),
                target: place.path.clone(),
                tmpfs: None,
            })
        });
        Ok(placed.collect())
    }

    async fn sync(&self, roots: Vec<SyncRoot>, frozen: bool) -> Result<Success, Fault> {
        let later = self.record.facts.frozen.iter().flat_map(|frozen| &frozen.mapped_writable);
        let mapped = self.inspected()?.mapped_writable.iter().chain(later);
        let forced = mapped.collect::<std::collections::BTreeSet<_>>().into_iter().cloned().collect();
        let address = self.files()?.address.clone();
        let bandwidth = self.record.job.options.transfer.bandwidth;
        let sync = SyncFiles { address, token: self.record.token.clone(), roots, frozen, forced, bandwidth };
        self.source(sync).await.map(Success::Synced)
    }

    async fn check(&self) -> Result<haulage_protocol::restorer::Checked, Fault> {
        self.target(Check::from(self.inspected()?)).await
    }

    /// Finds the host, and with it the container's full id.
    async fn locate(&self) -> Result<Success, Fault> {
        let (job, registry) = (&self.record.job, &self.coordinator.registry);
        registry.require(&job.to).await?;
        if job.from.as_ref() == Some(&job.to) {
            return Err(same_host(&job.to));
        }
        let candidates = match &job.from {
            Some(from) => {
                registry.require(from).await?;
                vec![from.clone()]
            }
            None => {
                let hosts = registry.hosts().await?.into_iter();
                hosts.filter(|(_, has)| has.contains(&Service::Checkpointer)).map(|(host, _)| host).collect()
            }
        };
        let asked =
            candidates.iter().map(|host| self.host(host, Locate { container: job.container.clone() }));
        let mut found: Vec<(HostId, Located)> = Vec::new();
        let mut silent = Vec::new();
        for (host, answer) in candidates.iter().zip(join_all(asked).await) {
            match answer {
                Ok(located) if located.container.is_some() => found.push((host.clone(), located)),
                Ok(_) => {}
                Err(fault) => silent.push((host, fault)),
            }
        }
        if found.len() > 1 {
            // The target's own container of that name is not the one that is to go there.
            found.retain(|(host, _)| *host != job.to);
        }
        match <[_; 1]>::try_from(found) {
            Ok([(host, _)]) if host == job.to => Err(same_host(&host)),
            Ok([(host, located)]) => {
                let fixed = self.coordinator.costs.known(&host, &job.to).await;
                Ok(Success::Located(host, located, fixed))
            }
            Err(found) if found.is_empty() => {
                let message = format!("no host has a container {:?}", job.container);
                let mut fault = Fault::new(code::UNKNOWN_CONTAINER, message)
                    .remedy("see `docker ps` on the hosts, and `haul hosts` for those that were asked");
                for (host, why) in silent {
                    fault.causes.push(format!("host {host} could not be asked: {why}"));
                }
                Err(fault)
            }
            Err(found) => {
                let hosts: Vec<&str> = found.iter().map(|(host, _)| host.as_str()).collect();
                let message =
                    format!("several hosts have a container {:?}: {}", job.container, hosts.join(", "));
                Err(Fault::new(code::AMBIGUOUS_CONTAINER, message).remedy("say which with --from HOST"))
            }
        }
    }
}

/// How the container's network comes into being, as far as that is known.
fn network(record: &Migration) -> Network {
    record.facts.prepared.as_ref().map(|prepared| prepared.network).unwrap_or_default()
}

fn same_host(host: &HostId) -> Fault {
    Fault::new(code::SAME_HOST, format!("the container is on host {host} already"))
        .remedy("name another host with --to; see `haul hosts`")
}
