//! Whole runs against a hub on loopback, local wheels and local files.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value, reason = "tests")]

mod cache;
mod failures;
mod hub;
mod params;
mod pypi;
mod server;
mod space;
