//! Whole runs against a hub on loopback, local wheels and local files.
#![allow(clippy::unwrap_used, reason = "tests")]

mod cache;
mod failures;
mod hub;
mod params;
mod pypi;
mod server;
mod space;
