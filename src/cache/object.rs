//! Objects: files named by the digest of their bytes, and trees, which are listings of files.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Cache, CacheError, access, durable};
use crate::digest::Digest;

/// One file of a tree. The canonical listing is the JSON of these, sorted by path; empty folders
/// are not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeEntry {
    /// Path inside the tree, with `/`.
    pub path: String,
    /// The file may be executed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exec: bool,
    /// Size in bytes.
    pub bytes: u64,
    /// Digest of the content.
    pub digest: Digest,
}

/// What `ingest` stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Digest of the file, or of the tree's listing.
    pub digest: Digest,
    /// Bytes of content.
    pub bytes: u64,
    /// It is one file, which may be executed.
    pub exec: bool,
}

/// Why an object cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unsound {
    /// It is not what it was, and can be made anew.
    #[error("{0}")]
    Damaged(String),
    /// This user may not read it, which says nothing about what it holds.
    #[error("cannot be read: {0}")]
    Denied(String),
    /// The file system could not read it just now (too many open files, no memory, a server that
    /// does not answer), which says nothing about it either.
    #[error("cannot be read: {0}")]
    Passing(String),
}

impl Unsound {
    /// The error of who needs the object that is called `name`.
    pub(crate) fn of(self, name: &str) -> CacheError {
        let what = format!("{name} {self}");
        match self {
            Self::Damaged(_) => CacheError::Damaged(what),
            Self::Denied(_) => CacheError::Denied(what),
            Self::Passing(_) => CacheError::Passing(what),
        }
    }

    pub(super) fn unreadable(path: &Path, error: &io::Error) -> Self {
        use io::ErrorKind::{IsADirectory, NotFound, PermissionDenied, UnexpectedEof};
        // What a disk or a file system says that has lost bytes.
        let lost = [Errno::IO, Errno::UCLEAN, Errno::BADMSG].map(|e| Some(e.raw_os_error()));
        match error.kind() {
            // Where the file itself cannot be looked at, its folder is what keeps us out.
            PermissionDenied => Self::Denied(match access::closed(path) {
                Some((at, what)) => format!("{} is {what}", at.display()),
                None => error.to_string(),
            }),
            NotFound | UnexpectedEof | IsADirectory => {
                Self::Damaged(format!("cannot be read: {error}"))
            }
            _ if lost.contains(&error.raw_os_error()) => {
                Self::Damaged(format!("cannot be read: {error}"))
            }
            _ => Self::Passing(error.to_string()),
        }
    }
}

impl Cache {
    /// Where the object of a digest is.
    pub(crate) fn object_path(&self, digest: Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root.join("objects-v1").join(&hex[..2]).join(&hex[2..])
    }

    /// Gives a synced file its place, durably, unless a sound object is there already.
    pub(super) fn install(&self, staged: &Path, digest: Digest) -> Result<(), CacheError> {
        let target = self.object_path(digest);
        let io = |e| CacheError::io("store", &target, e);
        durable::create_synced_parent(&target).map_err(io)?;
        self.settle(staged, digest)?;
        // Also where it was there: whoever stored it may not have come so far yet.
        durable::sync_dir(target.parent().unwrap_or(&self.root)).map_err(io)
    }

    /// The same without syncing the folder.
    pub(super) fn settle(&self, staged: &Path, digest: Digest) -> Result<(), CacheError> {
        let target = self.object_path(digest);
        let io = |e| CacheError::io("store", &target, e);
        durable::create_parent(&target).map_err(io)?;
        let mut placed = durable::rename_exclusive(staged, &target).map_err(io)?;
        if !placed {
            match self.inspect(digest, None) {
                Ok(()) => {}
                Err(Unsound::Damaged(_)) => {
                    self.quarantine(&target);
                    placed = durable::rename_exclusive(staged, &target).map_err(io)?;
                }
                // Its equal, which can be read, takes its place.
                Err(Unsound::Denied(_) | Unsound::Passing(_)) => {
                    durable::rename(staged, &target).map_err(io)?;
                    placed = true;
                }
            }
        }
        if !placed {
            // An object that is stored again gets the age of a new one: its record is yet to come.
            // Another user's is replaced by its equal instead.
            let renewed = durable::touch(&target).or_else(|_| durable::rename(staged, &target));
            durable::remove(staged).map_err(io)?;
            if let Err(error) = renewed {
                tracing::debug!(%error, path = %target.display(), "could not renew an object");
            }
        }
        // Only now that the folder around it is the one that is made for a group, or is not.
        durable::share(&target, 0o040);
        if let Ok(meta) = fs::metadata(&target) {
            self.index.remember(&target, &meta, digest, true);
        }
        Ok(())
    }

    /// [`Cache::inspect`], for who only wants to know whether an object has to be fetched.
    ///
    /// # Errors
    /// What is wrong, for people.
    #[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "only remotes fetch objects"))]
    pub(crate) fn verify(&self, digest: Digest, bytes: Option<u64>) -> Result<(), String> {
        self.inspect(digest, bytes).map_err(|e| e.to_string())
    }

    /// Checks that an object is there and holds what its name says. One whose size, modification
    /// time and inode are those of the last time is not read again.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn inspect(&self, digest: Digest, bytes: Option<u64>) -> Result<(), Unsound> {
        let path = self.object_path(digest);
        let damaged = |what: String| Err(Unsound::Damaged(what));
        let found = fs::metadata(&path).or_else(|_| {
            durable::look_again(path.parent().unwrap_or(&self.root));
            fs::metadata(&path)
        });
        let meta = match found {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return damaged("is missing".into()),
            Err(e) => return Err(Unsound::unreadable(&path, &e)),
        };
        if let Some(bytes) = bytes.filter(|b| *b != meta.len()) {
            return damaged(format!("has {} bytes instead of {bytes}", meta.len()));
        }
        if self.index.lookup(&path, &meta, true) == Some(digest) {
            return Ok(());
        }
        match durable::again(|| hash(File::open(&path)?)) {
            Ok(found) if found == digest => {
                self.index.remember(&path, &meta, digest, true);
                Ok(())
            }
            Ok(_) => damaged("holds other bytes than its digest says".to_owned()),
            Err(e) => Err(Unsound::unreadable(&path, &e)),
        }
    }

    /// The listing of a stored tree.
    ///
    /// # Errors
    /// What is wrong with the listing, for people.
    pub(crate) fn tree(&self, digest: Digest) -> Result<Vec<TreeEntry>, String> {
        self.read_tree(digest).map_err(|e| e.to_string())
    }

    /// The same.
    ///
    /// # Errors
    /// What is wrong with the listing.
    pub(crate) fn read_tree(&self, digest: Digest) -> Result<Vec<TreeEntry>, Unsound> {
        self.inspect(digest, None)?;
        let path = self.object_path(digest);
        let text = durable::read(&path).map_err(|e| Unsound::unreadable(&path, &e))?;
        let damaged = |what: String| Unsound::Damaged(what);
        let entries: Vec<TreeEntry> =
            serde_json::from_slice(&text).map_err(|e| damaged(format!("is no listing: {e}")))?;
        let safe = |p: &str| p.split('/').all(|s| !s.is_empty() && s != "." && s != "..");
        match entries.iter().find(|e| !safe(&e.path)) {
            Some(entry) => Err(damaged(format!("lists the path `{}`", entry.path))),
            None => Ok(entries),
        }
    }

    /// `meta` was taken before.
    pub(super) fn digest_file(&self, path: &Path, meta: &Metadata) -> Result<Digest, CacheError> {
        if let Some(digest) = self.index.lookup(path, meta, false) {
            return Ok(digest);
        }
        let digest = File::open(path)
            .and_then(|f| hash(&f))
            .map_err(|e| CacheError::outside("read", path, e))?;
        self.index.remember(path, meta, digest, false);
        Ok(digest)
    }

    /// Moves a faulty object or record out of the way, keeping it for inspection; in a cache that
    /// cannot be written it stays.
    pub(crate) fn quarantine(&self, path: &Path) {
        let target = self.root.join("quarantine").join(format!(
            "{}-{}",
            path.file_name().unwrap_or_default().to_string_lossy(),
            durable::unique_name()
        ));
        if durable::create_parent(&target).and_then(|()| fs::rename(path, &target)).is_ok() {
            tracing::warn!(path = %path.display(), "moved a damaged file to the quarantine");
        }
    }
}

pub(super) fn metadata(path: &Path) -> Result<Metadata, CacheError> {
    fs::metadata(path).map_err(|e| CacheError::outside("read", path, e))
}

pub(super) fn listing(entries: &[TreeEntry]) -> Vec<u8> {
    serde_json::to_vec(entries).unwrap_or_default()
}

/// Digest of everything a reader gives.
pub(crate) fn hash(mut reader: impl Read) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    // Most files are small: the large buffer is for those that turn out not to be.
    let mut buffer = vec![0; 1 << 13];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(Digest(*hasher.finalize().as_bytes())),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                if n == buffer.len() {
                    buffer.resize(1 << 18, 0);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_gone_or_spoilt_is_damaged() {
        let at = Path::new("/nowhere");
        let found = |errno: Errno| Unsound::unreadable(at, &errno.into());
        for errno in [Errno::NOENT, Errno::ISDIR, Errno::IO, Errno::UCLEAN, Errno::BADMSG] {
            assert!(matches!(found(errno), Unsound::Damaged(_)), "{errno}");
        }
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::TIMEDOUT, Errno::STALE] {
            let passing = found(errno);
            assert!(matches!(passing, Unsound::Passing(_)), "{errno}");
            let help = passing.of("object 1").help().unwrap_or_default();
            assert!(help.contains("run again"), "{help}");
        }
        assert!(matches!(found(Errno::ACCESS), Unsound::Denied(_)));
    }
}
