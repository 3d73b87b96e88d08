//! One stage run in a temporary folder, with an environment of its own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contract::{Outcome, Reporter, Request, StageError, StageKind};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Download;
use crate::settings::{Retries, Secret, Settings};

thread_local! {
    static WAITS: RefCell<Vec<Duration>> = const { RefCell::new(Vec::new()) };
}

/// The waits of this test so far.
pub(super) fn waits() -> Vec<Duration> {
    WAITS.with_borrow(Clone::clone)
}

/// Folders and settings of one test.
pub(super) struct Space {
    pub(super) folder: TempDir,
    pub(super) settings: Settings,
    attempt: usize,
    told: Arc<Mutex<Vec<u8>>>,
}

/// What the stage says while it runs.
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Space {
    pub(super) fn new(endpoint: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            endpoint: endpoint.to_owned(),
            token: None,
            hub_cache: folder.path().join("hub"),
            offline: false,
            retries: Retries {
                attempts: 4,
                first_wait: Duration::from_secs(1),
                sleep: |wait| WAITS.with_borrow_mut(|waits| waits.push(wait)),
            },
            patience: Duration::from_secs(20),
            pythons: vec!["python3".into()],
            pip_env: Vec::new(),
        };
        Self { folder, settings, attempt: 0, told: Arc::default() }
    }

    pub(super) fn token(mut self, token: &str) -> Self {
        self.settings.token = Some(Secret::new(token));
        self
    }

    /// Runs the next attempt, which sees what earlier ones left in scratch.
    pub(super) fn run(
        &mut self,
        params: Value,
        lock: Option<Value>,
    ) -> Result<Outcome, StageError> {
        let signature = Download.resolve(&params).unwrap();
        self.attempt += 1;
        let _ = fs::remove_dir_all(self.output());
        let inputs = signature
            .local_inputs
            .iter()
            .map(|(name, path)| (name.clone(), self.folder.path().join(path)));
        let request = Request {
            protocol: contract::PROTOCOL,
            stage: "model".to_owned(),
            kind: "download".to_owned(),
            inputs: inputs.collect(),
            params: signature.params,
            outputs: BTreeMap::from([("files".to_owned(), self.output())]),
            scratch: self.scratch(self.attempt),
            earlier_scratch: (1..self.attempt).rev().map(|n| self.scratch(n)).collect(),
            pipeline_dir: self.folder.path().to_owned(),
            lock,
            upstream: Vec::new(),
            threads: 1,
        };
        crate::run(&request, &mut Reporter::new(Box::new(Sink(self.told.clone()))), &self.settings)
    }

    /// Runs the source `hf` of the test repository.
    pub(super) fn run_hf(&mut self, include: &[&str]) -> Result<Outcome, StageError> {
        self.run(hf(include), None)
    }

    /// The events of all attempts, one JSON text a line.
    pub(super) fn told(&self) -> String {
        String::from_utf8(self.told.lock().unwrap().clone()).unwrap()
    }

    pub(super) fn scratch(&self, attempt: usize) -> PathBuf {
        self.folder.path().join("scratch").join(attempt.to_string())
    }

    pub(super) fn output(&self) -> PathBuf {
        self.folder.path().join("out/files")
    }

    /// Content of a file of the output tree.
    pub(super) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.output().join(name)).unwrap()
    }

    /// Puts a file where Hugging Face tools put it: blob, snapshot and branch.
    pub(super) fn cache(&self, path: &str, blob: &str, bytes: &[u8]) -> PathBuf {
        let repo = self.settings.hub_cache.join("models--org--tiny");
        let snapshot = repo.join("snapshots").join(super::server::COMMIT);
        let write = |path: &Path, bytes: &[u8]| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        let blob = repo.join("blobs").join(blob);
        write(&blob, bytes);
        write(&repo.join("refs/main"), super::server::COMMIT.as_bytes());
        let pointer = snapshot.join(path);
        fs::create_dir_all(pointer.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&blob, pointer).unwrap();
        blob
    }
}

/// Params of the source `hf` of the test repository.
pub(super) fn hf(include: &[&str]) -> Value {
    json!({ "source": { "hf": super::server::REPO, "include": include } })
}

/// Bytes that differ at every place, so that a wrong offset shows.
pub(super) fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}
