//! One attempt at an evaluation in a folder of its own, for tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use contract::{Outcome, Progress, Reporter, Request, StageError, StageKind};
use data::{Metrics, Prediction, read_jsonl};
use serde_json::Value;

use crate::Evaluate;
use crate::answerer::script::Script;
use crate::params::Params;

pub(crate) struct Trial {
    dir: tempfile::TempDir,
    request: Request,
}

impl Trial {
    /// Scratch folders of `earlier` attempts are handed over.
    pub(crate) fn new(params: Value, inputs: &[(&str, &Path)], earlier: &[&Self]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut request = fixtures::request(&Evaluate, &params, inputs, dir.path());
        request.earlier_scratch = earlier.iter().map(|t| t.request.scratch.clone()).collect();
        request.threads = 2;
        Self { dir, request }
    }

    /// Runs with answers by heart; `model` needs no folder then.
    pub(crate) fn run(&self, script: &Script) -> Result<Outcome, StageError> {
        let params = Params::parse(&self.request.params).unwrap();
        let mut request = self.request.clone();
        request.inputs.entry("model".to_owned()).or_default();
        crate::evaluation::run(&params, &request, &mut self.reporter(), &|_, _| {
            Ok(Box::new(script.clone()))
        })
    }

    /// What is refused before a model is loaded.
    pub(crate) fn refusal(&self) -> StageError {
        let params = Params::parse(&self.request.params).unwrap();
        let load = |_: &Path, _: Option<&Path>| panic!("the model was loaded");
        let run = crate::evaluation::run(&params, &self.request, &mut Reporter::silent(), &load);
        run.unwrap_err()
    }

    /// Runs as the engine does, with the model folder among the inputs.
    pub(crate) fn run_stage(&self) -> Result<Outcome, StageError> {
        Evaluate.run(&self.request, &mut self.reporter())
    }

    fn reporter(&self) -> Reporter {
        let file = |name: &str| Box::new(File::create(self.path(name)).unwrap());
        Reporter::new(file("events")).with_log(file("log"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// All outputs as they are on the disk.
    pub(crate) fn outputs(&self) -> BTreeMap<String, Option<Vec<u8>>> {
        let outputs = self.request.outputs.iter();
        outputs.map(|(name, path)| (name.clone(), std::fs::read(path).ok())).collect()
    }

    pub(crate) fn metrics(&self) -> Metrics {
        serde_json::from_str(&self.text("metrics.json")).unwrap()
    }

    pub(crate) fn predictions(&self) -> Vec<Prediction> {
        read_jsonl(&self.path("predictions.jsonl")).unwrap()
    }

    pub(crate) fn events(&self) -> Vec<Progress> {
        self.text("events").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The newest checkpoint.
    pub(crate) fn checkpoint(&self) -> Vec<u8> {
        contract::Checkpoints::of(&self.request).latest().unwrap().1
    }

    /// Puts a checkpoint where a later attempt looks for it.
    pub(crate) fn save_checkpoint(&self, bytes: &[u8]) {
        contract::Checkpoints::of(&self.request).save(1, bytes).unwrap();
    }
}
