//! What the cache remembers of one finished execution.

use std::collections::BTreeMap;

use contract::{OutputClass, OutputForm};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::digest::{Digest, Fingerprint};
use crate::fingerprint::Identity;

/// One finished execution: `records-v1/<kind>/<fingerprint>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Identity of the execution.
    pub fingerprint: Fingerprint,
    /// What the fingerprint is the digest of; `why` is a diff of two of these.
    pub identity: Identity,
    /// Name of the stage in the pipeline that ran it (others may call it otherwise).
    pub stage: String,
    /// Params with defaults filled in, those outside the identity included.
    pub params: Value,
    /// Outputs by name; optional ones that were not made are absent.
    pub outputs: BTreeMap<String, OutputRecord>,
    /// Wall time of the stage process, in seconds.
    pub seconds: f64,
    /// Unix time in seconds.
    pub started_at: u64,
    /// Unix time in seconds.
    pub finished_at: u64,
    /// What the stage measured of itself.
    pub telemetry: Map<String, Value>,
    /// What was found at run time: versions, backend, device, host's platform. No secrets, no user.
    pub provenance: Map<String, Value>,
    /// Warnings of the stage, shown again whenever the record is reused.
    pub warnings: Vec<String>,
    /// What the stage's source was resolved to, for kinds with a lock key.
    pub lock: Option<Value>,
}

/// One output of a finished execution.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRecord {
    /// Digest of the file's bytes, or of the tree's canonical listing (itself an object).
    pub digest: Digest,
    /// File or folder.
    pub form: OutputForm,
    /// Artifact or telemetry.
    pub class: OutputClass,
    /// Size of the content in bytes.
    pub bytes: u64,
    /// Name under which it is copied out.
    pub file_name: String,
}
