//! Exit codes of `pipe`: part of its interface.

/// Everything asked for was done.
pub const OK: u8 = 0;
/// A defect of `pipe` itself.
pub const BUG: u8 = 1;
/// The command line is wrong (clap's own code).
pub const USAGE: u8 = 2;
/// The pipeline file is wrong; nothing ran.
pub const BAD_PIPELINE: u8 = 3;
/// A stage failed.
pub const STAGE_FAILED: u8 = 4;
/// The cache cannot be used: permissions, a full disk.
pub const CACHE: u8 = 5;
/// `plan --check` found something to run.
pub const WOULD_RUN: u8 = 6;
/// The remote cannot be used, or lacks what was asked for.
pub const REMOTE: u8 = 7;
/// Interrupted by a signal (128 + SIGINT).
pub const INTERRUPTED: u8 = 130;
