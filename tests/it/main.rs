//! The one integration test binary.

mod broker;
mod edge;
mod embedded;
mod events;
mod golden;
mod notify;
mod run;
mod sandbox;
mod store;
mod support;
mod tap;
mod tidy;
