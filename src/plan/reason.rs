//! Why a stage runs: a diff of two identities, one line a difference.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::change::beside;
use super::files::FileChanges;
use crate::digest::Digest;
use crate::fingerprint::{Identity, canonical};
use crate::pipeline::{InputRef, Stage};

/// One reason to run a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Reason {
    /// The cache knows nothing of it.
    NeverRan,
    /// It ran before, and the record is gone.
    NotCached,
    /// The user asked for it.
    Forced,
    /// A param differs.
    Param {
        /// Dotted path.
        path: String,
        /// Before.
        old: Option<Value>,
        /// Now.
        new: Option<Value>,
    },
    /// An input differs.
    Input {
        /// Input.
        input: String,
        /// Digest before.
        old: Option<String>,
        /// Digest now.
        new: Option<String>,
        /// `stage.output` or the local path it comes from.
        from: String,
        /// The files that differ, where it is a folder and the cache knows both states.
        #[serde(skip_serializing_if = "Option::is_none")]
        files: Option<FileChanges>,
        /// It is a folder, and the cache no longer knows the files that it had.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        forgotten: bool,
    },
    /// The kind's version differs: its outputs mean something else now.
    Version {
        /// Before.
        old: String,
        /// Now.
        new: String,
    },
    /// The stage has another kind now.
    Kind {
        /// Before.
        old: String,
        /// Now.
        new: String,
    },
    /// A declared environment variable differs.
    Env {
        /// Variable.
        name: String,
        /// Before; none where unset.
        old: Option<String>,
        /// Now; none where unset.
        new: Option<String>,
    },
    /// The lock file pins another source.
    Source {
        /// Before.
        old: Option<Value>,
        /// Now.
        new: Option<Value>,
    },
    /// The source is not pinned yet.
    SourceUnresolved,
    /// A stage whose record it reads ran as something else.
    Upstream {
        /// Stage.
        stage: String,
    },
    /// Layout of the fingerprint itself.
    Schema,
    /// An output in the cache cannot be used.
    Incomplete {
        /// Output.
        output: String,
        /// What is wrong.
        what: String,
    },
    /// There may be a record, and this user may not read it.
    Unreadable {
        /// Whose it is.
        what: String,
    },
    /// When it was last asked, the remote had a record that is not to be used.
    RemoteRefused {
        /// Why not.
        what: String,
    },
    /// `require` asks for another provenance.
    Required {
        /// Key of the provenance.
        key: String,
        /// What the pipeline asks for.
        wanted: Value,
        /// What the record says.
        found: Value,
    },
}

/// Every difference between two identities; [`Reason::NotCached`] where there is none.
pub(super) fn changes(stage: &Stage, old: &Identity, new: &Identity) -> Vec<Reason> {
    let mut found = Vec::new();
    if old.schema != new.schema {
        found.push(Reason::Schema);
    }
    if old.kind != new.kind {
        return vec![Reason::Kind { old: old.kind.clone(), new: new.kind.clone() }];
    }
    if old.version != new.version {
        found.push(Reason::Version { old: old.version.clone(), new: new.version.clone() });
    }
    params("", Some(&old.params), Some(&new.params), &mut found);
    inputs(stage, old, new, &mut found);
    for name in keys(old.env.keys(), new.env.keys()) {
        if old.env.get(name) != new.env.get(name) {
            let value = |env: &Identity| env.env.get(name).cloned().flatten();
            found.push(Reason::Env { name: name.clone(), old: value(old), new: value(new) });
        }
    }
    if old.lock != new.lock {
        found.push(Reason::Source { old: old.lock.clone(), new: new.lock.clone() });
    }
    for name in keys(old.upstream.keys(), new.upstream.keys()) {
        if old.upstream.get(name) != new.upstream.get(name) {
            found.push(Reason::Upstream { stage: name.clone() });
        }
    }
    if found.is_empty() {
        found.push(Reason::NotCached);
    }
    found
}

fn inputs(stage: &Stage, old: &Identity, new: &Identity, found: &mut Vec<Reason>) {
    let short = |d: Option<&Digest>| d.map(|d| d.short());
    for name in keys(old.inputs.keys(), new.inputs.keys()) {
        let (a, b) = (old.inputs.get(name), new.inputs.get(name));
        if a == b {
            continue;
        }
        let from = match stage.inputs.get(name).map(|i| &i.from) {
            Some(InputRef::Output { stage, output }) => format!("{stage}.{output}"),
            Some(InputRef::Local(path)) => path.display().to_string(),
            Some(InputRef::Gathered(g)) => format!("{}@*.{}", g.stage, g.output),
            None => String::new(),
        };
        found.push(Reason::Input {
            input: name.clone(),
            old: short(a),
            new: short(b),
            from,
            files: None,
            forgotten: false,
        });
    }
}

fn keys<'a>(
    a: impl Iterator<Item = &'a String>,
    b: impl Iterator<Item = &'a String>,
) -> BTreeSet<&'a String> {
    a.chain(b).collect()
}

fn params(path: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<Reason>) {
    if let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) {
        for key in keys(a.keys(), b.keys()) {
            let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            params(&below, a.get(key), b.get(key), found);
        }
        return;
    }
    let spelled = |v: Option<&Value>| v.map(canonical);
    if spelled(old) != spelled(new) {
        let path = path.to_owned();
        found.push(Reason::Param { path, old: old.cloned(), new: new.cloned() });
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn or<'a>(text: Option<&'a String>, none: &'a str) -> &'a str {
            text.map_or(none, String::as_str)
        }
        match self {
            Self::NeverRan => write!(f, "never ran before"),
            Self::NotCached => write!(f, "its record is no longer in the cache"),
            Self::Forced => write!(f, "forced"),
            Self::Param { path, old, new } => {
                let (old, new) = beside(old.as_ref(), new.as_ref(), "(absent)");
                write!(f, "{path}: {old} -> {new}")
            }
            Self::Input { input, old, new, from, files, forgotten } => {
                let (old, new) = (or(old.as_ref(), "(absent)"), or(new.as_ref(), "(absent)"));
                let from = if from.is_empty() { String::new() } else { format!(" (from {from})") };
                write!(f, "input {input}: {old} -> {new}{from}")?;
                if *forgotten {
                    write!(f, ": which files differ is not known, its old listing is gone")?;
                }
                files.as_ref().map_or(Ok(()), |files| write!(f, ": {files}"))
            }
            Self::Version { old, new } => write!(f, "version of the stage kind: {old} -> {new}"),
            Self::Kind { old, new } => write!(f, "kind: {old} -> {new}"),
            Self::Env { name, old, new } => {
                write!(
                    f,
                    "environment {name}: {} -> {}",
                    or(old.as_ref(), "(unset)"),
                    or(new.as_ref(), "(unset)")
                )
            }
            Self::Source { old, new } => {
                let (old, new) = beside(old.as_ref(), new.as_ref(), "(absent)");
                write!(f, "pinned source: {old} -> {new}")
            }
            Self::SourceUnresolved => write!(f, "its source is not pinned in the lock file yet"),
            Self::Upstream { stage } => write!(f, "stage {stage} ran as something else"),
            Self::Schema => write!(f, "the layout of fingerprints changed"),
            Self::Incomplete { output, what } => {
                write!(f, "output {output} cannot be used: {what}")
            }
            Self::Unreadable { what } => {
                write!(f, "there may be a record and you may not read it: {what}")
            }
            Self::RemoteRefused { what } => write!(f, "the remote's record is not used: {what}"),
            Self::Required { key, wanted, found } => {
                write!(f, "requires {key} = {wanted}, the cached artifact has {found}")
            }
        }
    }
}
