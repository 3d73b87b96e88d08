//! The on-disk cache: objects by content, records by fingerprint, logs, scratch, leases.
//!
//! The only module that touches a cache folder. Publishing is correct without any lock: objects
//! are synced and renamed into place first, the record last, and neither is ever changed.

mod access;
mod collect;
mod durable;
mod error;
mod folder;
mod ingest;
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
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use contract::{OutputClass, OutputForm};

pub use access::Closed;
pub use collect::{Collected, DEFAULT_CAP, GRACE, GcOptions};
pub use error::CacheError;
pub use lease::{Acquired, Lease};
pub use object::{Stored, TreeEntry};
pub use probe::Probe;
pub(crate) use running::InUse;
pub use scratch::Scratch;
pub use survey::{Damage, Held, Kept, Unreadable, Verified};

pub(crate) use durable::{is_left_open, unique_name, unix_seconds};
pub(crate) use lease::this_process;
pub(crate) use materialise::LaidOut;
pub(crate) use object::Unsound;
#[cfg(feature = "remote")]
pub(crate) use transfer::{Batch, Partial};

use crate::digest::Fingerprint;
use crate::record::{OutputRecord, Record};
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
    /// How files are made here, once one had to be.
    ours: OnceLock<ingest::Ours>,
    /// The project that uses it, where there is one.
    owner: Option<last::Owner>,
}

/// An output of a record that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Output.
    pub output: String,
    /// What is wrong, for people.
    pub what: String,
    /// This user may not read it: no reason to make it anew.
    pub denied: bool,
    /// It could not be read just now: no reason either.
    pub passing: bool,
}

impl Fault {
    /// The error where the output of a stage cannot be used and need not be made anew.
    pub(crate) fn denial(&self, stage: &str) -> Option<CacheError> {
        let Self { output, what, denied, passing } = self;
        let what = format!("output `{output}` of stage `{stage}` {what}");
        match (denied, passing) {
            (true, _) => Some(CacheError::Denied(what)),
            (_, true) => Some(CacheError::Passing(what)),
            _ => None,
        }
    }
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
                ours: OnceLock::new(),
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
            self.check_output(output).map_err(|unsound| Fault {
                output: name.clone(),
                what: unsound.to_string(),
                denied: matches!(unsound, Unsound::Denied(_)),
                passing: matches!(unsound, Unsound::Passing(_)),
            })?;
        }
        Ok(())
    }

    /// Checks every object of an output, likewise.
    ///
    /// # Errors
    /// What is wrong with the first that cannot be used.
    pub(crate) fn check_output(&self, output: &OutputRecord) -> Result<(), Unsound> {
        let of = |what: &str, unsound: Unsound| match unsound {
            Unsound::Damaged(how) => Unsound::Damaged(format!("{what} {how}")),
            unreadable => unreadable,
        };
        let object = output.digest.short();
        if output.form == OutputForm::File {
            return self
                .inspect(output.digest, Some(output.bytes))
                .map_err(|e| of(&format!("object {object}"), e));
        }
        let entries =
            self.read_tree(output.digest).map_err(|e| of(&format!("listing {object}"), e))?;
        entries.iter().try_for_each(|entry| {
            self.inspect(entry.digest, Some(entry.bytes))
                .map_err(|e| of(&format!("file `{}`", entry.path), e))
        })
    }

    /// Whether every object of a record is whole.
    ///
    /// # Errors
    /// [`CacheError`] where that cannot be told.
    pub fn is_whole(&self, record: &Record) -> Result<bool, CacheError> {
        match self.check(record) {
            Ok(()) => Ok(true),
            Err(fault) => fault.denial(&record.stage).map_or(Ok(false), Err),
        }
    }

    /// Moves the faulty objects of a record to the quarantine, so that a rerun can replace them.
    pub fn clear_faults(&self, record: &Record) {
        record.outputs.values().for_each(|output| self.clear_output(output));
    }

    /// The same for one output.
    pub(crate) fn clear_output(&self, output: &OutputRecord) {
        let clear = |digest, bytes| {
            let path = self.object_path(digest);
            let damaged = matches!(self.inspect(digest, bytes), Err(Unsound::Damaged(_)));
            if damaged && path.exists() {
                self.quarantine(&path);
            }
        };
        match output.form {
            OutputForm::File => clear(output.digest, Some(output.bytes)),
            OutputForm::Tree => match self.read_tree(output.digest) {
                Ok(entries) => entries.iter().for_each(|e| clear(e.digest, Some(e.bytes))),
                Err(_) => clear(output.digest, None),
            },
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
        artifacts.map(|(name, o)| (name.clone(), o.identity())).collect()
    };
    let (a, b) = (artifacts(a), artifacts(b));
    let names = a.keys().chain(b.keys()).collect::<std::collections::BTreeSet<_>>();
    names.into_iter().filter(|n| a.get(*n) != b.get(*n)).cloned().collect()
}

#[cfg(test)]
mod tests;
