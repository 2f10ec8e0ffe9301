//! Confinement with real processes and the real kernel.
//!
//! - `bench`: starts confined programs.
//! - `program`: the program that is confined: this test binary again, which tries things and tells how they went.
//! - `calls`, `files`, `network`, `identity`: one promise each, as root and as an ordinary user.
//! - `session`: a whole session inside.

mod bench;
mod calls;
mod files;
mod identity;
mod network;
pub(crate) mod program;
mod session;
