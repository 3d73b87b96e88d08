//! Writing files so that a power cut leaves either nothing or all of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
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
    // What is above a plain relative name.
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

/// Whether flushing the file system is more than an answer: FUSE says yes and asks nobody.
#[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "only remotes store in batches"))]
pub(crate) fn flushes_all(file: &File) -> bool {
    const FUSE: u64 = 0x6573_5546;
    rustix::fs::fstatfs(file).is_ok_and(|about| about.f_type as u64 & 0xffff_ffff != FUSE)
}

/// Renames a synced file to a name that must be free: `Ok(false)` where it is taken.
pub(crate) fn rename_exclusive(from: &Path, to: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    let staged = identity(from);
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_exclusive(from, to),
        Err(Errno::NOENT) if has_arrived(staged, to) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The same by a hard link, for file systems without an exclusive rename (NFS).
fn link_exclusive(from: &Path, to: &Path) -> io::Result<bool> {
    match link(from, to) {
        Ok(()) => {
            // It has its name; one more in `tmp` is only untidy.
            let _ = fs::remove_file(from);
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // No hard links either. Whoever comes second in a race replaces a file with its equal, and
        // a lease only saves work.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported
            ) =>
        {
            if to.try_exists()? {
                return Ok(false);
            }
            match rename(from, to) {
                // It had arrived, and somebody who did not see it has put theirs in its place.
                Err(error) if error.kind() == io::ErrorKind::NotFound && is_replaced(from, to) => {
                    Ok(false)
                }
                other => other.map(|()| true),
            }
        }
        Err(error) => Err(error),
    }
}

/// A hard link. A network file system repeats a request whose answer was lost, and then says that
/// the name is taken: by ourselves.
pub(crate) fn link(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error)
            if error.kind() == io::ErrorKind::AlreadyExists && has_arrived(identity(from), to) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// A rename that replaces, likewise: repeated, it does not find what it has renamed already.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let staged = identity(from);
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && has_arrived(staged, to) => Ok(()),
        other => other,
    }
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether a file has got a name although the file system says otherwise.
fn has_arrived(file: Option<(u64, u64)>, to: &Path) -> bool {
    let is_there = || identity(to).is_some_and(|there| file == Some(there));
    is_there() || {
        look_again(to.parent().unwrap_or(Path::new(".")));
        is_there()
    }
}

/// Whether a file has gone and another lies where it should have got.
fn is_replaced(from: &Path, to: &Path) -> bool {
    look_again(from.parent().unwrap_or(Path::new(".")));
    look_again(to.parent().unwrap_or(Path::new(".")));
    identity(from).is_none() && identity(to).is_some()
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let meta = fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Reads a file that may be replaced at any time: what was opened may be gone on the server.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    again(|| fs::read(path))
}

/// Does something once more where a network file system says that a file was replaced meanwhile.
pub(crate) fn again<T>(mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..4 {
        match act() {
            Err(error) if error.kind() == io::ErrorKind::StaleNetworkFileHandle => {}
            other => return other,
        }
    }
    act()
}

/// Makes clients of a network file system see what others have put into a folder: they keep names,
/// and that there is none, until a folder is opened.
pub(crate) fn look_again(dir: &Path) {
    for dir in dir.parent().into_iter().chain([dir]) {
        drop(File::open(dir));
    }
}

/// Whether a name is what a network file system leaves of an open file that was removed.
pub(crate) fn is_left_open(name: &str) -> bool {
    let hex = |rest: &str| rest.len() >= 16 && rest.bytes().all(|b| b.is_ascii_hexdigit());
    [".nfs", ".fuse_hidden"].iter().any(|start| name.strip_prefix(start).is_some_and(hex))
}

/// Sets the times of a file to now, which its group may do where it may write.
pub(crate) fn touch(path: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    Ok(utimensat(CWD, path, &times, AtFlags::empty())?)
}

/// Creates a folder where it is missing; those above it durably.
pub(crate) fn create_folder(dir: &Path) -> io::Result<()> {
    match make(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_synced_parent(dir)?;
            make(dir).map(drop)
        }
        made => made.map(drop),
    }
}

/// Whether the folder was not there before.
fn make(dir: &Path) -> io::Result<bool> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        made => made.map(|()| {
            share(dir, 0o070);
            true
        }),
    }
}

/// Opens what was just made to the group as far as the folder around it is, where that folder is
/// made for a group: setgid and writable for it. A umask of 077 says nothing about such a folder,
/// and would keep everybody else out of it.
pub(crate) fn share(made: &Path, bits: u32) {
    let around = made.parent().and_then(|folder| fs::metadata(folder).ok());
    let Some(around) = around.map(|meta| meta.mode()).filter(|mode| mode & 0o2020 == 0o2020) else {
        return;
    };
    let Ok(mode) = fs::symlink_metadata(made).map(|meta| meta.mode() & 0o7777) else { return };
    let shared = mode | (around & bits);
    if shared != mode {
        // Where that is refused it stays as the umask had it.
        let _ = fs::set_permissions(made, fs::Permissions::from_mode(shared));
    }
}

/// Creates the parent of `path` where it is missing, likewise.
pub(crate) fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), create_folder)
}

/// Creates the parent of `path` where it is missing, durably: what is synced into a folder is lost
/// with the folder's own name.
pub(crate) fn create_synced_parent(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let made = match make(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_synced_parent(parent)?;
            make(parent)?
        }
        made => made?,
    };
    if made { sync_dir(parent.parent().unwrap_or(Path::new("/"))) } else { Ok(()) }
}

/// Writes `bytes` to a fresh file in `tmp`, synced.
pub(crate) fn stage_bytes(tmp: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
    let path = tmp.join(unique_name());
    create_parent(&path)?;
    let write = || {
        let mut file = File::options().write(true).create_new(true).open(&path)?;
        share(&path, 0o060);
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
        create_synced_parent(path)?;
        rename(&staged, path)?;
        sync_dir(path.parent().unwrap_or(Path::new(".")))
    };
    put().inspect_err(|_| drop(fs::remove_file(&staged)))
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
