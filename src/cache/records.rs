//! Looking back: earlier records of a kind, and the listings that name the files of a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Cache, CacheError, TreeEntry, durable};
use crate::digest::{Digest, Fingerprint};
use crate::record::Record;

/// Listings beyond this size are not kept: they only serve explanations.
const MAX_LISTING: usize = 16 << 20;

impl Cache {
    /// The sound records of a kind, newest first.
    ///
    /// # Errors
    /// [`CacheError`] where the folder is there and cannot be listed.
    pub fn records(&self, kind: &str) -> Result<Vec<Record>, CacheError> {
        let dir = self.root.join("records-v1").join(kind);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(CacheError::io("list", &dir, e)),
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| CacheError::io("list", &dir, e))?;
            let name = entry.file_name();
            let hex = name.to_str().and_then(|n| n.strip_suffix(".json"));
            let Some(fingerprint) = hex.and_then(|h| h.parse::<Fingerprint>().ok()) else {
                continue;
            };
            records.extend(self.record(kind, fingerprint)?);
        }
        records.sort_by(|a, b| {
            (b.finished_at, &b.fingerprint.0).cmp(&(a.finished_at, &a.fingerprint.0))
        });
        Ok(records)
    }

    /// Keeps the listing of a user's folder, so that a later explanation can name its files.
    /// Failing to is harmless.
    pub fn keep_listing(&self, folder: &Path) {
        let Ok(entries) = self.list_local(folder) else { return };
        let text = super::object::listing(&entries);
        let path = self.listing_path(Digest::of(&text));
        if text.len() > MAX_LISTING || path.exists() {
            return;
        }
        let kept = durable::stage_bytes(&self.tmp_dir(), &text).and_then(|staged| {
            durable::create_parent(&path)?;
            fs::rename(&staged, &path).inspect_err(|_| drop(fs::remove_file(&staged)))
        });
        if let Err(error) = kept {
            tracing::debug!(%error, "could not keep the listing of {}", folder.display());
        }
    }

    /// The files of a folder with this digest, if the cache still knows: a stored tree, or a
    /// user's folder that a stage read.
    pub fn listed(&self, digest: Digest) -> Option<Vec<TreeEntry>> {
        if let Some(entries) = self.listings.get(digest) {
            return Some(entries.as_ref().clone());
        }
        if let Ok(text) = fs::read(self.listing_path(digest))
            && Digest::of(&text) == digest
        {
            return serde_json::from_slice(&text).ok();
        }
        self.tree(digest).ok()
    }

    /// Keeps the log of a finished execution under its fingerprint, so that it can be shown when
    /// the execution is reused. Failing to is harmless.
    pub fn keep_log(&self, fingerprint: Fingerprint, log: &Path) {
        let Some(name) = log.file_name() else { return };
        let kept = self.logs_of(fingerprint).join(name);
        let linked = durable::create_parent(&kept).and_then(|()| {
            // A forced rerun has another log.
            let _ = fs::remove_file(&kept);
            durable::link(log, &kept).or_else(|_| fs::copy(log, &kept).map(drop))
        });
        if let Err(error) = linked {
            tracing::debug!(%error, "could not keep {}", log.display());
        }
    }

    /// The log of the execution that made a record, while it is kept.
    pub fn log_of(&self, fingerprint: Fingerprint) -> Option<PathBuf> {
        let entries = fs::read_dir(self.logs_of(fingerprint)).ok()?;
        entries.flatten().map(|entry| entry.path()).find(|path| path.is_file())
    }

    fn logs_of(&self, fingerprint: Fingerprint) -> PathBuf {
        self.root.join("logs").join(fingerprint.to_hex())
    }

    fn listing_path(&self, digest: Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root.join("listings-v1").join(&hex[..2]).join(&hex[2..])
    }
}
