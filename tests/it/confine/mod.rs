//! Confinement with real processes and the real kernel.

mod session;
