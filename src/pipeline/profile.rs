//! `profiles:` at the top of a pipeline file: named sets of changes, of which a command takes one.
//!
//! A profile's params are what `--set` could have said, and its `remote` replaces single keys of
//! the pipeline's; `--set`, `--cache` and `--jobs` come after it.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::problem::{Problem, suggest};
use super::read::Reader;
use super::variables::{Variables, apply_set, put};
use crate::yaml::{Key, Node, Place, Tree};

const KEYS: [&str; 5] = ["description", "params", "cache", "remote", "jobs"];
/// As many as `--jobs` takes.
const MAX_JOBS: u64 = 65_535;

/// The profile that a pipeline was loaded with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Profile {
    /// Name.
    pub name: String,
    /// What it sets, as `--set` would: `path=value`.
    pub set: Vec<String>,
    /// Cache folder, relative to the pipeline file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Keys of the remote that it replaces, as `key=value`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remote: Vec<String>,
    /// Stages that may run at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jobs: Option<u16>,
}

impl Profile {
    /// What it changes, for people.
    pub fn summary(&self) -> String {
        let mut parts = self.set.clone();
        parts.extend(self.cache.iter().map(|dir| format!("cache {}", dir.display())));
        parts.extend(self.remote.iter().map(|change| format!("remote {change}")));
        parts.extend(self.jobs.iter().map(|jobs| match jobs {
            1 => "1 job".to_owned(),
            jobs => format!("{jobs} jobs"),
        }));
        let changes =
            if parts.is_empty() { "changes nothing".to_owned() } else { parts.join(", ") };
        format!("profile {}: {changes}", self.name)
    }
}

/// Puts the changes of a profile into the document.
pub(super) fn apply(root: &mut Node, name: &str) -> Result<(), Vec<Problem>> {
    let start = Place { source: 0, start: 0, end: 0 };
    let Some(profiles) = root.get("profiles") else {
        let problem = Problem::at(format!("no profile `{name}`"), start, "no `profiles` here");
        return Err(vec![problem.help("`profiles: {NAME: {params: {…}}}` defines one")]);
    };
    let Some(profile) = profiles.get(name).cloned() else {
        let names = entries(profiles).iter().map(|(key, _)| key.name.as_str());
        let help = suggest(name, names);
        let message = format!("no profile `{name}`");
        return Err(vec![Problem::at(message, profiles.place, "not in here").maybe_help(help)]);
    };
    let mut problems = Vec::new();
    for (key, value) in profile.get("params").map(entries).unwrap_or_default() {
        problems.extend(apply_set(root, &key.name, key.place, value.clone()).err());
    }
    for (key, value) in profile.get("remote").map(entries).unwrap_or_default() {
        problems.extend(put(root, &["remote", &key.name], key.place, value.clone()).err());
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn entries(node: &Node) -> &[(Key, Node)] {
    match &node.tree {
        Tree::Map(entries) => entries,
        _ => &[],
    }
}

impl Reader<'_> {
    /// Checks every profile and returns the one called `chosen`, which was applied before.
    pub(super) fn profiles(&mut self, root: &Node, chosen: Option<&str>) -> Option<Profile> {
        let profiles = self.map(root.get("profiles")?, "`profiles`")?;
        let mut found = None;
        for (key, node) in profiles {
            let Some(profile) = self.profile(key, node) else { continue };
            if chosen == Some(&key.name) {
                found = Some(profile);
            } else if self.problems.is_empty() {
                let mut changed = root.clone();
                self.problems.extend(apply(&mut changed, &key.name).err().unwrap_or_default());
                if node.get("remote").is_some() && self.problems.is_empty() {
                    self.remote(&changed, &Variables::new(changed.get("params")));
                }
            }
        }
        found
    }

    fn profile(&mut self, key: &Key, node: &Node) -> Option<Profile> {
        let entries = self.map(node, "a profile")?;
        self.unknown_keys(entries, &KEYS, "a profile");
        if let Some(description) = node.get("description") {
            self.string(description, "description");
        }
        let listed = |entries: &[(Key, Node)]| -> Vec<String> {
            entries.iter().map(|(key, node)| format!("{}={}", key.name, shown(node))).collect()
        };
        let set = node.get("params").and_then(|n| self.map(n, "`params`")).map(listed);
        let remote = node.get("remote").and_then(|n| self.map(n, "`remote`")).map(listed);
        let cache = node.get("cache").and_then(|n| self.string(n, "`cache`")).map(PathBuf::from);
        let jobs = node.get("jobs").and_then(|n| self.jobs(n));
        let (set, remote) = (set.unwrap_or_default(), remote.unwrap_or_default());
        Some(Profile { name: key.name.clone(), set, cache, remote, jobs })
    }

    fn jobs(&mut self, node: &Node) -> Option<u16> {
        let number = node.to_value().as_u64().filter(|n| (1..=MAX_JOBS).contains(n));
        if number.is_none() {
            let message = format!("`jobs` must be a number from 1 to {MAX_JOBS}");
            self.problems.push(Problem::at(message, node.place, "here"));
        }
        u16::try_from(number?).ok()
    }
}

/// A value as `--set` takes it.
fn shown(node: &Node) -> String {
    match node.to_value() {
        Value::String(text) => text,
        other => other.to_string(),
    }
}
