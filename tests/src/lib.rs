//! The fleet: several Docker hosts on one machine, for whole-system tests, the demo and benchmarks.
//!
//! ```text
//!              root namespace: clients, coordinators, the nats-server
//!                                  | haul-XXXX
//!          netns …-switch: bridge ───┴─── 10.64.0.0/10, one /24 for each fleet
//!              |                     |
//!      netns …-a (host-a)     netns …-b (host-b)         each with its own mount namespace
//!        dockerd, services      dockerd, services         and its own Docker engine
//!          └ containers           └ containers            network `lan`: macvlan on the bridge
//! ```
//!
//! Everything is real: Docker engines, CRIU, a NATS server with JetStream, the services as separate processes. A
//! [`Fleet`] removes all it made when dropped, and also when its process is killed (see [`mod@janitor`]).

pub mod bench;
mod cgroups;
pub mod cli;
pub mod dirtier;
pub mod fleet;
pub mod host;
pub mod image;
pub mod janitor;
pub mod leftovers;
pub mod load;
pub mod nats;
pub mod net;
pub mod process;
pub mod resp;
pub mod scenario;
pub mod services;
pub mod wait;

pub use fleet::{Fleet, FleetBuilder};
pub use host::Host;
