//! The OpenCode driver: starts one `opencode serve`, talks to it, and understands what it says.
//!
//! - `profile`: what a process is configured with; `launch`: starting it and knowing that it listens.
//! - `client`: its HTTP API and event stream; `wire`: its JSON.
//! - `translate`: its events into ours, pure; `changes`: what a run changed, pure; `outcome`: how a run ended, pure.
//!
//! What is run when, and for how long, is decided in `sessions`.

mod changes;
pub mod client;
pub mod launch;
pub mod outcome;
pub mod profile;
pub mod translate;
pub mod wire;

/// The OpenCode that this version was tested with.
pub const OPENCODE_VERSION: &str = "1.18.33";
