//! sha256 of files and bytes, as hubs and package indexes state it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Bytes read at a time.
pub(crate) const CHUNK: usize = 256 * 1024;

/// A file's length in bytes and its lowercase hex sha256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hashed {
    pub(crate) size: u64,
    pub(crate) sha256: String,
}

/// Reads the file to its end.
pub(crate) fn hash_file(path: &Path) -> std::io::Result<Hashed> {
    let mut hasher = Sha256::new();
    let size = feed(&mut hasher, path)?;
    Ok(Hashed { size, sha256: hex(hasher) })
}

/// Feeds a whole file to `hasher` and returns its length.
pub(crate) fn feed(hasher: &mut Sha256, path: &Path) -> std::io::Result<u64> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(size);
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
}

/// Lowercase hex sha256 of some bytes.
pub(crate) fn hash_bytes(bytes: &[u8]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(bytes);
    hex(hasher)
}

/// The hasher's result as lowercase hex.
pub(crate) fn hex(hasher: Sha256) -> String {
    use std::fmt::Write as _;
    hasher.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
