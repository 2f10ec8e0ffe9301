pub mod cli;
pub mod model;
pub mod sandbox;
pub mod tasks;
