//! Records of whole runs, and stored files read back for people.

use std::fs;
use std::io;

use contract::OutputForm;

use super::{Cache, CacheError, durable};
use crate::record::OutputRecord;
use crate::runs::RunRecord;

impl Cache {
    /// Remembers a run. A cache that cannot be written loses only this.
    pub fn put_run(&self, run: &RunRecord) {
        let path = self.root.join("runs").join(format!("{}.json", run.id));
        let text = serde_json::to_vec_pretty(run).unwrap_or_default();
        if let Err(error) = durable::replace(&self.tmp_dir(), &path, &text) {
            tracing::debug!(%error, "could not remember the run {}", run.id);
        }
    }

    /// Every run that can be read, newest first.
    ///
    /// # Errors
    /// [`CacheError`] where the folder cannot be listed.
    pub fn runs(&self) -> Result<Vec<RunRecord>, CacheError> {
        let dir = self.root.join("runs");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(CacheError::io("list", &dir, e)),
        };
        let read = |entry: fs::DirEntry| {
            let run: RunRecord = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
            // The file's name is what people type.
            (entry.file_name().to_str()? == format!("{}.json", run.id)).then_some(run)
        };
        let mut runs: Vec<RunRecord> = entries.flatten().filter_map(read).collect();
        runs.sort_by(|a, b| b.id.cmp(&a.id));
        Ok(runs)
    }

    /// The bytes of an output that is one file, verified.
    ///
    /// # Errors
    /// [`CacheError`] where it is a folder, larger than `limit` bytes, or not what it was.
    pub fn read_output(&self, output: &OutputRecord, limit: u64) -> Result<Vec<u8>, CacheError> {
        let name = &output.file_name;
        if output.form != OutputForm::File {
            return Err(CacheError::Unfit(format!("{name} is a folder")));
        }
        if output.bytes > limit {
            return Err(CacheError::Unfit(format!("{name} is too large ({} bytes)", output.bytes)));
        }
        self.inspect(output.digest, Some(output.bytes)).map_err(|e| e.of(name))?;
        let path = self.object_path(output.digest);
        fs::read(&path).map_err(|e| CacheError::io("read", &path, e))
    }
}
