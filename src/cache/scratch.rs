//! Scratch folders: where a stage keeps checkpoints that a later attempt at the same fingerprint
//! adopts.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Cache, CacheError, durable};
use crate::digest::Fingerprint;

/// The scratch folders of one fingerprint.
#[derive(Debug)]
pub struct Scratch {
    all: PathBuf,
    own: PathBuf,
    earlier: Vec<PathBuf>,
}

impl Cache {
    /// A fresh attempt, and the earlier ones, newest first.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses.
    pub fn scratch(&self, fingerprint: Fingerprint) -> Result<Scratch, CacheError> {
        let all = self.root.join("scratch").join(fingerprint.to_hex());
        let mut earlier: Vec<PathBuf> = fs::read_dir(&all)
            .map(|entries| entries.flatten().map(|e| e.path()).collect())
            .unwrap_or_default();
        // Names begin with the time of creation.
        earlier.sort_by(|a, b| b.cmp(a));
        let own = all.join(durable::unique_name());
        durable::create_folder(&own).map_err(|e| CacheError::io("create", &own, e))?;
        Ok(Scratch { all, own, earlier })
    }
}

impl Scratch {
    /// The folder of this attempt.
    pub fn own(&self) -> &Path {
        &self.own
    }

    /// Folders of earlier attempts, newest first.
    pub fn earlier(&self) -> &[PathBuf] {
        &self.earlier
    }

    /// Removes every attempt: the fingerprint is published.
    pub fn clear(self) {
        let _ = fs::remove_dir_all(&self.all);
    }

    /// Ends a failed attempt; its folder stays if it holds anything, for whoever tries next.
    pub fn keep(self) {
        for checkpoint in fs::read_dir(&self.own).into_iter().flatten().flatten() {
            durable::share(&checkpoint.path(), 0o040);
        }
        let _ = fs::remove_dir(&self.own);
        let _ = fs::remove_dir(&self.all);
    }
}
