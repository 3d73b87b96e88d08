//! Writing files so that a power cut leaves either nothing or all of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A file or folder name that no other process or thread uses.
pub(crate) fn unique_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let host = rustix::system::uname();
    let host = blake3::hash(host.nodename().to_bytes()).to_hex();
    format!("{now:x}-{}-{}-{count}", &host[..8], std::process::id())
}

/// Makes names inside `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Renames a synced file to a name that must be free: `Ok(false)` where it is taken.
pub(crate) fn rename_exclusive(from: &Path, to: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            link_exclusive(from, to)
        }
        Err(error) => Err(error.into()),
    }
}

/// The same by a hard link, for file systems without an exclusive rename (NFS).
fn link_exclusive(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::hard_link(from, to) {
        Ok(()) => {
            fs::remove_file(from)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Creates the parent of `path` where it is missing.
pub(crate) fn create_parent(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    match fs::create_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(parent),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Writes `bytes` to a fresh file in `tmp`, synced.
pub(crate) fn stage_bytes(tmp: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
    let path = tmp.join(unique_name());
    create_parent(&path)?;
    let write = || {
        let mut file = File::options().write(true).create_new(true).open(&path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().inspect_err(|_| drop(fs::remove_file(&path)))?;
    Ok(path)
}

/// Replaces `path` with `bytes` in one step, durably.
pub(crate) fn replace(tmp: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let staged = stage_bytes(tmp, bytes)?;
    let put = || {
        create_parent(path)?;
        fs::rename(&staged, path)?;
        sync_dir(path.parent().unwrap_or(Path::new(".")))
    };
    put().inspect_err(|_| drop(fs::remove_file(&staged)))
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
