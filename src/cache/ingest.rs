//! What a stage made, into the objects.
//!
//! Only a file that nobody else knows is moved there. One with another name or another owner is
//! copied and stays as it is, and nothing that a link leads out of an output to is touched.

use std::collections::HashMap;
use std::fs::{self, File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use contract::OutputForm;
use rustix::fs::OFlags;

use super::folder::{Found, MAX_DEPTH, utf8_name};
use super::object::{Stored, hash, listing};
use super::{Cache, CacheError, TreeEntry, durable};
use crate::digest::Digest;

/// Files from this size on are flushed while they are hashed: one keeps the disk busy, the other
/// a core.
const OVERLAP_BYTES: u64 = 4 << 20;

/// What a file that this process makes in the cache is like: the umask, folders that hand their
/// group on, and the server of a network file system have their say.
#[derive(Debug)]
pub(super) struct Ours {
    mode: u32,
    user: u32,
    group: u32,
}

impl Cache {
    /// Takes a file or folder, which must be in this cache's own working area, into the objects.
    /// Links inside a folder are stored as copies of what they point to.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses, or there is what cannot be kept (links that lead out,
    /// sockets, names that are not UTF-8). Objects stored until then stay, unreferenced.
    pub fn ingest(&self, path: &Path, form: OutputForm) -> Result<Stored, CacheError> {
        let meta = fs::symlink_metadata(path).map_err(|e| CacheError::io("read", path, e))?;
        if meta.is_symlink() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Err(link(&name, path, "stands where the output should be"));
        }
        match form {
            OutputForm::File => self.ingest_file(path),
            OutputForm::Tree => self.ingest_tree(path),
        }
    }

    fn ingest_tree(&self, root: &Path) -> Result<Stored, CacheError> {
        let mut taken = HashMap::new();
        let mut entries = Vec::new();
        for Found { name, path } in output_files(root)? {
            let stored = match taken.get(&path) {
                Some(stored) => *stored,
                None => self.ingest_file(&path)?,
            };
            taken.insert(path, stored);
            let Stored { digest, bytes, exec } = stored;
            entries.push(TreeEntry { path: name, exec, bytes, digest });
        }
        let listing = listing(&entries);
        let digest = Digest::of(&listing);
        let (tmp, mode) = (self.tmp_dir(), self.ours()?.mode);
        let staged = durable::stage_bytes(&tmp, &listing)
            .and_then(|staged| {
                fs::set_permissions(&staged, fs::Permissions::from_mode(mode)).map(|()| staged)
            })
            .map_err(|e| CacheError::io("write to", &tmp, e))?;
        self.install(&staged, digest)?;
        let bytes = entries.iter().map(|e| e.bytes).sum();
        Ok(Stored { digest, bytes, exec: false })
    }

    fn ingest_file(&self, path: &Path) -> Result<Stored, CacheError> {
        let io = |doing| move |e| CacheError::io(doing, path, e);
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let opened = File::options().read(true).custom_flags(flags).open(path);
        let file = opened.map_err(|e| CacheError::outside("open", path, e))?;
        let meta = file.metadata().map_err(io("read"))?;
        if !meta.is_file() {
            return Err(CacheError::Unfit(format!("{} is not a regular file", path.display())));
        }
        let exec = meta.mode() & 0o100 != 0;
        let Ours { mode, user, group } = self.ours()?;
        let alone = meta.nlink() == 1
            && meta.uid() == *user
            && (meta.gid() == *group || fchown(&file, None, Some(*group)).is_ok());
        if !alone {
            let digest = self.ingest_copy(path, &file, &meta)?;
            return Ok(Stored { digest, bytes: meta.len(), exec });
        }
        let digest = hash_and_flush(path, &file, meta.len())?;
        file.set_permissions(fs::Permissions::from_mode(*mode)).map_err(io("protect"))?;
        self.install(path, digest)?;
        Ok(Stored { digest, bytes: meta.len(), exec })
    }

    /// Stores the bytes of a file that has other names, or that belongs to somebody else. What is
    /// an object already, as an input that a stage linked to its output, is found again.
    fn ingest_copy(
        &self,
        path: &Path,
        mut file: &File,
        meta: &Metadata,
    ) -> Result<Digest, CacheError> {
        let io = |doing| move |e| CacheError::io(doing, path, e);
        let digest = hash(file).map_err(io("read"))?;
        let object = fs::metadata(self.object_path(digest));
        if object.is_ok_and(|object| (object.dev(), object.ino()) == (meta.dev(), meta.ino())) {
            self.install(path, digest)?;
            return Ok(digest);
        }
        let staged = self.tmp_dir().join(durable::unique_name());
        let mut copy = || {
            io::Seek::rewind(&mut file)?;
            let mut options = File::options();
            let mut to = options.write(true).create_new(true).mode(0o444).open(&staged)?;
            io::copy(&mut file, &mut to)?;
            to.sync_all()?;
            hash(File::open(&staged)?)
        };
        let copied = copy().inspect_err(|_| drop(fs::remove_file(&staged))).map_err(io("copy"))?;
        if copied != digest {
            let _ = fs::remove_file(&staged);
            return Err(CacheError::Unfit(format!("{} changes all the time", path.display())));
        }
        self.install(&staged, digest)?;
        Ok(digest)
    }

    fn ours(&self) -> Result<&Ours, CacheError> {
        if let Some(ours) = self.ours.get() {
            return Ok(ours);
        }
        let path = self.tmp_dir().join(durable::unique_name());
        let probe = || {
            durable::create_parent(&path)?;
            let mut options = File::options();
            let made = options.write(true).create_new(true).mode(0o444).open(&path)?;
            let meta = made.metadata()?;
            durable::remove(&path)?;
            Ok(Ours { mode: meta.mode() & 0o444 | 0o400, user: meta.uid(), group: meta.gid() })
        };
        let ours = probe().map_err(|e| CacheError::io("create", &path, e))?;
        Ok(self.ours.get_or_init(|| ours))
    }
}

fn hash_and_flush(path: &Path, file: &File, bytes: u64) -> Result<Digest, CacheError> {
    let io = |doing| move |e| CacheError::io(doing, path, e);
    if bytes < OVERLAP_BYTES {
        let digest = hash(file).map_err(io("read"))?;
        file.sync_all().map_err(io("flush"))?;
        return Ok(digest);
    }
    std::thread::scope(|scope| {
        let flushed = scope.spawn(|| file.sync_all());
        let digest = hash(file).map_err(io("read"));
        let panicked = |_| Err(io::Error::other("the flush did not end"));
        flushed.join().unwrap_or_else(panicked).map_err(io("flush"))?;
        digest
    })
}

/// A folder of an output on the way down.
struct Level {
    /// Name below the output, with `/` at its end.
    prefix: String,
    /// Where it really is, all links resolved.
    real: PathBuf,
    /// The real folders whose links lead here.
    through: Vec<PathBuf>,
}

/// Every file of an output, sorted by name; the path of a link is that of its target.
fn output_files(root: &Path) -> Result<Vec<Found>, CacheError> {
    let root = root.canonicalize().map_err(|e| CacheError::outside("find", root, e))?;
    let mut found = Vec::new();
    let mut open = vec![Level { prefix: String::new(), real: root.clone(), through: Vec::new() }];
    while let Some(level) = open.pop() {
        let io = |e| CacheError::outside("list", &level.real, e);
        if level.prefix.matches('/').count() > MAX_DEPTH {
            return Err(CacheError::Unfit(format!("`{}` is nested too deeply", level.prefix)));
        }
        for entry in fs::read_dir(&level.real).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = utf8_name(&entry)?;
            if durable::is_left_open(&name) {
                continue;
            }
            let name = format!("{}{name}", level.prefix);
            let (mut path, mut kind) = (entry.path(), entry.file_type().map_err(io)?);
            let mut through = level.through.clone();
            if kind.is_symlink() {
                let target = link_target(&name, &path, &root, &level)?;
                kind = fs::metadata(&target).map_err(io)?.file_type();
                path = target;
                through.push(level.real.clone());
            }
            if kind.is_dir() {
                open.push(Level { prefix: format!("{name}/"), real: path, through });
            } else if kind.is_file() {
                found.push(Found { name, path });
            } else {
                let what = special(kind);
                return Err(CacheError::Unfit(format!(
                    "`{name}` is {what}; only files and folders can be stored"
                )));
            }
        }
    }
    found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Where a link leads, which must be inside the output and no way around in circles.
fn link_target(name: &str, path: &Path, root: &Path, level: &Level) -> Result<PathBuf, CacheError> {
    let target = match path.canonicalize() {
        Ok(target) => target,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(link(name, path, "leads nowhere"));
        }
        Err(e) => return Err(CacheError::outside("follow", path, e)),
    };
    if !target.starts_with(root) {
        return Err(link(name, path, "leads out of the output"));
    }
    if level.through.iter().chain([&level.real]).any(|above| above.starts_with(&target)) {
        return Err(link(name, path, "leads back to a folder that it is in"));
    }
    Ok(target)
}

fn link(name: &str, path: &Path, what: &'static str) -> CacheError {
    let target = fs::read_link(path).unwrap_or_default().display().to_string();
    CacheError::Link { name: name.to_owned(), target, what }
}

fn special(kind: FileType) -> &'static str {
    if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a named pipe"
    } else {
        "a device"
    }
}
