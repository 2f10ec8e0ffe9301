//! The one integration test binary.

mod embedded;
mod sandbox;
mod store;
mod support;
