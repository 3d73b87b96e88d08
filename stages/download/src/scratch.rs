//! What a killed attempt leaves behind for the next one: whole files by sha256 and cut ones.
//!
//! Only the own folder is written; those of earlier attempts are copied from, never appended to.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::{hash_bytes, hash_file};
use crate::error::DownloadError;
use crate::place::place;

/// The scratch folders of one stage run.
#[derive(Clone, Debug)]
pub(crate) struct Scratch {
    own: PathBuf,
    earlier: Vec<PathBuf>,
}

/// A file that is still arriving.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The bytes so far.
    pub(crate) data: PathBuf,
    tag: PathBuf,
}

/// What the server said of the bytes in a [`Part`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tag {
    /// Strong ETag, if the server gave one.
    pub(crate) etag: Option<String>,
}

impl Scratch {
    pub(crate) fn new(own: &Path, earlier: &[PathBuf]) -> Self {
        Self { own: own.to_owned(), earlier: earlier.to_vec() }
    }

    /// A folder of this attempt, made if it is missing.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf, DownloadError> {
        let folder = self.own.join(name);
        fs::create_dir_all(&folder).map_err(DownloadError::io("create the folder", &folder))?;
        Ok(folder)
    }

    /// A whole file with this sha256, from this or an earlier attempt.
    pub(crate) fn whole(&self, sha256: &str) -> Option<PathBuf> {
        std::iter::once(&self.own)
            .chain(&self.earlier)
            .map(|folder| folder.join("whole").join(sha256))
            .find(|path| hash_file(path).is_ok_and(|hashed| hashed.sha256 == sha256))
    }

    /// Where the file known as `key` arrives. Goes on from what an earlier attempt received.
    pub(crate) fn part(&self, key: &str) -> Result<Part, DownloadError> {
        let name = hash_bytes(key.as_bytes());
        let part = Part::in_folder(&self.folder("parts")?, &name);
        if part.data.exists() {
            return Ok(part);
        }
        let earlier = self
            .earlier
            .iter()
            .map(|folder| Part::in_folder(&folder.join("parts"), &name))
            .find(|part| part.data.exists());
        if let Some(earlier) = earlier {
            fs::copy(&earlier.data, &part.data)
                .map_err(DownloadError::io("copy a partial download to", &part.data))?;
            part.write_tag(&earlier.tag())?;
        }
        Ok(part)
    }

    /// Moves a complete part among the whole files and returns its new path.
    pub(crate) fn keep(&self, part: &Part, sha256: &str) -> Result<PathBuf, DownloadError> {
        let path = self.folder("whole")?.join(sha256);
        fs::rename(&part.data, &path).map_err(DownloadError::io("move a download to", &path))?;
        let _ = fs::remove_file(&part.tag);
        Ok(path)
    }

    /// Where a file of unknown hash is put together before [`Scratch::keep`].
    pub(crate) fn blank(&self, key: &str) -> Result<Part, DownloadError> {
        let part = Part::in_folder(&self.folder("parts")?, &hash_bytes(key.as_bytes()));
        part.discard()?;
        Ok(part)
    }
}

impl Part {
    fn in_folder(folder: &Path, name: &str) -> Self {
        Self { data: folder.join(format!("{name}.part")), tag: folder.join(format!("{name}.json")) }
    }

    /// What the server said of these bytes; empty where that is not known.
    pub(crate) fn tag(&self) -> Tag {
        let text = fs::read(&self.tag).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub(crate) fn write_tag(&self, tag: &Tag) -> Result<(), DownloadError> {
        let text = serde_json::to_vec(tag).map_err(|e| DownloadError::Internal(e.to_string()))?;
        fs::write(&self.tag, text).map_err(DownloadError::io("write", &self.tag))
    }

    /// Forgets what has arrived.
    pub(crate) fn discard(&self) -> Result<(), DownloadError> {
        for path in [&self.data, &self.tag] {
            match fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(DownloadError::io("remove", path)(error)),
            }
        }
        Ok(())
    }
}

/// Puts finished files into the output folder, all or none.
pub(crate) fn publish(files: &[crate::Landed], output: &Path) -> Result<(), DownloadError> {
    let filled = fill(files, output);
    if filled.is_err() {
        let _ = fs::remove_dir_all(output);
    }
    filled
}

fn fill(files: &[crate::Landed], output: &Path) -> Result<(), DownloadError> {
    fs::create_dir_all(output).map_err(DownloadError::io("create the folder", output))?;
    for file in files {
        if !crate::name::is_tree_name(&file.name) {
            return Err(DownloadError::UnsafeName { name: file.name.clone() });
        }
        let target = output.join(&file.name);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(DownloadError::io("create the folder", folder))?;
        }
        place(&file.path, &target, file.may_share)?;
    }
    Ok(())
}
