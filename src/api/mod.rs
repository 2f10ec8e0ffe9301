//! The HTTP edge: the only part that knows status codes.
//!
//! [`server`] takes connections, [`layers`] wraps every request, [`auth`] lets in whoever has the scope that a route names, [`extract`] reads what came,
//! [`problem`] says what is wrong, [`sockets`] is common to WebSockets, [`openapi`] joins routes and document, `docs` and `pages` are for people to read.
//! Handlers turn requests into calls of the
//! services and results into answers; they hold no logic of the domain, no SQL and no processes.

pub mod auth;
mod cursor;
mod docs;
mod documents;
pub mod extract;
pub mod files;
pub mod layers;
pub mod openapi;
mod pages;
pub mod probes;
pub mod problem;
mod reason;
pub mod server;
mod session_frames;
mod session_stream;
pub mod sessions;
pub mod sockets;
mod stall;
pub mod stream;
pub mod tasks;
mod terminal;

pub use extract::{ApiJson, ApiPath, ApiQuery, ApiResult, OptionalApiJson};
pub use problem::{Code, Problem};

/// The routes, ready to serve: what [`openapi::assemble`] gives and [`server::serve`] takes.
pub type Router = axum::Router;
