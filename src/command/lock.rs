//! `pipe lock`.

use std::path::PathBuf;

use super::CommandError;
use crate::lockfile::Lockfile;
use crate::{display, exit_code};

/// Merge lock files, by hand or as git's merge driver.
///
/// A lock file is JSON with one block a source, sorted by source. The merge takes what either side
/// added, changed or removed; a source that both changed differently keeps OURS and is named.
/// To let git do it: `git config merge.pipe-lock.driver "pipe lock merge %O %A %B"`, and in
/// `.gitattributes` the line `*.lock merge=pipe-lock` (`pipeline.lock` where other tools have lock
/// files).
#[derive(Debug, clap::Subcommand)]
pub(super) enum Args {
    /// Merge THEIRS into OURS, which are both changes of BASE
    Merge {
        /// The common ancestor
        base: PathBuf,
        /// One side; the result is written here
        ours: PathBuf,
        /// The other side
        theirs: PathBuf,
    },
}

pub(super) fn run(args: &Args) -> Result<u8, CommandError> {
    let Args::Merge { base, ours, theirs } = args;
    let (base, ours, theirs) = (Lockfile::at(base)?, Lockfile::at(ours)?, Lockfile::at(theirs)?);
    let (merged, both) = Lockfile::merged(&base, &ours, &theirs);
    merged.write()?;
    for key in both {
        display::note(&format!("{key}: both sides pin it anew; ours is kept"));
    }
    Ok(exit_code::OK)
}
