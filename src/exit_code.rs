//! Exit codes of `pipe`: part of its interface.

use std::panic::{AssertUnwindSafe, catch_unwind};

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

/// The exit code of some work; [`BUG`], and `told`, where it panics. Rust's own hook has said where.
pub(crate) fn of(work: impl FnOnce() -> u8, told: impl FnOnce()) -> u8 {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        told();
        BUG
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_whichever_thread_is_a_defect_and_is_told() {
        let mut told = 0;
        assert_eq!(of(|| STAGE_FAILED, || told += 1), STAGE_FAILED);
        assert_eq!(of(|| panic!("a defect"), || told += 1), BUG);
        let in_thread = || {
            std::thread::scope(|scope| {
                scope.spawn(|| panic!("a defect of a thread"));
            });
            OK
        };
        assert_eq!(of(in_thread, || told += 1), BUG);
        assert_eq!(told, 2);
    }
}
