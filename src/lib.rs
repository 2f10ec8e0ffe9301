pub mod cli;
pub mod model;
pub mod sandbox;
pub mod broker;
pub mod model;
pub mod scripted;
pub mod tasks;
