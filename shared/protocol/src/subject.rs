//! The only place where a subject, a stream, a bucket or a key of NATS is spelled.
//!
//! | subject | who publishes | who reads |
//! | --- | --- | --- |
//! | `haul.v1.job.submit` | operators, automation | coordinators, through the work queue [`JOBS`] |
//! | `haul.v1.job.cancel.<migration>` | operators | the coordinator that owns the migration |
//! | `haul.v1.host.<host>.<service>.<verb>` | coordinators | that service of that host |
//! | `haul.v1.event.<migration>` | coordinators | anyone, through the stream [`EVENTS`] |

use std::fmt;
use std::str::FromStr;

use crate::id::{ContainerId, HostId, MigrationId};
use crate::rpc::{Rpc, Service};

/// The stream of the work queue.
pub const JOBS: &str = "HAUL_JOBS";
/// The durable consumer that all coordinators share.
pub const COORDINATORS: &str = "coordinators";
/// The stream of events.
pub const EVENTS: &str = "HAUL_EVENTS";
/// The KV bucket of migration records; key: the migration's id.
pub const MIGRATIONS: &str = "HAUL_MIGRATIONS";
/// The KV bucket of leases; key: the container's id.
pub const LEASES: &str = "HAUL_LEASES";
/// The KV bucket of migrations that are over but left something behind; key: the migration's id, value: its phase.
pub const LEFTOVERS: &str = "HAUL_LEFTOVERS";
/// The KV bucket of what switches have cost, whose entries expire; key: [`cost_key`].
pub const COSTS: &str = "HAUL_COSTS";
/// The KV bucket of hosts, whose entries expire; key: [`presence_key`].
pub const HOSTS: &str = "HAUL_HOSTS";

/// A subject of this system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A job for the work queue.
    Submit,
    /// A request to the owner of a migration.
    Cancel(MigrationId),
    /// A command to a service of a host.
    Command {
        /// The host.
        host: HostId,
        /// The service.
        service: Service,
        /// The verb (`Rpc::VERB`).
        verb: String,
    },
    /// The events of a migration.
    Event(MigrationId),
}

impl Subject {
    /// The subject on which `host` answers `R`.
    #[must_use]
    pub fn command<R: Rpc>(host: &HostId) -> Self {
        Self::Command { host: host.clone(), service: R::SERVICE, verb: R::VERB.to_owned() }
    }
}

/// Everything that the work queue takes.
pub const JOBS_FILTER: &str = "haul.v1.job.submit";
/// Everything that the stream of events takes.
pub const EVENTS_FILTER: &str = "haul.v1.event.>";

/// The prefix of all commands to one service of a host, without the verb.
#[must_use]
pub fn command_prefix(host: &HostId, service: Service) -> String {
    format!("haul.v1.host.{host}.{service}")
}

/// The key of a service's presence.
#[must_use]
pub fn presence_key(host: &HostId, service: Service) -> String {
    format!("{host}.{service}")
}

/// The key of what moves from one host to another have cost. Ids of hosts have no dots.
#[must_use]
pub fn cost_key(from: &HostId, to: &HostId) -> String {
    format!("{from}.{to}")
}

/// The key of a container's lease.
#[must_use]
pub fn lease_key(container: &ContainerId) -> String {
    container.to_string()
}

/// The key of a migration's record.
#[must_use]
pub fn migration_key(migration: &MigrationId) -> String {
    migration.to_string()
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Submit => f.write_str(JOBS_FILTER),
            Self::Cancel(migration) => write!(f, "haul.v1.job.cancel.{migration}"),
            Self::Command { host, service, verb } => write!(f, "{}.{verb}", command_prefix(host, *service)),
            Self::Event(migration) => write!(f, "haul.v1.event.{migration}"),
        }
    }
}

/// A string that is no subject of this system.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a subject of haulage")]
pub struct NotASubject(String);

impl FromStr for Subject {
    type Err = NotASubject;

    fn from_str(given: &str) -> Result<Self, NotASubject> {
        let no = || NotASubject(given.to_owned());
        let tokens: Vec<&str> = given.split('.').collect();
        match *tokens.as_slice() {
            ["haul", "v1", "job", "submit"] => Ok(Self::Submit),
            ["haul", "v1", "job", "cancel", id] => Ok(Self::Cancel(id.parse().map_err(|_| no())?)),
            ["haul", "v1", "host", host, service, verb] if !verb.is_empty() => Ok(Self::Command {
                host: host.parse().map_err(|_| no())?,
                service: Service::parse(service).ok_or_else(no)?,
                verb: verb.to_owned(),
            }),
            ["haul", "v1", "event", id] => Ok(Self::Event(id.parse().map_err(|_| no())?)),
            _ => Err(no()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpointer::Inspect;
    use crate::page_shipper::RunRound;
    use proptest::prelude::*;

    fn token() -> impl Strategy<Value = String> {
        "[A-Za-z0-9_-]{1,64}"
    }

    fn subject() -> impl Strategy<Value = Subject> {
        prop_oneof![
            Just(Subject::Submit),
            token().prop_map(|id| Subject::Cancel(id.parse().unwrap())),
            token().prop_map(|id| Subject::Event(id.parse().unwrap())),
            token().prop_map(|host| Subject::command::<Inspect>(&host.parse().unwrap())),
            token().prop_map(|host| Subject::command::<RunRound>(&host.parse().unwrap())),
        ]
    }

    proptest! {
        #[test]
        fn what_is_built_is_parsed(subject in subject()) {
            prop_assert_eq!(subject.to_string().parse::<Subject>().unwrap(), subject);
        }

        #[test]
        fn parsing_never_panics(text in ".{0,80}") {
            if let Ok(subject) = text.parse::<Subject>() {
                prop_assert_eq!(subject.to_string(), text);
            }
        }
    }

    #[test]
    fn the_streams_take_what_is_published() {
        let id = MigrationId::generate();
        assert_eq!(Subject::Submit.to_string(), JOBS_FILTER);
        assert!(Subject::Event(id).to_string().starts_with(EVENTS_FILTER.trim_end_matches('>')));
    }
}
