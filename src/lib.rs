pub mod model;
pub mod scripted;
pub mod tasks;
