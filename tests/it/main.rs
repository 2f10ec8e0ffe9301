//! The one integration test binary.

mod sandbox;
mod tap;
mod broker;
mod edge;
