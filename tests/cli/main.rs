//! The real binary, driven through pipelines of shell commands in folders of their own.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "tests")]

mod cache;
mod caching;
mod choices;
mod commands;
mod comparisons;
mod dags;
mod damage;
mod diagnostics;
mod doctor;
mod events;
mod failures;
#[cfg(feature = "remote")]
mod http;
mod processes;
mod profiles;
mod programs;
#[cfg(feature = "remote")]
mod remote;
mod schema;
mod space;
mod sweeps;
mod truth;
mod watch;
mod words;
