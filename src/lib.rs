//! The engine: plans which stages of a pipeline must run, runs them, and keeps what they make.
//!
//! Modules in reading order. Nothing here knows of machine learning: a stage kind is a value that
//! implements [`contract::StageKind`], handed in by the binary.

pub mod cache;
pub mod command;
pub mod digest;
pub mod display;
pub mod doctor;
pub mod event;
pub mod exit_code;
pub mod fingerprint;
pub mod gather;
pub mod graph;
pub mod lockfile;
pub mod pipeline;
pub mod plan;
pub mod process;
pub mod record;
pub mod remote;
pub mod runner;
pub mod runs;
pub mod schema;
mod threads;
pub mod watch;
pub mod yaml;
