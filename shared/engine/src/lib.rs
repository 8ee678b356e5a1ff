//! Containers and their engine: what a container is, whether it can be moved, how it is made again, and where its
//! processes' state lies on the host.
//!
//! ```text
//!   engine ──capture──▶ ContainerSpec ──create_request──▶ engine          (gather, capture, recreate, compare)
//!                            │
//!                            ├─ refusals: can it be moved at all?          (portable)
//!                            └─ target_refusals: can this host take it?    (target)
//!   running container ──▶ BundleFacts: shim, runc's state, cgroups, mounts (bundle)
//!   restorer ──▶ Armed ──▶ haul-runtime                                    (armed)
//! ```
//!
//! Nothing outside this crate names bollard; nothing outside `docker`, `raw` and `answers` in it does.

pub mod armed;
pub mod bundle;
mod capture;
mod compare;
mod error;
pub mod facts;
pub mod host;
mod inspect;
mod mountinfo;
mod portable;
mod recreate;
mod refusal;
mod spec;
mod target;

#[cfg(feature = "docker")]
mod answers;
#[cfg(feature = "docker")]
mod docker;
#[cfg(feature = "docker")]
mod engine;
#[cfg(feature = "docker")]
pub mod gather;
#[cfg(feature = "docker")]
mod raw;
#[cfg(test)]
mod samples;

pub use bundle::{BundleError, BundleFacts, CgroupFacts, TmpfsFacts};
pub use compare::{Difference, Stage, compare};
pub use error::{EngineError, EngineErrorKind};
pub use host::{HostError, HostFacts};
pub use inspect::{Health, Inspect, InspectError, RunState};
pub use portable::{RunningFacts, SHARED_BINDS_LABEL, refusals};
pub use recreate::{CreateOptions, CreateRequest};
pub use refusal::{Refusal, RefusalCode};
pub use spec::{
    ContainerSpec, ImageRef, LayerSpec, MountKind, MountSpec, NetworkSpec, RestartPolicy, SPEC_VERSION,
    VolumeSpec,
};
pub use target::{HAUL_RUNTIME, Need, TargetFacts, target_refusals};

#[cfg(feature = "docker")]
pub use docker::Docker;
#[cfg(feature = "docker")]
pub use engine::{Engine, ImageStream};
#[cfg(feature = "docker")]
pub use gather::{Captured, GatherError, capture, running_facts, target_facts};
