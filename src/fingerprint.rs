//! Everything that makes a stage stale: the hash and its explanation come from one struct.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::{Digest, Fingerprint};

/// Version of the layout of [`Identity`].
pub const SCHEMA: u32 = 1;

/// Everything that can change a stage's outputs. Two equal identities may share outputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Kind of the stage.
    pub kind: String,
    /// Version of the kind.
    pub version: String,
    /// [`contract::Signature::identity`].
    pub params: Value,
    /// Digest of every wired input by name, local files included.
    pub inputs: BTreeMap<String, Digest>,
    /// Declared environment variables; `None` is unset, which differs from empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Option<String>>,
    /// What `pipeline.lock` pins for the stage's source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<Value>,
    /// Fingerprints of all stages upstream by name, for kinds that read their records.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub upstream: BTreeMap<String, Fingerprint>,
}
