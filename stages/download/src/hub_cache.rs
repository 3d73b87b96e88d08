//! Files that Hugging Face tools have already put on this machine.
//!
//! Layout: `models--owner--name/{refs/<branch>, snapshots/<commit>/<path>, blobs/<etag>}`, where a
//! large file's etag is its sha256. Read only: this cache belongs to other tools.

use std::fs;
use std::path::{Path, PathBuf};

use crate::name::is_tree_name;
use crate::params::{HfSource, RepoType};
use crate::settings::Settings;

/// The part of the Hugging Face cache that holds one repository.
#[derive(Clone, Debug)]
pub(crate) struct HubCache {
    folder: PathBuf,
}

impl HubCache {
    pub(crate) fn of(settings: &Settings, source: &HfSource) -> Self {
        let kind = match source.repo_type {
            RepoType::Model => "models",
            RepoType::Dataset => "datasets",
        };
        let folder = format!("{kind}--{}", source.repo.replace('/', "--"));
        Self { folder: settings.hub_cache.join(folder) }
    }

    /// The commit that `revision` meant when it was last looked up, or `revision` itself.
    pub(crate) fn commit(&self, revision: &str) -> String {
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).unwrap_or_default();
        let commit = text.trim();
        // Only a plain name: the file is not ours, and its text becomes a path.
        let is_commit = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
        if is_commit { commit.to_owned() } else { revision.to_owned() }
    }

    /// Paths of the files cached of a commit, sorted.
    pub(crate) fn snapshot(&self, commit: &str) -> Vec<String> {
        let mut paths = Vec::new();
        walk(&self.folder.join("snapshots").join(commit), "", &mut paths);
        paths.sort();
        paths
    }

    /// Where the cache may hold a file: by the names of its blob, then by commit and path.
    pub(crate) fn candidates(&self, commit: &str, path: &str, blobs: &[&str]) -> Vec<PathBuf> {
        let is_plain = |blob: &&&str| blob.bytes().all(|b| b.is_ascii_alphanumeric());
        let blobs = blobs.iter().filter(is_plain).map(|blob| self.folder.join("blobs").join(blob));
        let snapshot = self.folder.join("snapshots").join(commit).join(path);
        blobs.chain([snapshot]).filter(|path| path.is_file()).collect()
    }
}

fn walk(folder: &Path, prefix: &str, paths: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let full = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&full, &path, paths);
        } else if full.is_file() && is_tree_name(&path) {
            paths.push(path);
        }
    }
}
