//! The one integration test binary.

mod embedded;
mod sandbox;
mod tap;
mod broker;
mod edge;
mod store;
mod support;
