//! The one integration test binary.

mod broker;
mod edge;
mod embedded;
mod events;
mod run;
mod golden;
mod sandbox;
mod store;
mod support;
mod tap;
mod tidy;
