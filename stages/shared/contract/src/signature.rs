//! What a stage takes and makes, once its params are known.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ParamError;

/// Result of [`crate::StageKind::resolve`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Signature {
    /// All params with defaults filled in: what the stage runs with and what users are shown.
    pub params: Value,
    /// The part of the params that can change the outputs: what the fingerprint holds. Usually
    /// equal to `params`; leaves out mirrors, batch sizes that cannot change a result, and params
    /// added later that still have the default they were introduced with.
    pub identity: Value,
    /// Inputs by name, in the order shown to users.
    pub inputs: Vec<InputSpec>,
    /// Any other input name is accepted too (a shell command names its own).
    pub free_inputs: bool,
    /// Outputs by name, in the order shown to users; the first is the default output.
    pub outputs: Vec<OutputSpec>,
    /// Files or folders beside the pipeline that the stage reads: name to path relative to the
    /// pipeline file. The engine digests them and hands them over as inputs of these names.
    pub local_inputs: BTreeMap<String, String>,
    /// Resources taken while running. `gpu`: so many of the host's GPUs, and the stage sees no
    /// others; `gpu:N`: the GPU of that number, which is kept free for it: it sees all and has to
    /// choose that one. Any other name, such as `cpu` for a stage that keeps every core busy, excludes
    /// stages of the same run that take it too.
    pub resources: BTreeMap<String, u32>,
    /// Key in `pipeline.lock` under which the stage's source is pinned. `Some` where the params
    /// alone do not pin the bytes; the stage then returns what it resolved in
    /// [`crate::Outcome::lock`], and the pinned value becomes part of the fingerprint.
    pub lock_key: Option<String>,
    /// The stage reads the records of all stages upstream of it ([`crate::Request::upstream`]);
    /// their fingerprints then become part of its own.
    pub reads_records: bool,
    /// The outputs may differ between two runs of one fingerprint (a shell command, say).
    pub nondeterministic: bool,
}

impl Signature {
    /// Params that all count, without inputs and outputs.
    ///
    /// # Errors
    /// [`ParamError`] where they are no JSON.
    pub fn of(params: &impl Serialize) -> Result<Self, ParamError> {
        let params = serde_json::to_value(params).map_err(|e| ParamError::at("", e.to_string()))?;
        Ok(Self { identity: params.clone(), params, ..Self::default() })
    }
}

/// One named input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputSpec {
    /// Name in the YAML's `inputs:`.
    pub name: String,
    /// Whether the pipeline must wire it.
    pub required: bool,
    /// It takes an output of every point of a sweep.
    #[serde(default)]
    pub gathered: bool,
    /// One line for docs and error messages.
    pub help: String,
}

/// One named output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputSpec {
    /// Name used as `stage.output` in the YAML.
    pub name: String,
    /// File or folder.
    pub form: OutputForm,
    /// Artifact or telemetry.
    pub class: OutputClass,
    /// File name under which `pipe outputs --to` copies it out, such as `metrics.json`.
    pub file_name: String,
    /// The stage may leave it out (a dev split that was not asked for).
    pub optional: bool,
}

/// Whether an output is one file or a folder of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputForm {
    /// One file.
    File,
    /// A folder, kept with names and exec bits.
    Tree,
}

/// Whether an output is deterministic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputClass {
    /// Same request, same bytes. May be an input of other stages.
    Artifact,
    /// Holds times or rates; may be shown, is never an input.
    Telemetry,
}

impl InputSpec {
    /// An input that the pipeline must wire.
    pub fn required(name: &str, help: &str) -> Self {
        Self { name: name.to_owned(), required: true, gathered: false, help: help.to_owned() }
    }

    /// An input that the pipeline may leave out.
    pub fn optional(name: &str, help: &str) -> Self {
        Self { required: false, ..Self::required(name, help) }
    }

    /// The same, of every point of a sweep.
    #[must_use]
    pub fn gathered(self) -> Self {
        Self { gathered: true, ..self }
    }
}

impl OutputSpec {
    /// A deterministic file.
    pub fn file(name: &str, file_name: &str) -> Self {
        Self {
            name: name.to_owned(),
            form: OutputForm::File,
            class: OutputClass::Artifact,
            file_name: file_name.to_owned(),
            optional: false,
        }
    }

    /// A deterministic folder.
    pub fn tree(name: &str, file_name: &str) -> Self {
        Self { form: OutputForm::Tree, ..Self::file(name, file_name) }
    }

    /// The same output, of class telemetry.
    #[must_use]
    pub fn telemetry(self) -> Self {
        Self { class: OutputClass::Telemetry, ..self }
    }

    /// The same output, which the stage may leave out.
    #[must_use]
    pub fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}
