//! Bytes of a checkpoint: where they lie in a mapped file, or in memory of their own.

use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::CheckpointError;

/// A run of bytes. Those of a mapped file take no memory of the process and stay readable after
/// the file is unlinked; the system reads them when they are first used.
#[derive(Clone)]
pub struct Bytes(Place);

#[derive(Clone)]
enum Place {
    Own(Vec<u8>),
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Bytes {
    /// A part of a mapped file.
    ///
    /// # Panics
    /// Where the range is not inside the file.
    pub(crate) fn mapped(map: &Arc<Mmap>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= map.len(), "{range:?} of {}", map.len());
        Self(Place::Mapped(map.clone(), range))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Place::Own(bytes) => bytes,
            Place::Mapped(map, range) => &map[range.clone()],
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Place::Own(bytes))
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if matches!(self.0, Place::Own(_)) { "own" } else { "mapped" };
        write!(f, "{} {place} bytes", self.len())
    }
}

/// Maps a file for reading.
///
/// # Errors
/// [`CheckpointError::Io`] where it cannot be opened or is a folder.
#[expect(unsafe_code, reason = "a mapping is the only way to read gigabytes without a copy")]
pub(crate) fn map_file(path: &Path) -> Result<Arc<Mmap>, CheckpointError> {
    let io = |e| CheckpointError::io(path, e);
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    // SAFETY: the inputs of a stage are the cache's immutable objects, or files of the user's that
    // are checked not to have changed when it ends. Should one be cut short under the mapping all
    // the same, or its disk fail, reading ends the process with SIGBUS: the stage fails, and nothing
    // that it wrote is published.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Arc::new(map))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn mapped_bytes_outlive_the_name_of_their_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"0123456789").unwrap();
        let part = Bytes::mapped(&map_file(file.path()).unwrap(), 2..5);
        file.close().unwrap();
        assert_eq!((&*part, part.clone()), (&b"234"[..], Bytes::from(b"234".to_vec())));
        assert_eq!(format!("{part:?}"), "3 mapped bytes");
    }

    #[test]
    fn folders_are_not_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let error = map_file(dir.path()).unwrap_err().to_string();
        assert!(error.contains("directory"), "{error}");
    }
}
