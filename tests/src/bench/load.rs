//! The load on what moves, of whichever kind.

use crate::bench::cell::{Cell, Workload};
use crate::bench::redis::{Clients, Timeline};
use crate::bench::writer;
use anyhow::Result;
use std::net::SocketAddr;

/// What makes the container work, and knows what it must hold.
#[derive(Debug)]
pub enum Load {
    /// The writer works by itself.
    Writer {
        /// Where it listens.
        server: SocketAddr,
        /// Pages per second.
        rate: u64,
    },
    /// A Redis has clients.
    Redis(Box<Clients>),
}

impl Load {
    /// Prepares it for a container that has just been started; a Redis is filled.
    ///
    /// # Errors
    /// The container does not answer.
    pub fn prepare(cell: &Cell, server: SocketAddr) -> Result<Self> {
        Ok(match cell.workload {
            Workload::Writer(_) => Self::Writer { server, rate: cell.write_rate() },
            Workload::Redis(redis) => {
                Self::Redis(Box::new(Clients::fill(server, redis.mebibytes, redis.load)?))
            }
        })
    }

    /// Starts it.
    ///
    /// # Errors
    /// The container does not answer.
    pub fn begin(&mut self) -> Result<()> {
        match self {
            Self::Writer { server, rate } => writer::set_rate(*server, *rate),
            Self::Redis(clients) => clients.begin(),
        }
    }

    /// Stops it, and gives what was seen and what went wrong, if anything.
    ///
    /// # Errors
    /// The container does not answer.
    pub fn end(&mut self) -> Result<(Timeline, Option<String>)> {
        match self {
            Self::Writer { server, .. } => writer::set_rate(*server, 0).map(|()| (Timeline::default(), None)),
            Self::Redis(clients) => clients.end(),
        }
    }

    /// Whether it holds connections that a move would have to carry along.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Redis(_))
    }

    /// Compares what the container holds with what it must hold; gives the number of pages or values that differ.
    ///
    /// # Errors
    /// The container does not answer.
    pub fn verify(&mut self) -> Result<u64> {
        match self {
            Self::Writer { server, .. } => writer::verify(*server),
            Self::Redis(clients) => clients.verify(),
        }
    }
}
