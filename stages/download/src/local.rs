//! Source `path`: a file or folder beside the pipeline, already staged by the engine.

use std::fs;
use std::path::Path;

use crate::digest::hash_file;
use crate::error::DownloadError;
use crate::meter::Meter;
use crate::name::base_name;
use crate::{Fetched, Landed};

/// Collects the files at `staged`, which the user knows as `path`.
pub(crate) fn fetch(
    path: &str,
    staged: &Path,
    meter: &mut Meter<'_>,
) -> Result<Fetched, DownloadError> {
    let kind = fs::metadata(staged).map_err(DownloadError::io("read", staged))?;
    let mut files = Vec::new();
    if kind.is_dir() {
        walk(staged, "", meter, &mut files)?;
        if files.is_empty() {
            return Err(DownloadError::Local { path: path.to_owned(), why: "is an empty folder" });
        }
    } else if kind.is_file() {
        files.push(land(staged, base_name(path), meter)?);
    } else {
        let why = "is neither a file nor a folder";
        return Err(DownloadError::Local { path: path.to_owned(), why });
    }
    Ok(Fetched { revision: None, files })
}

fn walk(
    folder: &Path,
    prefix: &str,
    meter: &mut Meter<'_>,
    files: &mut Vec<Landed>,
) -> Result<(), DownloadError> {
    let list = |folder: &Path| -> std::io::Result<Vec<fs::DirEntry>> {
        let mut entries: Vec<fs::DirEntry> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        Ok(entries)
    };
    for entry in list(folder).map_err(DownloadError::io("list", folder))? {
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            let why = "is a name that is not UTF-8";
            return Err(DownloadError::Local { path: path.display().to_string(), why });
        };
        let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let kind = fs::metadata(&path).map_err(DownloadError::io("read", &path))?;
        if kind.is_dir() {
            walk(&path, &name, meter, files)?;
        } else if kind.is_file() {
            files.push(land(&path, &name, meter)?);
        }
    }
    Ok(())
}

fn land(path: &Path, name: &str, meter: &mut Meter<'_>) -> Result<Landed, DownloadError> {
    meter.start(name);
    let hashed = hash_file(path).map_err(DownloadError::io("read", path))?;
    meter.linked += hashed.size;
    meter.finish(hashed.size);
    // What is staged may be a hard link to a file that the user edits in place.
    Ok(Landed { may_share: false, ..Landed::new(name, path.to_owned(), hashed) })
}
