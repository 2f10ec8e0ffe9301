//! The main job, end to end: a real sidecar drives the real OpenCode. Only the model is scripted.

mod bad_input;
mod database_faults;
mod disk_faults;
mod ending;
mod faults;
mod idempotency;
mod life;
mod main_job;
mod model_config;
mod outage;
mod queue;
mod retention;
mod sandboxed;
mod secrets;
mod streams;
mod users;
mod visible;
