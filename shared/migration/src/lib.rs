//! The course of a migration, pure: state and event in, state and effects out. No IO, no clock, no randomness.
//!
//! The coordinator persists the new state *before* it performs the effects, so a coordinator that dies leaves a
//! record from which another one performs the same effects again under the same step numbers.

mod converge;
mod effect;
pub mod fixed;
mod machine;
pub mod pace;
mod phase;
pub mod plan;
mod record;
pub mod timing;
pub mod trace;

pub use converge::{
    ASSUMED_RATE, Convergence, Decision, Forecast, Slowdown, Why, aim, allowance, decide, forecast,
    predicted, round_within, settle,
};
pub use effect::{Effect, Persistence, Success};
pub use machine::{Event, IllegalEvent, Transition};
pub use phase::Phase;
pub use record::{Facts, Leftover, Migration, Outcome, Span};
