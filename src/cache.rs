//! The on-disk cache: objects by content, records by fingerprint, logs, scratch, leases.
//!
//! The only module that touches a cache folder. Publishing is correct without any lock: objects
//! are synced and renamed into place first, the record last, and neither is ever changed.

mod access;
mod collect;
mod durable;
mod folder;
mod last;
mod lease;
mod materialise;
mod object;
mod probe;
mod records;
mod roots;
mod running;
mod runs;
mod scratch;
mod stat_index;
mod survey;
#[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "only remotes transfer"))]
mod transfer;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use contract::{OutputClass, OutputForm};

pub use access::Closed;
pub use collect::{Collected, DEFAULT_CAP, GRACE, GcOptions};
pub use lease::{Acquired, Lease};
pub use object::{Stored, TreeEntry};
pub use probe::Probe;
pub(crate) use running::InUse;
pub use scratch::Scratch;
pub use survey::{Damage, Held, Kept, Verified};

pub(crate) use durable::{is_left_open, unique_name, unix_seconds};
pub(crate) use lease::this_process;
#[cfg(feature = "remote")]
pub(crate) use transfer::{Batch, Partial};

use crate::digest::Fingerprint;
use crate::record::Record;
use stat_index::StatIndex;

/// A cache folder.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    index: StatIndex,
    watched: lease::Watched,
    listings: folder::Listings,
    /// The file system has shown that it cannot share blocks.
    no_reflinks: AtomicBool,
    /// The project that uses it, where there is one.
    owner: Option<last::Owner>,
}

/// The cache cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        /// Completes "could not".
        doing: &'static str,
        /// File or folder.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// Something that cannot be stored.
    #[error("{0}")]
    Unfit(String),
    /// A stored file that is not what it was.
    #[error("the cache is damaged: {0}")]
    Damaged(String),
}

impl CacheError {
    fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }

    /// What the user can do about it.
    pub fn help(&self) -> Option<String> {
        let Self::Io { source, path, .. } = self else { return None };
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Some("free some space on that disk and run again".to_owned())
            }
            io::ErrorKind::PermissionDenied if let Some((at, what)) = access::closed(path) => {
                Some(format!(
                    "{} is {what}: its owner can {}; `pipe doctor` lists what is closed",
                    at.display(),
                    access::SHARING
                ))
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Some(
                "a cache that cannot be written can only be read: `--cache DIR` names another"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// An output of a record that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Output.
    pub output: String,
    /// What is wrong, for people.
    pub what: String,
}

impl Cache {
    /// The cache at `root`; nothing is created before the first write.
    ///
    /// # Errors
    /// [`CacheError`] where there is something else than a folder.
    pub fn open(root: &Path) -> Result<Self, CacheError> {
        let root = std::path::absolute(root).map_err(|e| CacheError::io("find", root, e))?;
        match fs::metadata(&root) {
            Ok(meta) if !meta.is_dir() => {
                Err(CacheError::Unfit(format!("{} is not a folder", root.display())))
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CacheError::io("open", &root, e)),
            _ => Ok(Self {
                index: StatIndex::for_root(&root),
                watched: lease::Watched::default(),
                root,
                listings: folder::Listings::default(),
                no_reflinks: AtomicBool::new(false),
                owner: None,
            }),
        }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn tmp_dir(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn record_path(&self, kind: &str, fingerprint: Fingerprint) -> PathBuf {
        self.root.join("records-v1").join(kind).join(format!("{fingerprint}.json"))
    }

    /// The record of a fingerprint. A damaged one counts as absent, and so does one that this user
    /// may not read: `Cache::unreadable` says whose it is.
    ///
    /// # Errors
    /// [`CacheError`] where the file system refuses.
    pub fn record(
        &self,
        kind: &str,
        fingerprint: Fingerprint,
    ) -> Result<Option<Record>, CacheError> {
        let path = self.record_path(kind, fingerprint);
        let text = match durable::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
            Err(e) => return Err(CacheError::io("read", &path, e)),
        };
        Ok(Record::from_text(&text).ok().filter(|r| r.fingerprint == fingerprint))
    }

    /// The same, as it is on the server of a network file system now.
    ///
    /// # Errors
    /// [`CacheError`] where the file system refuses, also to look into the folder: nothing could be
    /// published there after hours of work.
    pub fn record_now(
        &self,
        kind: &str,
        fingerprint: Fingerprint,
    ) -> Result<Option<Record>, CacheError> {
        let folder = self.root.join("records-v1").join(kind);
        durable::look_again(&folder);
        match fs::metadata(folder.join("none")) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                return Err(CacheError::io("look into", &folder, e));
            }
            _ => {}
        }
        self.record(kind, fingerprint)
    }

    /// Checks every object of a record; memoised, so microseconds where nothing changed.
    ///
    /// # Errors
    /// The first [`Fault`].
    pub fn check(&self, record: &Record) -> Result<(), Fault> {
        for (name, output) in &record.outputs {
            let fault = |what: String| Fault { output: name.clone(), what };
            let object = output.digest.short();
            match output.form {
                OutputForm::File => self
                    .verify(output.digest, Some(output.bytes))
                    .map_err(|what| fault(format!("object {object} {what}")))?,
                OutputForm::Tree => {
                    let entries = self
                        .tree(output.digest)
                        .map_err(|what| fault(format!("listing {object} {what}")))?;
                    for entry in entries {
                        self.verify(entry.digest, Some(entry.bytes))
                            .map_err(|what| fault(format!("file `{}` {what}", entry.path)))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Moves the faulty objects of a record to the quarantine, so that a rerun can replace them.
    pub fn clear_faults(&self, record: &Record) {
        let clear = |digest, bytes| {
            let path = self.object_path(digest);
            if path.exists() && self.verify(digest, bytes).is_err() {
                self.quarantine(&path);
            }
        };
        for output in record.outputs.values() {
            match output.form {
                OutputForm::File => clear(output.digest, Some(output.bytes)),
                OutputForm::Tree => match self.tree(output.digest) {
                    Ok(entries) => entries.iter().for_each(|e| clear(e.digest, Some(e.bytes))),
                    Err(_) => clear(output.digest, None),
                },
            }
        }
    }

    /// Publishes a record whose objects are stored. The first record of a fingerprint stays,
    /// unless `supersede` says that it is proven incomplete or that the user forced a rerun.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses; then nothing is published.
    pub fn publish(&self, record: &Record, supersede: bool) -> Result<(), CacheError> {
        let path = self.record_path(&record.identity.kind, record.fingerprint);
        let io = |e| CacheError::io("write", &path, e);
        let text = record.to_text().map_err(|e| io(e.into()))?;
        let text = text.as_bytes();
        let unreadable = self.record(&record.identity.kind, record.fingerprint)?.is_none();
        if supersede || (unreadable && path.exists()) {
            return durable::replace(&self.tmp_dir(), &path, text).map_err(io);
        }
        let staged = durable::stage_bytes(&self.tmp_dir(), text).map_err(io)?;
        durable::create_synced_parent(&path).map_err(io)?;
        if durable::rename_exclusive(&staged, &path).map_err(io)? {
            durable::sync_dir(path.parent().unwrap_or(&self.root)).map_err(io)
        } else {
            durable::remove(&staged).map_err(io)
        }
    }

    /// A fresh private folder for one execution; gone when the value is dropped.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses.
    pub fn work_dir(&self) -> Result<WorkDir, CacheError> {
        let path = self.tmp_dir().join(unique_name());
        durable::create_folder(&path).map_err(|e| CacheError::io("create", &path, e))?;
        Ok(WorkDir { path })
    }

    /// Writes what was learned about unchanged files.
    pub fn flush(&self) {
        self.index.flush();
    }
}

/// A private folder below `tmp/`.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
}

impl WorkDir {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Names of the artifacts that differ between two records.
pub(crate) fn differing_artifacts(a: &Record, b: &Record) -> Vec<String> {
    let artifacts = |r: &Record| -> BTreeMap<String, crate::digest::Digest> {
        let artifacts = r.outputs.iter().filter(|(_, o)| o.class == OutputClass::Artifact);
        artifacts.map(|(name, o)| (name.clone(), o.digest)).collect()
    };
    let (a, b) = (artifacts(a), artifacts(b));
    let names = a.keys().chain(b.keys()).collect::<std::collections::BTreeSet<_>>();
    names.into_iter().filter(|n| a.get(*n) != b.get(*n)).cloned().collect()
}

#[cfg(test)]
mod tests;
