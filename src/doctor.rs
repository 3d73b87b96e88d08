//! Whether this host and the file system of the cache can do what `pipe` relies on.

mod host;
mod storage;

use serde::Serialize;

use crate::cache::Cache;

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, with something missing or slower.
    Warn,
    /// `pipe` cannot be relied on.
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What it came to.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), help: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, found: found.into(), help: Some(help.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, found, help) }
    }
}

/// Everything that can be checked here, for a cache.
pub fn examine(cache: &Cache) -> Vec<Check> {
    let mut checks = storage::checks(cache);
    checks.extend(host::checks());
    checks
}
