//! What several tests share.

pub(crate) mod between;
pub(crate) mod disk;
pub(crate) mod follower;
pub(crate) mod mint;
pub(crate) mod panics;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod server;
pub(crate) mod sidecar;
pub(crate) mod site;
pub(crate) mod tls;
