//! Objects: files named by the digest of their bytes, and trees, which are listings of files.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use contract::OutputForm;
use serde::{Deserialize, Serialize};

use super::folder::{Found, files_below};
use super::{Cache, CacheError, durable};
use crate::digest::Digest;

/// Files from this size on are flushed while they are hashed: one keeps the disk busy, the other
/// a core.
const OVERLAP_BYTES: u64 = 4 << 20;

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
}

impl Cache {
    /// Where the object of a digest is.
    pub(crate) fn object_path(&self, digest: Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root.join("objects-v1").join(&hex[..2]).join(&hex[2..])
    }

    /// Moves a file or folder, which must be in this cache's own working area, into the objects.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses, or the folder holds what cannot be kept (links,
    /// sockets, names that are not UTF-8). Objects stored until then stay, unreferenced.
    pub fn ingest(&self, path: &Path, form: OutputForm) -> Result<Stored, CacheError> {
        match form {
            OutputForm::File => self.ingest_file(path),
            OutputForm::Tree => {
                let mut entries = Vec::new();
                for Found { name, path } in files_below(path)? {
                    let meta = metadata(&path)?;
                    let Stored { digest, bytes } = self.ingest_file(&path)?;
                    let exec = meta.mode() & 0o100 != 0;
                    entries.push(TreeEntry { path: name, exec, bytes, digest });
                }
                let listing = listing(&entries);
                let digest = Digest::of(&listing);
                let tmp = self.tmp_dir();
                let staged = durable::stage_bytes(&tmp, &listing)
                    .and_then(|staged| protect(&staged).map(|()| staged))
                    .map_err(|e| CacheError::io("write to", &tmp, e))?;
                self.install(&staged, digest)?;
                Ok(Stored { digest, bytes: entries.iter().map(|e| e.bytes).sum() })
            }
        }
    }

    fn ingest_file(&self, path: &Path) -> Result<Stored, CacheError> {
        let io = |doing| move |e| CacheError::io(doing, path, e);
        let meta = metadata(path)?;
        if !meta.is_file() {
            return Err(CacheError::Unfit(format!("{} is not a regular file", path.display())));
        }
        let file = File::open(path).map_err(io("open"))?;
        let digest = if meta.len() < OVERLAP_BYTES {
            let digest = hash(&file).map_err(io("read"))?;
            file.sync_all().map_err(io("flush"))?;
            digest
        } else {
            std::thread::scope(|scope| {
                let flushed = scope.spawn(|| file.sync_all());
                let digest = hash(&file).map_err(io("read"));
                let panicked = |_| Err(io::Error::other("the flush did not end"));
                flushed.join().unwrap_or_else(panicked).map_err(io("flush"))?;
                digest
            })?
        };
        // A file with other names is not ours alone, and its mode is not ours to change.
        if meta.nlink() == 1 {
            protect(path).map_err(io("protect"))?;
        }
        self.install(path, digest)?;
        Ok(Stored { digest, bytes: meta.len() })
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
        if !placed && self.verify(digest, None).is_err() {
            self.quarantine(&target);
            placed = durable::rename_exclusive(staged, &target).map_err(io)?;
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
        if let Ok(meta) = fs::metadata(&target) {
            self.index.remember(&target, &meta, digest, true);
        }
        Ok(())
    }

    /// Checks that an object is there and holds what its name says; memoised.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(crate) fn verify(&self, digest: Digest, bytes: Option<u64>) -> Result<(), String> {
        let path = self.object_path(digest);
        let found = fs::metadata(&path).or_else(|_| {
            durable::look_again(path.parent().unwrap_or(&self.root));
            fs::metadata(&path)
        });
        let meta = match found {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err("is missing".to_owned()),
            Err(e) => return Err(format!("cannot be read: {e}")),
        };
        if let Some(bytes) = bytes.filter(|b| *b != meta.len()) {
            return Err(format!("has {} bytes instead of {bytes}", meta.len()));
        }
        if self.index.lookup(&path, &meta, true) == Some(digest) {
            return Ok(());
        }
        match durable::again(|| hash(File::open(&path)?)) {
            Ok(found) if found == digest => {
                self.index.remember(&path, &meta, digest, true);
                Ok(())
            }
            Ok(_) => Err("holds other bytes than its digest says".to_owned()),
            Err(e) => Err(format!("cannot be read: {e}")),
        }
    }

    /// The listing of a stored tree.
    ///
    /// # Errors
    /// What is wrong with the listing, for people.
    pub(crate) fn tree(&self, digest: Digest) -> Result<Vec<TreeEntry>, String> {
        self.verify(digest, None)?;
        let path = self.object_path(digest);
        let text = durable::read(&path).map_err(|e| format!("cannot be read: {e}"))?;
        let entries: Vec<TreeEntry> =
            serde_json::from_slice(&text).map_err(|e| format!("is no listing: {e}"))?;
        let safe = |p: &str| p.split('/').all(|s| !s.is_empty() && s != "." && s != "..");
        match entries.iter().find(|e| !safe(&e.path)) {
            Some(entry) => Err(format!("lists the path `{}`", entry.path)),
            None => Ok(entries),
        }
    }

    /// `meta` was taken before.
    pub(super) fn digest_file(&self, path: &Path, meta: &Metadata) -> Result<Digest, CacheError> {
        if let Some(digest) = self.index.lookup(path, meta, false) {
            return Ok(digest);
        }
        let digest =
            File::open(path).and_then(|f| hash(&f)).map_err(|e| CacheError::io("read", path, e))?;
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

/// Takes away the right to write, and leaves who may read as the umask had it.
fn protect(path: &Path) -> io::Result<()> {
    let readable = fs::metadata(path)?.permissions().mode() & 0o444;
    fs::set_permissions(path, fs::Permissions::from_mode(readable))
}

pub(super) fn metadata(path: &Path) -> Result<Metadata, CacheError> {
    fs::metadata(path).map_err(|e| CacheError::io("read", path, e))
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
