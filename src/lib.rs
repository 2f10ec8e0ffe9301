pub mod broker;
pub mod model;
pub mod scripted;
pub mod tasks;
