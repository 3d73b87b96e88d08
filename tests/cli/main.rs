//! The real binary, driven through pipelines of shell commands in folders of their own.

#![allow(clippy::unwrap_used, reason = "tests")]

mod caching;
mod commands;
mod diagnostics;
mod failures;
mod processes;
mod programs;
mod schema;
mod space;
mod truth;
mod words;
