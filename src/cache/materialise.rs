//! Objects back into files with names: for a stage to read, or for the user to keep.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use contract::OutputForm;

use super::object::hash;
use super::{Cache, CacheError, Unsound, durable};
use crate::digest::Digest;
use crate::record::OutputRecord;

/// A file that was laid out for a stage to read.
#[derive(Debug)]
pub(crate) struct LaidOut {
    path: PathBuf,
    digest: Digest,
    inode: (u64, u64),
    /// It is the object itself, by another name.
    linked: bool,
}

impl Cache {
    /// Puts an output at `to` for a stage to read: reflink, else hard link, else copy.
    ///
    /// # Errors
    /// [`CacheError`] where an object is missing or the disk refuses.
    pub(crate) fn materialise(
        &self,
        output: &OutputRecord,
        to: &Path,
    ) -> Result<Vec<LaidOut>, CacheError> {
        let mut laid_out = Vec::new();
        self.place(output, to, &mut |digest, path, exec| {
            let linked = self.lay_out(&self.object_path(digest), path, exec)?;
            let inode = inode(&fs::symlink_metadata(path)?);
            laid_out.push(LaidOut { path: path.to_owned(), digest, inode, linked });
            Ok(())
        })?;
        Ok(laid_out)
    }

    /// Whether what is laid out is the object itself.
    fn lay_out(&self, object: &Path, to: &Path, exec: bool) -> io::Result<bool> {
        if !self.no_reflinks.load(Ordering::Relaxed) {
            match reflink(object, to) {
                Ok(()) => return protect(to, exec).map(|()| false),
                // Every attempt costs an inode, and the file system does not learn.
                Err(_) => self.no_reflinks.store(true, Ordering::Relaxed),
            }
        }
        if !exec && durable::link(object, to).is_ok() {
            return Ok(true);
        }
        // Never onto a name that is there: it could be one of the object itself.
        io::copy(&mut File::open(object)?, &mut File::create_new(to)?)?;
        protect(to, exec).map(|()| false)
    }

    /// Checks that a file which was laid out still is what it was. What the object's name leads to
    /// says nothing about that: the object may have been removed or made anew meanwhile, while the
    /// stage went on with the one it had.
    ///
    /// # Errors
    /// What is wrong.
    pub(crate) fn is_intact(&self, laid_out: &LaidOut) -> Result<(), Unsound> {
        let LaidOut { path, digest, linked, .. } = laid_out;
        // The stage may remove what it has read, or put something else in its place.
        let found = fs::symlink_metadata(path).ok().filter(|meta| inode(meta) == laid_out.inode);
        let holds = || match hash(File::open(path).map_err(|e| Unsound::unreadable(path, &e))?) {
            Ok(found) if found == *digest => Ok(()),
            Ok(_) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                Err(Unsound::Damaged(format!("`{name}` holds other bytes than were stored")))
            }
            Err(e) => Err(Unsound::unreadable(path, &e)),
        };
        match found {
            Some(meta) if *linked => {
                let known = self.index.lookup(&self.object_path(*digest), &meta, true);
                if known == Some(*digest) { Ok(()) } else { holds() }
            }
            // A copy of an object that was looked at before and is still the same.
            Some(_) => self.inspect(*digest, None).or_else(|_| holds()),
            None => self.inspect(*digest, None),
        }
    }

    /// Puts a private, writable copy of an output at `to`.
    ///
    /// # Errors
    /// [`CacheError`] where an object is missing or the disk refuses.
    pub fn copy_out(&self, output: &OutputRecord, to: &Path) -> Result<(), CacheError> {
        self.place(output, to, &mut |digest, to, exec| {
            let object = self.object_path(digest);
            if reflink(&object, to).is_err() {
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
        put: &mut dyn FnMut(Digest, &Path, bool) -> io::Result<()>,
    ) -> Result<(), CacheError> {
        let mut one = |digest: Digest, to: &Path, exec: bool| {
            durable::create_parent(to)
                .and_then(|()| put(digest, to, exec))
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

fn inode(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

fn protect(path: &Path, exec: bool) -> io::Result<()> {
    let mode = if exec { 0o555 } else { 0o444 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}
