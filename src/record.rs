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
    /// A file that may be executed. Absent in records of a `pipe` that did not keep this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exec: bool,
}

impl OutputRecord {
    /// What it is to a stage that reads it: its digest, unless it is a file that may be executed,
    /// which is another input than the same bytes that may not.
    pub fn identity(&self) -> Digest {
        if self.exec { Digest::of(format!("exec {}", self.digest).as_bytes()) } else { self.digest }
    }
}

/// Before the checksum, which is the last line of a record's file.
const SUM: &str = ",\n  \"sum\": \"";
/// After it.
const END: &str = "\"\n}\n";

impl Record {
    /// The text of its file: JSON, whose last field is the blake3 of all before it, so that damage
    /// shows in every byte that means something.
    ///
    /// # Errors
    /// Where it is no JSON, which no record is.
    pub fn to_text(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.truncate(text.strip_suffix("\n}").unwrap_or(&text).len());
        let sum = blake3::hash(text.as_bytes()).to_hex();
        text.push_str(SUM);
        text.push_str(&sum);
        text.push_str(END);
        Ok(text)
    }

    /// The record in a file's text. One without a checksum is of an earlier `pipe`.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn from_text(text: &[u8]) -> Result<Self, String> {
        let length = SUM.len() + 64 + END.len();
        if let Some((body, last)) = text.split_at_checked(text.len().saturating_sub(length))
            && let Some(sum) = last.strip_prefix(SUM.as_bytes())
            && let Some(sum) = sum.strip_suffix(END.as_bytes())
            && sum != blake3::hash(body).to_hex().as_bytes()
        {
            return Err("holds other bytes than its checksum says".to_owned());
        }
        let record: Self =
            serde_json::from_slice(text).map_err(|e| format!("is no record: {e}"))?;
        if record.identity.fingerprint() != record.fingerprint {
            return Err("is not the record that its name says".to_owned());
        }
        Ok(record)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn output_of_an_earlier_pipe_is_what_it_was() {
        let digest = Digest::of(b"program");
        let earlier = serde_json::json!({"digest": digest, "form": "file", "class": "artifact",
            "bytes": 7, "file_name": "program"});
        let mut output: OutputRecord = serde_json::from_value(earlier.clone()).unwrap();
        assert!(!output.exec);
        assert_eq!(output.identity(), digest);
        assert_eq!(serde_json::to_value(&output).unwrap(), earlier);
        output.exec = true;
        assert_ne!(output.identity(), digest);
        let read = serde_json::from_value(serde_json::to_value(&output).unwrap()).unwrap();
        assert_eq!(output, read);
    }
}
