//! Objects that come from elsewhere: batches of small ones, partial big ones, and what a remote
//! said of a fingerprint.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Cache, CacheError, WorkDir, durable};
use crate::digest::{Digest, Fingerprint};

/// Bytes of a part that are hashed at a time.
const PIECE: usize = 256 << 10;
/// So many folders are flushed by themselves.
const FEW_FOLDERS: usize = 8;

/// Small objects on their way into the cache, made durable together: one flush of the file system
/// instead of one a file.
pub(crate) struct Batch<'a> {
    cache: &'a Cache,
    dir: WorkDir,
    staged: Vec<(Digest, PathBuf)>,
}

/// A big object that arrives in parts, in any order; what has arrived survives the process.
#[derive(Debug)]
pub(crate) struct Partial {
    path: PathBuf,
    /// One byte a part, 1 where it has arrived.
    marks: PathBuf,
    file: File,
    mark_file: File,
    arrived: Vec<bool>,
    part_bytes: u64,
    bytes: u64,
    /// Of the first `hashed` parts, which came in order; spares reading them again.
    hasher: blake3::Hasher,
    hashed: usize,
}

impl Cache {
    /// An empty batch.
    pub(crate) fn batch(&self) -> Result<Batch<'_>, CacheError> {
        Ok(Batch { cache: self, dir: self.work_dir()?, staged: Vec::new() })
    }

    /// A big object of known size, with the parts that an earlier transfer left. The caller holds
    /// the [`Cache::transfer_lease`] of the digest.
    pub(crate) fn partial(
        &self,
        digest: Digest,
        bytes: u64,
        part_bytes: u64,
    ) -> Result<Partial, CacheError> {
        let path = self.tmp_dir().join(format!("partial-{digest}-{part_bytes}"));
        let marks = path.with_extension("marks");
        let io = |e| CacheError::io("write", &path, e);
        durable::create_parent(&path).map_err(io)?;
        let open = |path: &Path| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(path).or_else(|error| {
                // Another user's, or cut off just before it took its place.
                if error.kind() == std::io::ErrorKind::PermissionDenied {
                    fs::remove_file(path)?;
                }
                options.open(path)
            })
        };
        let (file, mark_file) = (open(&path).map_err(io)?, open(&marks).map_err(io)?);
        let parts = usize::try_from(bytes.div_ceil(part_bytes)).unwrap_or(usize::MAX);
        let mut arrived = vec![false; parts];
        if file.metadata().map_err(io)?.len() == bytes {
            let found = fs::read(&marks).map_err(io)?;
            arrived.iter_mut().zip(found).for_each(|(mark, byte)| *mark = byte == 1);
        } else {
            mark_file.set_len(0).map_err(io)?;
            file.set_len(bytes).map_err(io)?;
        }
        let hasher = blake3::Hasher::new();
        Ok(Partial { path, marks, file, mark_file, arrived, part_bytes, bytes, hasher, hashed: 0 })
    }

    /// A whole big object takes its place.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] where the bytes are not those of the digest; then they are gone.
    pub(crate) fn adopt(&self, partial: Partial, digest: Digest) -> Result<(), CacheError> {
        let in_order = partial.hashed == partial.arrived.len();
        let Partial { path, marks, file, hasher, .. } = partial;
        let io = |e| CacheError::io("store", &path, e);
        let found = if in_order {
            Digest(*hasher.finalize().as_bytes())
        } else {
            File::open(&path).and_then(|f| super::object::hash(&f)).map_err(io)?
        };
        if found == digest {
            read_only(&file)
                .and_then(|mode| file.set_permissions(mode))
                .and_then(|()| file.sync_all())
                .map_err(io)?;
            self.install(&path, digest)?;
        } else {
            fs::remove_file(&path).map_err(io)?;
        }
        let _ = fs::remove_file(&marks);
        if found == digest {
            return Ok(());
        }
        Err(CacheError::Damaged("holds other bytes than its digest says".to_owned()))
    }

    /// A name for the lease under which one process at a time fetches a big object.
    pub(crate) fn transfer_lease(digest: Digest) -> Fingerprint {
        Fingerprint(Digest::of(format!("transfer {digest}").as_bytes()).0)
    }

    /// Reads a piece of an object.
    pub(crate) fn read_object(
        &self,
        digest: Digest,
        from: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, CacheError> {
        let path = self.object_path(digest);
        let io = |e| CacheError::io("read", &path, e);
        let mut buffer = vec![0; bytes];
        File::open(&path).and_then(|f| f.read_exact_at(&mut buffer, from)).map_err(io)?;
        Ok(buffer)
    }

    /// Size of a stored object.
    pub(crate) fn object_bytes(&self, digest: Digest) -> Result<u64, CacheError> {
        let path = self.object_path(digest);
        fs::metadata(&path).map(|m| m.len()).map_err(|e| CacheError::io("read", &path, e))
    }

    fn transfer_note(&self, what: &str) -> PathBuf {
        self.tmp_dir().join(what)
    }

    /// Remembers how far the upload of an object has come; only time is lost where that fails.
    pub(crate) fn keep_upload(&self, digest: Digest, state: Option<&[u8]>) {
        self.keep_note(&self.transfer_note(&format!("upload-{digest}")), state);
    }

    /// What [`Cache::keep_upload`] remembered.
    pub(crate) fn upload(&self, digest: Digest) -> Option<Vec<u8>> {
        fs::read(self.transfer_note(&format!("upload-{digest}"))).ok()
    }

    /// Remembers why the remote's record of a fingerprint was refused, for plans, which ask nobody.
    pub(crate) fn set_refusal(&self, fingerprint: Fingerprint, why: Option<&str>) {
        let path = self.transfer_note(&format!("refused-{fingerprint}"));
        self.keep_note(&path, why.map(str::as_bytes));
    }

    /// Why the remote's record of a fingerprint was refused when it was last asked.
    pub fn refusal(&self, fingerprint: Fingerprint) -> Option<String> {
        let path = self.transfer_note(&format!("refused-{fingerprint}"));
        fs::read_to_string(path).ok()
    }

    fn keep_note(&self, path: &Path, text: Option<&[u8]>) {
        let kept = match text {
            Some(text) => {
                let staged = self.tmp_dir().join(durable::unique_name());
                durable::create_parent(&staged)
                    .and_then(|()| fs::write(&staged, text))
                    .and_then(|()| fs::rename(&staged, path))
            }
            None if path.exists() => fs::remove_file(path),
            None => Ok(()),
        };
        if let Err(error) = kept {
            tracing::debug!(%error, path = %path.display(), "could not keep a note");
        }
    }
}

impl Batch<'_> {
    /// Takes an object whose digest was checked.
    pub(crate) fn add(&mut self, digest: Digest, bytes: &[u8]) -> Result<(), CacheError> {
        let path = self.dir.path().join(digest.to_hex());
        let write = || {
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o444);
            options.open(&path)?.write_all(bytes)
        };
        write().map_err(|e| CacheError::io("write", &path, e))?;
        self.staged.push((digest, path));
        Ok(())
    }

    /// How many objects it holds.
    pub(crate) fn len(&self) -> usize {
        self.staged.len()
    }

    /// Gives all of them their places, durably.
    pub(crate) fn commit(self) -> Result<(), CacheError> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let io = |e| CacheError::io("flush", self.dir.path(), e);
        let dir = File::open(self.dir.path()).map_err(io)?;
        let together = durable::flushes_all(&dir) && rustix::fs::syncfs(&dir).is_ok();
        if !together {
            for (_, path) in &self.staged {
                File::open(path).and_then(|f| f.sync_all()).map_err(io)?;
            }
        }
        let objects = self.cache.root.join("objects-v1");
        let mut folders = BTreeSet::from([self.cache.root.clone(), objects]);
        for (digest, path) in &self.staged {
            self.cache.settle(path, *digest)?;
            folders.extend(self.cache.object_path(*digest).parent().map(Path::to_owned));
        }
        // The names: folder by folder only where there are few of them.
        if together && folders.len() > FEW_FOLDERS && rustix::fs::syncfs(&dir).is_ok() {
            return Ok(());
        }
        for folder in folders {
            durable::sync_dir(&folder).map_err(|e| CacheError::io("flush", &folder, e))?;
        }
        Ok(())
    }
}

impl Partial {
    /// Parts that have not arrived: index, first byte, end.
    pub(crate) fn missing(&self) -> Vec<(usize, std::ops::Range<u64>)> {
        let open = self.arrived.iter().enumerate().filter(|(_, arrived)| !**arrived);
        let range = |i: usize| {
            let from = i as u64 * self.part_bytes;
            from..self.bytes.min(from + self.part_bytes)
        };
        open.map(|(i, _)| (i, range(i))).collect()
    }

    /// A part was written: marks it, and hashes what is whole from the beginning on.
    pub(crate) fn arrived(&mut self, part: usize) -> Result<(), CacheError> {
        // The mark comes after the bytes; a power cut in between is caught by the digest.
        let marked = self.mark_file.write_all_at(&[1], part as u64);
        self.arrived[part] = true;
        marked.and_then(|()| self.absorb()).map_err(|e| CacheError::io("write", &self.path, e))
    }

    fn absorb(&mut self) -> std::io::Result<()> {
        let mut buffer = vec![0; PIECE];
        while self.arrived.get(self.hashed) == Some(&true) {
            let mut at = self.hashed as u64 * self.part_bytes;
            let end = self.bytes.min(at + self.part_bytes);
            while at < end {
                let piece = &mut buffer[..PIECE.min((end - at) as usize)];
                self.file.read_exact_at(piece, at)?;
                self.hasher.update(piece);
                at += piece.len() as u64;
            }
            self.hashed += 1;
        }
        Ok(())
    }

    /// Another handle of the file.
    pub(crate) fn file(&self) -> std::io::Result<File> {
        self.file.try_clone()
    }

    /// Takes bytes at a place, for a server that gives no parts.
    pub(crate) fn write_at(&self, bytes: &[u8], from: u64) -> Result<(), CacheError> {
        self.file.write_all_at(bytes, from).map_err(|e| CacheError::io("write", &self.path, e))
    }
}

fn read_only(file: &File) -> std::io::Result<fs::Permissions> {
    use std::os::unix::fs::PermissionsExt;
    let mode = file.metadata()?.permissions().mode();
    Ok(fs::Permissions::from_mode(mode & 0o444))
}
