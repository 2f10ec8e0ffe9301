pub mod cli;
pub mod model;
pub mod sandbox;
pub mod store;
pub mod tasks;
