//! What the pipelines of all projects last ran or reused, which gc leaves alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::access::read_or_count;
use super::last::{Last, project_key};
use super::survey::files_at;
use super::{Cache, CacheError, durable};
use crate::digest::Fingerprint;

/// A project that has not run for so long keeps nothing.
pub(super) const FORGOTTEN: Duration = Duration::from_secs(90 * 24 * 3600);
/// A project that changes nothing says this often that it is still there.
const RENEWED: Duration = Duration::from_secs(24 * 3600);

/// `roots/<project>.json`: one pipeline in one folder of one host. Two projects whose pipelines
/// have the same name do not let go of each other's artifacts.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Project {
    pipeline: String,
    stages: BTreeMap<String, Fingerprint>,
}

impl Cache {
    /// Remembers what a project ran as or reused; `stages` are all that its pipeline has now.
    /// Failing to is harmless: gc goes by age then.
    pub(crate) fn register(
        &self,
        pipeline: &str,
        dir: &Path,
        stages: &BTreeSet<&str>,
        ran: BTreeMap<String, Fingerprint>,
    ) {
        let path = self.project_path(pipeline, dir);
        let known: Option<Project> =
            fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let mut kept = known.as_ref().map(|p| p.stages.clone()).unwrap_or_default();
        kept.extend(ran);
        kept.retain(|name, _| stages.contains(name.as_str()));
        let project = Project { pipeline: pipeline.to_owned(), stages: kept };
        let put = || {
            if known.as_ref() == Some(&project) {
                return if age(&path) > RENEWED { durable::touch(&path) } else { Ok(()) };
            }
            let staged = durable::stage_bytes(&self.tmp_dir(), &serde_json::to_vec(&project)?)?;
            durable::create_parent(&path)?;
            durable::rename(&staged, &path).inspect_err(|_| drop(fs::remove_file(&staged)))
        };
        if let Err(error) = put() {
            tracing::debug!(%error, "could not register {pipeline}");
        }
    }

    fn project_path(&self, pipeline: &str, dir: &Path) -> PathBuf {
        self.root.join("roots").join(format!("{}.json", project_key(pipeline, dir)))
    }

    /// The records that pipelines last ran as or reused, with the pipelines' names.
    ///
    /// # Errors
    /// [`CacheError`] where a folder cannot be listed.
    pub fn roots(&self) -> Result<BTreeMap<Fingerprint, BTreeSet<String>>, CacheError> {
        self.roots_and_hidden(&mut 0)
    }

    /// The same; counts the files that this user may not read.
    pub(super) fn roots_and_hidden(
        &self,
        hidden: &mut usize,
    ) -> Result<BTreeMap<Fingerprint, BTreeSet<String>>, CacheError> {
        let mut roots: BTreeMap<Fingerprint, BTreeSet<String>> = BTreeMap::new();
        let mut add = |fingerprint, pipeline: &str| {
            roots.entry(fingerprint).or_default().insert(pipeline.to_owned());
        };
        // What a run that was killed has finished is only there, and all that earlier versions of
        // `pipe` wrote, one folder higher.
        let last = self.root.join("last");
        let mut files = files_at(&last, 2)?;
        files.extend(files_at(&last, 3)?);
        for path in files.iter().filter(|path| age(path) < FORGOTTEN) {
            let text = read_or_count(path, hidden);
            let read = text.and_then(|text| serde_json::from_slice::<Last>(&text).ok());
            let below = path.strip_prefix(&last).ok().and_then(|p| p.iter().next());
            if let (Some(read), Some(pipeline)) = (read, below) {
                add(read.fingerprint, &pipeline.to_string_lossy());
            }
        }
        for path in files_at(&self.root.join("roots"), 1)? {
            let young = age(&path) < FORGOTTEN;
            let text = if young { read_or_count(&path, hidden) } else { None };
            let project = text.and_then(|text| serde_json::from_slice::<Project>(&text).ok());
            for (pipeline, fingerprint) in
                project.iter().flat_map(|p| p.stages.values().map(|f| (&p.pipeline, *f)))
            {
                add(fingerprint, pipeline);
            }
        }
        Ok(roots)
    }
}

fn age(path: &Path) -> Duration {
    let modified = fs::metadata(path).and_then(|m| m.modified());
    modified.map_or(Duration::MAX, |m| SystemTime::now().duration_since(m).unwrap_or_default())
}
