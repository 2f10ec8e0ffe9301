pub mod model;
pub mod tasks;
