//! The one integration test binary.

mod edge;
