//! How services reach one another: typed commands, tables and queues over NATS, bulk streams over TCP, buckets
//! over object stores. Nothing outside this crate names async-nats or object_store.

pub mod bucket;
pub mod control;
pub mod nats;
pub mod queue;
pub mod serve;
pub mod stream;
pub mod table;

pub use nats::{Nats, NatsError};
pub use serve::{CommandServer, Context};
pub use table::{Revision, Table, TableError};
