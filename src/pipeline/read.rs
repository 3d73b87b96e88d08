//! From the spanned tree of a document to a [`Pipeline`], collecting every problem on the way.

mod checks;
mod remote;
mod stage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::problem::{PipelineError, Problem, Sources, suggest};
use super::variables::{Variables, apply_set};
use super::{Gathered, InputRef, Kinds, Overrides, Pipeline, Points, Stage, expand, profile};
use crate::yaml::{self, Key, Node, Place, Tree, YamlError};

pub(crate) const STAGE_KEYS: [&str; 8] =
    ["kind", "params", "matrix", "inputs", "env", "pass_env", "require", "description"];
pub(crate) const TOP_KEYS: [&str; 7] =
    ["name", "description", "params", "targets", "stages", "remote", "profiles"];

pub(super) fn pipeline(
    path: &Path,
    dir: PathBuf,
    text: &str,
    overrides: Overrides<'_>,
    kinds: Kinds<'_>,
) -> Result<Pipeline, PipelineError> {
    let shown = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let mut sources = Sources::new(&shown, text);
    let root = document(text, overrides, &mut sources)?;
    let mut reader = Reader { kinds, problems: Vec::new(), pins: BTreeMap::new() };
    let (mut stages, targets) = reader.top(&root);
    reader.references(&stages);
    reader.cycles(&stages);
    let mut points = Points::default();
    if reader.problems.is_empty() {
        let plain = stages.len();
        (stages, points) = expand::expand(&mut reader, &root, stages);
        if stages.len() > plain {
            reader.references(&stages);
        }
    }
    reader.targets(&targets, &stages, &points);
    let remote = reader.remote(&root, &Variables::new(root.get("params")));
    let profile = reader.profiles(&root, overrides.profile);
    if !reader.problems.is_empty() {
        return Err(PipelineError::of(reader.problems, &sources));
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let name = match root.get("name").map(|n| &n.tree) {
        Some(Tree::Text(name)) => name.clone(),
        _ => stem,
    };
    let stages = with_default_outputs(stages);
    let index = stages.iter().enumerate().map(|(i, s)| (s.name.clone(), i)).collect();
    let targets = targets
        .into_iter()
        .map(|(key, members)| (key.name, members.into_iter().map(|(name, _)| name).collect()))
        .collect();
    let path = path.to_owned();
    Ok(Pipeline { path, dir, name, stages, targets, points, remote, profile, sources, index })
}

/// Names the first output where a reference names the stage alone.
fn with_default_outputs(mut stages: Vec<Stage>) -> Vec<Stage> {
    let first: BTreeMap<String, String> = stages
        .iter()
        .filter_map(|s| Some((s.name.clone(), s.signature.outputs.first()?.name.clone())))
        .collect();
    for input in stages.iter_mut().flat_map(|s| s.inputs.values_mut()) {
        if let InputRef::Output { stage, output }
        | InputRef::Gathered(Gathered { stage, output, .. }) = &mut input.from
            && output.is_empty()
        {
            output.clone_from(&first[stage]);
        }
    }
    stages
}

/// Parses the file, and applies the profile and the `--set` arguments.
fn document(
    text: &str,
    overrides: Overrides<'_>,
    sources: &mut Sources,
) -> Result<Node, PipelineError> {
    let mut root = match yaml::parse(text, 0) {
        Ok(root) => root,
        Err(error) => return Err(PipelineError::of(vec![syntax(error)], sources)),
    };
    let mut problems = Vec::new();
    if let Some(name) = overrides.profile {
        problems.extend(profile::apply(&mut root, name).err().unwrap_or_default());
    }
    for set in overrides.set {
        let source = sources.add("--set", set);
        let whole = Place { source, start: 0, end: set.len() };
        let Some((path, value)) = set.split_once('=') else {
            problems.push(
                Problem::at("`--set` takes `path=value`", whole, "no `=` here")
                    .help("for example `--set train.max_steps=200`"),
            );
            continue;
        };
        // Keep the places of the value right by parsing it where it stands.
        let padded = format!("{}{value}", " ".repeat(path.len() + 1));
        let at = Place { source, start: 0, end: path.len() };
        let applied = match yaml::parse(&padded, source) {
            Ok(node) => apply_set(&mut root, path, at, node),
            Err(error) => Err(syntax(error)),
        };
        problems.extend(applied.err());
    }
    if problems.is_empty() { Ok(root) } else { Err(PipelineError::of(problems, sources)) }
}

fn syntax(error: YamlError) -> Problem {
    match error.first {
        Some(first) => Problem::at(error.message, error.place, "again here")
            .also(first, "first here")
            .help("remove or rename one of the two"),
        None => {
            Problem::at(format!("this is not valid YAML: {}", error.message), error.place, "here")
        }
    }
}

type Targets = Vec<(Key, Vec<(String, Place)>)>;

pub(super) struct Reader<'a> {
    pub(super) kinds: Kinds<'a>,
    pub(super) problems: Vec<Problem>,
    /// `at` of the inputs that follow one point, by stage and input.
    pub(super) pins: BTreeMap<(String, String), Node>,
}

impl Reader<'_> {
    fn top(&mut self, root: &Node) -> (Vec<Stage>, Targets) {
        let Some(entries) = self.map(root, "a pipeline") else { return Default::default() };
        self.unknown_keys(entries, &TOP_KEYS, "a pipeline");
        for name in ["name", "description"] {
            if let Some(node) = root.get(name) {
                self.string(node, name);
            }
        }
        if let Some(params) = root.get("params") {
            self.map(params, "`params`");
        }
        let variables = Variables::new(root.get("params"));
        let Some(stages) = root.get("stages") else {
            self.problems.push(
                Problem::at(
                    "a pipeline needs `stages`",
                    Place { end: root.place.start, ..root.place },
                    "missing here",
                )
                .help("`pipe init` writes a starter pipeline"),
            );
            return Default::default();
        };
        let read = self.map(stages, "`stages`").unwrap_or_default().iter();
        let stages = read.filter_map(|(key, node)| self.stage(key, node, &variables)).collect();
        (stages, self.target_lists(root))
    }

    fn target_lists(&mut self, root: &Node) -> Targets {
        let Some(entries) = root.get("targets").and_then(|t| self.map(t, "`targets`")) else {
            return Vec::new();
        };
        entries.iter().map(|(key, node)| (key.clone(), self.strings(node, "a target"))).collect()
    }

    pub(super) fn map<'n>(&mut self, node: &'n Node, what: &str) -> Option<&'n [(Key, Node)]> {
        match &node.tree {
            Tree::Map(entries) => Some(entries),
            Tree::Scalar(Value::Null) => Some(&[]),
            _ => {
                self.wrong_type(node, what, "a mapping");
                None
            }
        }
    }

    pub(super) fn string(&mut self, node: &Node, what: &str) -> Option<String> {
        if let Tree::Text(text) = &node.tree {
            return Some(text.clone());
        }
        self.wrong_type(node, what, "text");
        None
    }

    fn strings(&mut self, node: &Node, what: &str) -> Vec<(String, Place)> {
        match &node.tree {
            Tree::Text(text) => vec![(text.clone(), node.place)],
            Tree::List(items) => items
                .iter()
                .filter_map(|item| Some((self.string(item, what)?, item.place)))
                .collect(),
            _ => {
                self.wrong_type(node, what, "a list of names");
                Vec::new()
            }
        }
    }

    fn wrong_type(&mut self, node: &Node, what: &str, wanted: &str) {
        let message = format!("{what} must be {wanted}, found {}", node.describe());
        self.problems.push(Problem::at(message, node.place, format!("expected {wanted}")));
    }

    pub(super) fn unknown_keys(&mut self, entries: &[(Key, Node)], known: &[&str], what: &str) {
        for (key, _) in entries {
            if !known.contains(&key.name.as_str()) {
                let message = format!("{what} has no key `{}`", key.name);
                let help = suggest(&key.name, known.iter().copied());
                self.problems.push(Problem::at(message, key.place, "unknown key").maybe_help(help));
            }
        }
    }
}
