//! What other users made and this one may not read: whose it is, and what they can do about it.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use serde::Serialize;

use super::survey::files_at;
use super::{Cache, CacheError, durable};

/// Files that are looked at, of records and of objects each.
const SAMPLE: usize = 200;
/// Folders that everybody who uses a cache writes.
const FOLDERS: [&str; 16] = [
    "",
    "objects-v1",
    "records-v1",
    "listings-v1",
    "leases",
    "logs",
    "scratch",
    "tmp",
    "last",
    "roots",
    "running",
    "runs",
    "pins",
    "evicted",
    "evicted-needed",
    "quarantine",
];
/// Something in a cache that keeps users out who share it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Closed {
    /// File or folder.
    pub path: PathBuf,
    /// Whose it is and its mode, for people.
    pub what: String,
    /// This user is kept out, not only others of the group.
    pub to_us: bool,
}

/// `anna's, mode 0600`.
pub(super) fn owner(meta: &Metadata) -> String {
    format!("{}'s, mode {:04o}", user(meta.uid()), meta.mode() & 0o7777)
}

fn user(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid.to_string()).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| format!("user {uid}"))
}

/// What keeps a file from being read: itself, or the folder above it that cannot be entered. None
/// where it can be read or is not there.
pub(super) fn closed(path: &Path) -> Option<(PathBuf, String)> {
    let denied = |e: io::Error| e.kind() == io::ErrorKind::PermissionDenied;
    if !File::open(path).is_err_and(denied) {
        return None;
    }
    path.ancestors().find_map(|at| Some((at.to_owned(), owner(&fs::symlink_metadata(at).ok()?))))
}

/// Reads a file of others; one that this user may not read is counted.
pub(super) fn read_or_count(path: &Path, hidden: &mut usize) -> Option<Vec<u8>> {
    let denied = |e: &io::Error| e.kind() == io::ErrorKind::PermissionDenied;
    durable::read(path).inspect_err(|e| *hidden += usize::from(denied(e))).ok()
}

impl Cache {
    /// Why a record that may be there cannot be read by this user, for people.
    pub(crate) fn unreadable(
        &self,
        kind: &str,
        fingerprint: crate::digest::Fingerprint,
    ) -> Option<String> {
        let path = self.record_path(kind, fingerprint);
        let (at, what) = closed(&path)?;
        let at = if at == path { "it".to_owned() } else { at.display().to_string() };
        Some(format!("{at} is {what}; `pipe doctor` says what its owner can do"))
    }

    /// Folders that everybody writes, leases, and samples of records, objects and what says which of
    /// them are in use, that keep users out.
    ///
    /// # Errors
    /// [`CacheError`] where a folder cannot be listed for another reason.
    pub fn closed(&self) -> Result<Vec<Closed>, CacheError> {
        let Ok(root) = fs::metadata(&self.root) else { return Ok(Vec::new()) };
        let for_group = root.mode() & 0o070;
        let mut found = Vec::new();
        let mut look = |path: PathBuf, wanted: u32, ours: Access| {
            let Ok(meta) = fs::metadata(&path) else { return };
            let to_us = access(&path, ours).is_err();
            let lacking = wanted & for_group & !meta.mode() != 0;
            if to_us || lacking {
                found.push(Closed { path, what: owner(&meta), to_us });
            }
        };
        let mut folders: Vec<PathBuf> =
            FOLDERS.iter().map(|n| self.root.join(n).components().collect()).collect();
        for folder in ["records-v1", "objects-v1"] {
            folders.extend(readable(files_at(&self.root.join(folder), 1))?);
        }
        for folder in folders.iter().filter(|path| path.is_dir()) {
            look(folder.clone(), 0o070, Access::READ_OK | Access::EXEC_OK);
        }
        let mut files = readable(files_at(&self.root.join("leases"), 1))?;
        for (folder, depth) in
            [("running", 1), ("roots", 1), ("last", 3), ("records-v1", 2), ("objects-v1", 2)]
        {
            files.extend(self.sample(folder, depth)?);
        }
        for file in files {
            look(file, 0o040, Access::READ_OK);
        }
        Ok(found)
    }

    /// Some of the files so deep below a folder.
    fn sample(&self, folder: &str, depth: usize) -> Result<Vec<PathBuf>, CacheError> {
        let mut files = vec![self.root.join(folder)];
        for _ in 0..depth {
            let mut below = Vec::new();
            for folder in files.iter().filter(|path| path.is_dir()) {
                below.extend(readable(files_at(folder, 1))?);
            }
            files = below;
        }
        let step = files.len().div_ceil(SAMPLE).max(1);
        Ok(files.into_iter().step_by(step).collect())
    }
}

/// A folder that cannot be listed by this user is found elsewhere.
fn readable(listed: Result<Vec<PathBuf>, CacheError>) -> Result<Vec<PathBuf>, CacheError> {
    match listed {
        Err(CacheError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            Ok(Vec::new())
        }
        other => other,
    }
}
