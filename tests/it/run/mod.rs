//! The main job, end to end: a real sidecar drives the real OpenCode. Only the model is scripted.

mod bad_input;
mod clock;
mod database_faults;
mod disk_faults;
mod ending;
mod failpoints;
mod faults;
mod idempotency;
mod life;
mod main_job;
mod million;
mod model_config;
mod outage;
mod queue;
mod recovery;
mod retention;
mod rotation;
mod sandboxed;
mod secrets;
mod soak;
mod streams;
mod tokens;
mod users;
mod visible;
mod walk;
mod wrecked;
