//! The engine: plans which stages of a pipeline must run, runs them, and keeps what they make.
//!
//! Modules in reading order. Nothing here knows of machine learning: a stage kind is a value that
//! implements [`contract::StageKind`], handed in by the binary.

pub mod digest;
pub mod yaml;
pub mod pipeline;
pub mod graph;
pub mod fingerprint;
pub mod record;
pub mod lockfile;
pub mod cache;
pub mod plan;
pub mod event;
pub mod process;
pub mod runner;
pub mod display;
pub mod exit_code;
pub mod command;
