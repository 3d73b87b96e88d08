//! What the stages of a project last ran as, for explanations, and where its logs are.
//!
//! A project is a pipeline in a folder of a host, as for [`super::roots`]. One that has not run a
//! stage itself, a fresh clone for example, is explained by whoever of the same pipeline ran it
//! last.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::collect::{age, modified};
use super::{Cache, CacheError, durable};
use crate::digest::Fingerprint;
use crate::record::Record;

/// What does not change says this often that it is still so.
const RENEWED: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a stage last ran as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Last {
    pub(super) kind: String,
    pub(super) fingerprint: Fingerprint,
}

/// Whose explanations and logs are wanted.
#[derive(Debug)]
pub(super) struct Owner {
    key: String,
    /// Folders of other projects with a pipeline of this name, looked up once.
    others: OnceLock<Vec<PathBuf>>,
}

/// What tells one pipeline in one folder of one host from others.
pub(super) fn project_key(pipeline: &str, dir: &Path) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = blake3::hash(format!("{host}\n{}\n{pipeline}", dir.display()).as_bytes());
    name.to_hex()[..16].to_owned()
}

impl Cache {
    /// The same cache as a project uses it.
    #[must_use]
    pub fn of_project(mut self, pipeline: &str, dir: &Path) -> Self {
        let key = project_key(pipeline, dir);
        self.owner = Some(Owner { key, others: OnceLock::new() });
        self
    }

    /// The record that a stage of a pipeline last ran as or reused: in this project, else, where it
    /// never ran here, in any whose pipeline has the same name.
    pub fn last(&self, pipeline: &str, stage: &str) -> Option<Record> {
        let record = |path: &Path| {
            let last: Last = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
            self.record(&last.kind, last.fingerprint).ok()?
        };
        let folder = self.last_folder(pipeline);
        let name = format!("{stage}.json");
        let Some(owner) = &self.owner else { return record(&folder.join(name)) };
        let own = folder.join(&owner.key).join(&name);
        if own.exists() {
            return record(&own);
        }
        let others = owner.others.get_or_init(|| projects(&folder));
        let mut found: Vec<(SystemTime, PathBuf)> = others
            .iter()
            .map(|other| other.join(&name))
            .filter_map(|path| Some((modified(&path)?, path)))
            .collect();
        found.sort();
        found.iter().rev().find_map(|(_, path)| record(path))
    }

    /// Whether a stage of a pipeline ran in this project, whatever became of its record.
    pub fn has_run(&self, pipeline: &str, stage: &str) -> bool {
        let owner = self.owner.as_ref().map_or("", |owner| owner.key.as_str());
        self.last_folder(pipeline).join(owner).join(format!("{stage}.json")).exists()
    }

    /// Remembers what a stage ran as; written only when it changes, and not synced: explanations
    /// are worth no flush.
    pub fn set_last(&self, pipeline: &str, stage: &str, kind: &str, fingerprint: Fingerprint) {
        let folder = self.last_folder(pipeline);
        let folder = self.owner.as_ref().map_or(folder.clone(), |owner| folder.join(&owner.key));
        let path = folder.join(format!("{stage}.json"));
        let last = Last { kind: kind.to_owned(), fingerprint };
        let text = serde_json::to_vec(&last).unwrap_or_default();
        if fs::read(&path).is_ok_and(|t| t == text) {
            if modified(&path).is_some_and(|time| age(time) > RENEWED) {
                let _ = durable::touch(&path);
            }
            return;
        }
        let staged = self.tmp_dir().join(durable::unique_name());
        let put = || {
            durable::create_parent(&staged)?;
            fs::write(&staged, &text)?;
            durable::share(&staged, 0o060);
            durable::create_parent(&path)?;
            fs::rename(&staged, &path)
        };
        // Only explanations are lost where a cache cannot be written.
        if let Err(error) = put().inspect_err(|_| drop(fs::remove_file(&staged))) {
            tracing::debug!(%error, "could not remember the last run of {stage}");
        }
    }

    fn last_folder(&self, pipeline: &str) -> PathBuf {
        let safe: String = pipeline
            .chars()
            .map(|c| if c.is_alphanumeric() || "-_".contains(c) { c } else { '_' })
            .collect();
        self.root.join("last").join(safe)
    }

    /// Creates the log file of a stage in a run.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses.
    pub fn create_log(&self, run: &str, stage: &str) -> Result<PathBuf, CacheError> {
        let run =
            self.owner.as_ref().map_or(run.to_owned(), |owner| format!("{run}.{}", owner.key));
        let path = self.root.join("logs").join(run).join(format!("{stage}.log"));
        durable::create_parent(&path)
            .and_then(|()| fs::File::options().append(true).create(true).open(&path))
            .map_err(|e| CacheError::io("create", &path, e))?;
        durable::share(&path, 0o060);
        Ok(path)
    }

    /// The newest log of a stage of this project.
    pub fn newest_log(&self, stage: &str) -> Option<PathBuf> {
        let ours = |run: &fs::DirEntry| {
            let name = run.file_name();
            self.owner.as_ref().is_none_or(|owner| {
                name.to_str().is_some_and(|name| name.ends_with(&format!(".{}", owner.key)))
            })
        };
        let runs = fs::read_dir(self.root.join("logs")).ok()?;
        let logs = runs.flatten().filter(ours).map(|run| run.path().join(format!("{stage}.log")));
        logs.filter_map(|log| Some((modified(&log)?, log))).max().map(|(_, log)| log)
    }
}

/// Folders of the projects with a pipeline, and its own, where earlier versions of `pipe` kept
/// files of all of them.
fn projects(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
    folders.chain([folder.to_owned()]).collect()
}
