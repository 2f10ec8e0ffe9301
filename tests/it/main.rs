//! The one integration test binary.

mod broker;
mod cgroup;
mod cli;
mod docs;
mod edge;
mod embedded;
mod events;
mod golden;
mod run;
mod sandbox;
mod store;
mod support;
mod tap;
mod tidy;
