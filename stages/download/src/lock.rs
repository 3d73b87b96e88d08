//! What a source was resolved to, and which bytes a run must therefore produce.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Landed;
use crate::error::DownloadError;
use crate::params::Params;

/// Entry of the lock file for one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    /// Commit of a repository or version of a package; absent for a URL, which has none.
    #[serde(default)]
    pub(crate) revision: Option<String>,
    /// By name in the output tree.
    pub(crate) files: BTreeMap<String, LockedFile>,
}

/// One file of a [`Lock`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LockedFile {
    /// Bytes.
    pub(crate) size: u64,
    /// Lowercase hex.
    pub(crate) sha256: String,
}

/// A hash that a file must have, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) sha256: String,
    pub(crate) by: &'static str,
}

/// Everything known of the bytes beforehand.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    param: BTreeMap<String, String>,
    /// The lock file's entry, where the source is locked.
    pub(crate) lock: Option<Lock>,
}

impl Pins {
    /// Reads the lock entry and holds it against the params.
    pub(crate) fn new(params: &Params, lock: Option<&Value>) -> Result<Self, DownloadError> {
        let lock = match lock {
            Some(value) if params.lock_key().is_some() => {
                let read: Lock = serde_json::from_value(value.clone())
                    .map_err(|error| DownloadError::Lock { why: format!("is not one: {error}") })?;
                Some(read)
            }
            _ => None,
        };
        let pins = Self { param: params.sha256.clone(), lock };
        for (name, param) in &pins.param {
            match pins.lock.as_ref().map(|lock| lock.files.get(name)) {
                Some(Some(locked)) if &locked.sha256 != param => {
                    return Err(DownloadError::ConflictingPins {
                        name: name.clone(),
                        param: param.clone(),
                        lock: locked.sha256.clone(),
                    });
                }
                Some(None) => {
                    return Err(DownloadError::Lock { why: format!("lacks the file `{name}`") });
                }
                _ => {}
            }
        }
        Ok(pins)
    }

    /// The hash `name` must have.
    pub(crate) fn expected(&self, name: &str) -> Option<Expected> {
        if let Some(sha256) = self.param.get(name) {
            return Some(Expected { sha256: sha256.clone(), by: "param `sha256`" });
        }
        let locked = self.lock.as_ref()?.files.get(name)?;
        Some(Expected { sha256: locked.sha256.clone(), by: "the lock file" })
    }

    /// The length `name` must have.
    pub(crate) fn size(&self, name: &str) -> Option<u64> {
        Some(self.lock.as_ref()?.files.get(name)?.size)
    }

    /// Refuses files that differ from what is pinned, and pins without a file.
    pub(crate) fn check(&self, files: &[Landed]) -> Result<(), DownloadError> {
        for file in files {
            if self.lock.as_ref().is_some_and(|lock| !lock.files.contains_key(&file.name)) {
                return Err(DownloadError::Lock { why: format!("lacks the file `{}`", file.name) });
            }
            if let Some(expected) = self.expected(&file.name) {
                expected.check(&file.name, &file.sha256)?;
            }
        }
        let locked = self.lock.iter().flat_map(|lock| lock.files.keys());
        for name in self.param.keys().chain(locked) {
            if !files.iter().any(|file| &file.name == name) {
                let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
                return Err(DownloadError::NoMatch {
                    message: format!("`{name}` has a sha256 but is not among the files"),
                    help: crate::name::hint(name, &names),
                });
            }
        }
        Ok(())
    }
}

impl Expected {
    /// Refuses a file `what` of another hash.
    pub(crate) fn check(&self, what: &str, found: &str) -> Result<(), DownloadError> {
        if self.sha256 == found {
            return Ok(());
        }
        Err(DownloadError::Mismatch {
            what: what.to_owned(),
            expected: self.sha256.clone(),
            found: found.to_owned(),
            by: self.by,
        })
    }
}

impl Lock {
    /// The lock of files that have just been fetched.
    pub(crate) fn of(revision: Option<String>, files: &[Landed]) -> Self {
        let files = files
            .iter()
            .map(|file| {
                let locked = LockedFile { size: file.size, sha256: file.sha256.clone() };
                (file.name.clone(), locked)
            })
            .collect();
        Self { revision, files }
    }
}
