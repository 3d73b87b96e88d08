//! The real binary, driven through pipelines of shell commands in folders of their own.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "tests")]

#[cfg(feature = "stages")]
mod bad_input;
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
#[cfg(feature = "stages")]
mod filled;
mod full_disk;
mod going_on;
mod gpus;
mod group;
#[cfg(feature = "remote")]
mod http;
mod inputs;
mod logging;
mod lost;
mod outputs;
#[cfg(feature = "stages")]
mod plannable;
mod processes;
mod profiles;
mod programs;
#[cfg(feature = "stages")]
mod quickstart;
mod readers;
#[cfg(feature = "remote")]
mod remote;
mod requirements;
mod schema;
mod sharing;
mod space;
mod sweeps;
#[cfg(feature = "stages")]
mod tiny_model;
mod truth;
mod watch;
mod words;
