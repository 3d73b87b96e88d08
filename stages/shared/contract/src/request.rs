//! The question put to a stage process and its answer.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Fault, StageError};

/// Everything a stage process is told. Written as `request.json`, so that a run can be repeated by
/// hand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// [`crate::PROTOCOL`] of the engine.
    pub protocol: u32,
    /// Name of the stage in the pipeline.
    pub stage: String,
    /// Kind of the stage.
    pub kind: String,
    /// Params with defaults filled in.
    pub params: Value,
    /// Read-only input files and folders by input name; inputs that are not wired are absent.
    pub inputs: BTreeMap<String, PathBuf>,
    /// Where each output is to be written. The parent folder exists; the path itself does not.
    pub outputs: BTreeMap<String, PathBuf>,
    /// Private scratch folder of this attempt; checkpoints go here.
    pub scratch: PathBuf,
    /// Scratch folders of earlier attempts at the same fingerprint, newest first, read-only.
    pub earlier_scratch: Vec<PathBuf>,
    /// Folder of the pipeline file.
    pub pipeline_dir: PathBuf,
    /// What `pipeline.lock` holds for this stage's [`crate::Signature::lock_key`].
    pub lock: Option<Value>,
    /// Records of the stages upstream by stage name, in topological order, for kinds that ask.
    pub upstream: Vec<UpstreamRecord>,
    /// Threads the stage may use.
    pub threads: usize,
}

/// What a record says of one upstream stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpstreamRecord {
    /// Name of the stage.
    pub stage: String,
    /// Kind of the stage.
    pub kind: String,
    /// Hex fingerprint.
    pub fingerprint: String,
    /// Params with defaults filled in.
    pub params: Value,
    /// Names of the stages that feed it.
    pub needs: Vec<String>,
    /// Wall time of the run that made the artifacts, in seconds.
    pub seconds: f64,
    /// Unix time in seconds at which that run ended.
    pub finished_at: u64,
    /// What the stage measured of itself.
    pub telemetry: Map<String, Value>,
    /// Where the run took place: versions, backend, device.
    pub provenance: Map<String, Value>,
    /// Bytes of each output by name.
    pub output_bytes: BTreeMap<String, u64>,
}

/// What a stage process answers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Rates, memory and other measurements: kept with the record, shown, never an input.
    pub telemetry: Map<String, Value>,
    /// What was found at run time: backend, device, library versions.
    pub provenance: Map<String, Value>,
    /// What the source was resolved to, for kinds with a lock key.
    pub lock: Option<Value>,
    /// Things the user should know although the stage succeeded.
    pub warnings: Vec<String>,
}

impl Request {
    /// Params as the kind's own struct.
    ///
    /// # Errors
    /// [`Fault::Internal`], since the engine validated them before.
    pub fn params<P: serde::de::DeserializeOwned>(&self) -> Result<P, StageError> {
        serde_json::from_value(self.params.clone())
            .map_err(|e| StageError::new(Fault::Internal, format!("params do not parse: {e}")))
    }

    /// Path of an input that is always wired.
    ///
    /// # Errors
    /// [`Fault::Internal`] where the engine did not wire it.
    pub fn input(&self, name: &str) -> Result<&PathBuf, StageError> {
        self.inputs.get(name).ok_or_else(|| {
            StageError::new(Fault::Internal, format!("input `{name}` was not handed over"))
        })
    }

    /// Path of an optional input.
    pub fn optional_input(&self, name: &str) -> Option<&PathBuf> {
        self.inputs.get(name)
    }

    /// Path at which an output is to be written.
    ///
    /// # Errors
    /// [`Fault::Internal`] where the engine did not ask for it.
    pub fn output(&self, name: &str) -> Result<&PathBuf, StageError> {
        self.outputs.get(name).ok_or_else(|| {
            StageError::new(Fault::Internal, format!("output `{name}` was not asked for"))
        })
    }
}
