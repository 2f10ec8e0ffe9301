//! The one integration test binary.

mod broker;
mod cgroup;
mod cli;
mod confine;
mod docs;
mod doctor;
mod edge;
mod egress;
mod embedded;
mod escape;
mod events;
mod fuzz;
mod golden;
mod notify;
mod run;
mod sandbox;
mod sessions;
mod store;
mod support;
mod tap;
mod tidy;
