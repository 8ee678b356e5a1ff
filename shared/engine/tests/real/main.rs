//! The crate against a real Docker engine, which each test starts for itself. Needs root and Docker.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod engine;

mod bundle;
mod calls;
mod recreate;
