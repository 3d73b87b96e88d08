//! Puts a file somewhere without copying its bytes where the file system can avoid it.
//!
//! Exec bits are part of a tree's digest and differ between mounts, so none survives.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::DownloadError;

const EXEC: u32 = 0o111;

/// Makes `to` hold the bytes of `from`: a reflink, else a hard link, else a copy. A hard link
/// shares later changes, so it is made only where `may_share` says that nobody edits `from`.
pub(crate) fn place(from: &Path, to: &Path, may_share: bool) -> Result<(), DownloadError> {
    let from = from.canonicalize().map_err(DownloadError::io("read", from))?;
    let mode = fs::metadata(&from).map_err(DownloadError::io("read", &from))?.permissions().mode();
    if reflink(&from, to).is_ok() {
        return Ok(());
    }
    let _ = fs::remove_file(to);
    if may_share && mode & EXEC == 0 && fs::hard_link(&from, to).is_ok() {
        return Ok(());
    }
    fs::copy(&from, to).map_err(DownloadError::io("copy a file to", to))?;
    if mode & EXEC != 0 {
        fs::set_permissions(to, Permissions::from_mode(mode & 0o777 & !EXEC))
            .map_err(DownloadError::io("set the mode of", to))?;
    }
    Ok(())
}

/// Shares the blocks of `from` copy-on-write, where the file system can.
fn reflink(from: &Path, to: &Path) -> std::io::Result<()> {
    let source = File::open(from)?;
    let target = File::create_new(to)?;
    rustix::fs::ioctl_ficlone(&target, &source)?;
    Ok(())
}
