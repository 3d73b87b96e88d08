//! What is left of the remote in a build without the cargo feature `remote`.

use super::{Answer, NewKey, Offered, PublicKey, RemoteError, Settings, Watch};
use crate::cache::Cache;
use crate::digest::Fingerprint;
use crate::record::Record;

/// There is none.
#[derive(Debug)]
pub enum Remote {}

fn not_built() -> RemoteError {
    RemoteError::config(
        "this `pipe` was built without the cargo feature `remote`",
        "build it with `--features remote`, or leave the remote out",
    )
}

/// # Errors
/// Always: the feature is not built.
pub fn new_key() -> Result<NewKey, RemoteError> {
    Err(not_built())
}

/// # Errors
/// Always: the feature is not built.
pub fn public_key(_private: &str) -> Result<PublicKey, RemoteError> {
    Err(not_built())
}

#[allow(missing_docs, clippy::unused_self, reason = "never called: there is no value")]
impl Remote {
    pub fn open(_settings: Settings) -> Result<Self, RemoteError> {
        Err(not_built())
    }

    pub fn settings(&self) -> &Settings {
        match *self {}
    }

    pub fn ask(&self, _kind: &str, _of: Fingerprint) -> Result<Answer, RemoteError> {
        match *self {}
    }

    pub fn fetch(&self, _: &Cache, _: &Record, _: Watch<'_>) -> Result<u64, RemoteError> {
        match *self {}
    }

    pub fn offer(
        &self,
        _: &Cache,
        _: &Record,
        _verify: bool,
        _: Watch<'_>,
    ) -> Result<Offered, RemoteError> {
        match *self {}
    }
}
