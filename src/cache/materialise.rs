//! Objects back into files with names: for a stage to read, or for the user to keep.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use contract::OutputForm;

use super::{Cache, CacheError, durable};
use crate::digest::Digest;
use crate::record::OutputRecord;

impl Cache {
    /// Puts an output at `to` for a stage to read: reflink, else hard link, else copy.
    ///
    /// # Errors
    /// [`CacheError`] where an object is missing or the disk refuses.
    pub fn materialise(&self, output: &OutputRecord, to: &Path) -> Result<(), CacheError> {
        self.place(output, to, &|object, to, exec| {
            if !self.no_reflinks.load(Ordering::Relaxed) {
                match reflink(object, to) {
                    Ok(()) => return protect(to, exec),
                    // Every attempt costs an inode, and the file system does not learn.
                    Err(_) => self.no_reflinks.store(true, Ordering::Relaxed),
                }
            }
            if !exec && durable::link(object, to).is_ok() {
                return Ok(());
            }
            // Never onto a name that is there: it could be one of the object itself.
            io::copy(&mut File::open(object)?, &mut File::create_new(to)?)?;
            protect(to, exec)
        })
    }

    /// Puts a private, writable copy of an output at `to`.
    ///
    /// # Errors
    /// [`CacheError`] where an object is missing or the disk refuses.
    pub fn copy_out(&self, output: &OutputRecord, to: &Path) -> Result<(), CacheError> {
        self.place(output, to, &|object, to, exec| {
            if reflink(object, to).is_err() {
                // A plain copy would inherit the object's read-only mode.
                io::copy(&mut File::open(object)?, &mut File::create(to)?)?;
            }
            if exec {
                let mode = fs::metadata(to)?.permissions().mode();
                fs::set_permissions(to, fs::Permissions::from_mode(mode | 0o111))?;
            }
            Ok(())
        })
    }

    /// Writes a file into the working area, beside what [`Cache::materialise`] put there.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses.
    pub fn write_working_file(&self, to: &Path, text: &[u8]) -> Result<(), CacheError> {
        durable::create_parent(to)
            .and_then(|()| fs::write(to, text))
            .map_err(|e| CacheError::io("write", to, e))
    }

    /// Removes a file or folder that `copy_out` is about to replace.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses.
    pub fn remove_copy(&self, path: &Path) -> Result<(), CacheError> {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.map_err(|e| CacheError::io("remove", path, e))
    }

    fn place(
        &self,
        output: &OutputRecord,
        to: &Path,
        put: &dyn Fn(&Path, &Path, bool) -> io::Result<()>,
    ) -> Result<(), CacheError> {
        let one = |digest: Digest, to: &Path, exec: bool| {
            durable::create_parent(to)
                .and_then(|()| put(&self.object_path(digest), to, exec))
                .map_err(|e| CacheError::io("make", to, e))
        };
        match output.form {
            OutputForm::File => one(output.digest, to, output.exec),
            OutputForm::Tree => {
                let object = output.digest.short();
                let entries =
                    self.read_tree(output.digest).map_err(|e| e.of(&format!("object {object}")))?;
                fs::create_dir_all(to).map_err(|e| CacheError::io("make", to, e))?;
                entries.iter().try_for_each(|e| one(e.digest, &to.join(&e.path), e.exec))
            }
        }
    }
}

/// A copy that shares blocks until one of the two is written; few file systems can.
pub(super) fn reflink(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::options().write(true).create_new(true).open(to)?;
    rustix::fs::ioctl_ficlone(&target, &source).map_err(|e| {
        let _ = fs::remove_file(to);
        e.into()
    })
}

fn protect(path: &Path, exec: bool) -> io::Result<()> {
    let mode = if exec { 0o555 } else { 0o444 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}
