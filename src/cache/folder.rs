//! Folders of users: their files, found, looked up and hashed by several threads.

use std::fs;
use std::num::NonZero;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::object::{listing, metadata};
use super::{Cache, CacheError, TreeEntry, durable};
use crate::digest::Digest;

/// Folders nested deeper than this are refused.
pub(super) const MAX_DEPTH: usize = 64;
/// A thread pays from this many files on.
const FILES_PER_THREAD: usize = 500;
/// More threads than this only wait for the file system.
const MAX_THREADS: usize = 8;
/// Listings that are remembered at the same time.
const REMEMBERED: usize = 4;

/// A file below a folder.
pub(super) struct Found {
    /// Path below the folder, with `/`.
    pub(super) name: String,
    pub(super) path: PathBuf,
}

/// The listings of the folders that this process looked at last: an explanation reads them again.
#[derive(Debug, Default)]
pub(super) struct Listings(Mutex<Vec<(Digest, Arc<Vec<TreeEntry>>)>>);

impl Listings {
    pub(super) fn get(&self, digest: Digest) -> Option<Arc<Vec<TreeEntry>>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(known, _)| *known == digest).map(|(_, entries)| Arc::clone(entries))
    }

    fn put(&self, digest: Digest, entries: Vec<TreeEntry>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(known, _)| *known != digest);
        if known.len() == REMEMBERED {
            known.remove(0);
        }
        known.push((digest, Arc::new(entries)));
    }
}

impl Cache {
    /// Digest of a user's file or folder, through the stat index; folders hash as trees do.
    ///
    /// # Errors
    /// [`CacheError`] naming the file that cannot be read.
    pub fn digest_local(&self, path: &Path) -> Result<Digest, CacheError> {
        let meta = metadata(path)?;
        if !meta.is_dir() {
            return self.digest_file(path, &meta);
        }
        let entries = self.list_local(path)?;
        let digest = Digest::of(&listing(&entries));
        self.listings.put(digest, entries);
        Ok(digest)
    }

    /// The files of a user's folder, hashed through the stat index.
    ///
    /// # Errors
    /// [`CacheError`] naming the file that cannot be read.
    pub fn list_local(&self, path: &Path) -> Result<Vec<TreeEntry>, CacheError> {
        let mut found = files_below(path)?;
        let cores = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS);
        let threads = cores.min(found.len() / FILES_PER_THREAD).max(1);
        let share = found.len().div_ceil(threads).max(1);
        let chunks = found.chunks_mut(share);
        let parts: Vec<Result<Vec<TreeEntry>, CacheError>> = thread::scope(|scope| {
            let entries = |chunk: &mut [Found]| chunk.iter_mut().map(|f| self.entry(f)).collect();
            let mut chunks = chunks.collect::<Vec<_>>().into_iter();
            let first = chunks.next();
            let others: Vec<_> = chunks.map(|chunk| scope.spawn(move || entries(chunk))).collect();
            let first = first.map(entries);
            let ended = |thread: thread::ScopedJoinHandle<'_, _>| {
                let died = "a thread that hashed files panicked";
                thread.join().unwrap_or_else(|_| Err(CacheError::Unfit(died.to_owned())))
            };
            first.into_iter().chain(others.into_iter().map(ended)).collect()
        });
        let mut entries = Vec::with_capacity(found.len());
        for part in parts {
            entries.extend(part?);
        }
        Ok(entries)
    }

    fn entry(&self, file: &mut Found) -> Result<TreeEntry, CacheError> {
        let meta = metadata(&file.path)?;
        let digest = self.digest_file(&file.path, &meta)?;
        let exec = meta.mode() & 0o100 != 0;
        Ok(TreeEntry { path: std::mem::take(&mut file.name), exec, bytes: meta.len(), digest })
    }
}

/// Every regular file below a folder, sorted by name; links are followed.
fn files_below(root: &Path) -> Result<Vec<Found>, CacheError> {
    let mut found = Vec::new();
    let mut open = vec![(String::new(), root.to_owned())];
    while let Some((prefix, dir)) = open.pop() {
        let io = |e| CacheError::outside("list", &dir, e);
        if prefix.matches('/').count() > MAX_DEPTH {
            let shown = dir.display();
            return Err(CacheError::Unfit(format!(
                "{shown} is nested too deeply, or a link loops"
            )));
        }
        for entry in fs::read_dir(&dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            let path = entry.path();
            let name = utf8_name(&entry)?;
            if durable::is_left_open(&name) {
                continue;
            }
            let name = format!("{prefix}{name}");
            let kind = entry.file_type().map_err(io)?;
            let kind = if kind.is_symlink() { metadata(&path)?.file_type() } else { kind };
            if kind.is_dir() {
                open.push((format!("{name}/"), path));
            } else if kind.is_file() {
                found.push(Found { name, path });
            } else {
                let shown = path.display();
                return Err(CacheError::Unfit(format!("{shown} is neither a file nor a folder")));
            }
        }
    }
    found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The name of an entry, which must be text.
pub(super) fn utf8_name(entry: &fs::DirEntry) -> Result<String, CacheError> {
    entry.file_name().into_string().map_err(|_| {
        CacheError::Unfit(format!("{} has a name that is not UTF-8", entry.path().display()))
    })
}
