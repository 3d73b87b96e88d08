//! From the spanned tree of a document to a [`Pipeline`], collecting every problem on the way.

mod remote;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contract::{OutputClass, ParamError, Signature};
use serde_json::Value;

use super::problem::{PipelineError, Problem, Sources, suggest};
use super::variables::{Variables, apply_set};
use super::{
    Gathered, Input, InputRef, Kinds, Overrides, Pipeline, Points, Stage, expand, profile,
};
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

    pub(super) fn stage(
        &mut self,
        key: &Key,
        node: &Node,
        variables: &Variables<'_>,
    ) -> Option<Stage> {
        let usable = !key.name.is_empty()
            && key.name.chars().all(|c| c.is_alphanumeric() || "-_".contains(c));
        if !usable {
            self.problems.push(
                Problem::at(
                    format!("`{}` cannot be the name of a stage", key.name),
                    key.place,
                    "here",
                )
                .help("letters, digits, `-` and `_`"),
            );
            return None;
        }
        let entries = self.map(node, "a stage")?;
        self.unknown_keys(entries, &STAGE_KEYS, "a stage");
        let Some(kind) = node.get("kind") else {
            let message = format!("stage `{}` needs a `kind`", key.name);
            let help = format!("kinds: {}", self.kinds.names().collect::<Vec<_>>().join(", "));
            self.problems.push(Problem::at(message, key.place, "this stage").help(help));
            return None;
        };
        let kind_name = self.string(kind, "kind")?;
        let Some(found) = self.kinds.get(&kind_name) else {
            let help = suggest(&kind_name, self.kinds.names());
            self.problems.push(
                Problem::at(format!("no stage kind `{kind_name}`"), kind.place, "unknown kind")
                    .maybe_help(help),
            );
            return None;
        };
        let before = self.problems.len();
        let null = Node { place: key.place, used_at: None, tree: Tree::Scalar(Value::Null) };
        let params = variables.expand(node.get("params").unwrap_or(&null), &mut self.problems);
        if self.problems.len() > before {
            return None;
        }
        let signature = match found.resolve(&params.to_value()) {
            Ok(signature) => signature,
            Err(error) => {
                self.problems.push(param_problem(&error, &params, key, &kind_name));
                return None;
            }
        };
        let inputs = self.inputs(key, node, &signature, variables);
        let mut stage = Stage {
            name: key.name.clone(),
            place: key.place,
            kind: kind_name,
            version: found.version(),
            signature,
            inputs,
            env: BTreeMap::new(),
            pass_env: Vec::new(),
            require: BTreeMap::new(),
            description: node.get("description").and_then(|d| self.string(d, "description")),
        };
        self.environment(node, variables, &mut stage);
        Some(stage)
    }

    fn inputs(
        &mut self,
        key: &Key,
        node: &Node,
        signature: &Signature,
        variables: &Variables<'_>,
    ) -> BTreeMap<String, Input> {
        let mut inputs = BTreeMap::new();
        let entries = node.get("inputs").and_then(|n| self.map(n, "`inputs`"));
        for (name, node) in entries.unwrap_or_default() {
            let known = signature.inputs.iter().any(|i| i.name == name.name);
            if !known && !signature.free_inputs {
                let names = signature.inputs.iter().map(|i| i.name.as_str());
                let help = suggest(&name.name, names)
                    .unwrap_or_else(|| "this kind takes no inputs".to_owned());
                let message = format!("stage `{}` has no input `{}`", key.name, name.name);
                self.problems.push(Problem::at(message, name.place, "unknown input").help(help));
                continue;
            }
            let node = variables.expand(node, &mut self.problems);
            if let Some(at) = node.get("at") {
                // The plain stage is read before its points and decides for them.
                self.pins
                    .entry((key.name.clone(), name.name.clone()))
                    .or_insert_with(|| at.clone());
            }
            if let Some(from) = self.reference(&node) {
                inputs.insert(name.name.clone(), Input { from, place: node.place });
            }
        }
        for (name, path) in &signature.local_inputs {
            let from = InputRef::Local(PathBuf::from(path));
            inputs.insert(name.clone(), Input { from, place: key.place });
        }
        for spec in signature.inputs.iter().filter(|i| i.required) {
            let wired = inputs.contains_key(&spec.name)
                || node.get("inputs").is_some_and(|n| n.get(&spec.name).is_some());
            if !wired {
                let message = format!("stage `{}` needs the input `{}`", key.name, spec.name);
                let help = format!(
                    "`{}`: {}; wire it as `{}: STAGE.OUTPUT`",
                    spec.name, spec.help, spec.name
                );
                self.problems.push(Problem::at(message, key.place, "missing input").help(help));
            }
        }
        inputs
    }

    fn reference(&mut self, node: &Node) -> Option<InputRef> {
        if let Tree::Map(entries) = &node.tree {
            return self.mapped_reference(node, entries);
        }
        let text = self.string(node, "an input (`STAGE.OUTPUT`, or `{path: FILE}`)")?;
        if text.contains('@') {
            let message = format!("`{text}` names a point");
            self.problems.push(Problem::at(message, node.place, "here").help(
                "an input follows one point as `{from: STAGE.OUTPUT, at: {PARAM: VALUE}}` \
                 (`at: {}` is the default) and takes all as `{gather: STAGE.OUTPUT}`",
            ));
            return None;
        }
        let (stage, output) = text.split_once('.').unwrap_or((&text, ""));
        Some(InputRef::Output { stage: stage.to_owned(), output: output.to_owned() })
    }

    /// `{path: FILE}`, `{gather: STAGE.OUTPUT}` or `{from: STAGE.OUTPUT, at: {PARAM: VALUE}}`.
    fn mapped_reference(&mut self, node: &Node, entries: &[(Key, Node)]) -> Option<InputRef> {
        let known: &[&str] = match (node.get("gather"), node.get("from")) {
            (Some(_), _) => &["gather"],
            (None, Some(_)) => &["from", "at"],
            (None, None) => &["path", "gather", "from"],
        };
        self.unknown_keys(entries, known, "an input");
        if let Some(gather) = node.get("gather") {
            let InputRef::Output { stage, output } = self.plain_reference(gather)? else {
                return None;
            };
            return Some(InputRef::Gathered(Gathered { stage, output, members: Arc::default() }));
        }
        if let Some(from) = node.get("from") {
            match node.get("at") {
                Some(at) => drop(self.map(at, "`at`")),
                None => self.problems.push(
                    Problem::at("`from` without `at`", node.place, "here")
                        .help("`at: {PARAM: VALUE}` names the point; `at: {}` is the default"),
                ),
            }
            return self.plain_reference(from);
        }
        let Some(path) = node.get("path") else {
            if entries.is_empty() {
                self.wrong_type(node, "an input", "`STAGE.OUTPUT`, or `{path: FILE}`");
            }
            return None;
        };
        Some(InputRef::Local(PathBuf::from(self.string(path, "path")?)))
    }

    fn plain_reference(&mut self, node: &Node) -> Option<InputRef> {
        self.string(node, "`gather` and `from`")?;
        self.reference(node)
    }

    fn environment(&mut self, node: &Node, variables: &Variables<'_>, stage: &mut Stage) {
        if let Some(env) = node.get("env") {
            let env = variables.expand(env, &mut self.problems);
            match &env.tree {
                Tree::List(_) => {
                    let names = self.strings(&env, "`env`");
                    stage.env = names.into_iter().map(|(name, _)| (name, None)).collect();
                }
                _ => {
                    for (key, node) in self.map(&env, "`env`").unwrap_or_default() {
                        let value = match node.to_value() {
                            Value::Null => None,
                            Value::String(text) => Some(text),
                            Value::Array(_) | Value::Object(_) => {
                                self.wrong_type(node, "a value of `env`", "text");
                                None
                            }
                            other => Some(other.to_string()),
                        };
                        stage.env.insert(key.name.clone(), value);
                    }
                }
            }
        }
        if let Some(names) = node.get("pass_env") {
            let names = self.strings(names, "`pass_env`");
            stage.pass_env = names.into_iter().map(|(name, _)| name).collect();
        }
        if let Some(require) = node.get("require") {
            let require = variables.expand(require, &mut self.problems);
            for (key, node) in self.map(&require, "`require`").unwrap_or_default() {
                stage.require.insert(key.name.clone(), node.to_value());
            }
        }
    }

    /// Fills in default outputs and checks that every reference leads somewhere.
    fn references(&mut self, stages: &[Stage]) {
        let known: HashMap<&str, &Stage> = stages.iter().map(|s| (s.name.as_str(), s)).collect();
        for stage in stages {
            for input in stage.inputs.values() {
                let (InputRef::Output { stage: from, output }
                | InputRef::Gathered(Gathered { stage: from, output, .. })) = &input.from
                else {
                    continue;
                };
                let Some(upstream) = known.get(from.as_str()) else {
                    // A stage that is there and did not parse has a problem of its own.
                    if self.problems.is_empty() {
                        let help = suggest(from, stages.iter().map(|s| s.name.as_str()));
                        let message = format!("no stage `{from}`");
                        self.problems.push(
                            Problem::at(message, input.place, "unknown stage").maybe_help(help),
                        );
                    }
                    continue;
                };
                let outputs = &upstream.signature.outputs;
                let spec =
                    if output.is_empty() { outputs.first() } else { upstream.output(output) };
                match spec {
                    Some(spec) if spec.class == OutputClass::Telemetry => self.problems.push(
                        Problem::at(
                            format!("`{from}.{}` is telemetry and cannot be an input", spec.name),
                            input.place,
                            "used here",
                        )
                        .help("telemetry holds times and rates, which differ from run to run"),
                    ),
                    Some(_) => {}
                    None => {
                        let help = suggest(output, outputs.iter().map(|o| o.name.as_str()));
                        let message = format!("stage `{from}` has no output `{output}`");
                        self.problems.push(
                            Problem::at(message, input.place, "unknown output").maybe_help(help),
                        );
                    }
                }
            }
        }
    }

    fn cycles(&mut self, stages: &[Stage]) {
        if !self.problems.is_empty() {
            return;
        }
        for cycle in crate::graph::cycles(stages) {
            let circle: Vec<&str> = cycle.iter().map(|i| stages[*i].name.as_str()).collect();
            let mut problem: Option<Problem> = None;
            for (at, index) in cycle.iter().enumerate() {
                let next = circle[(at + 1) % circle.len()];
                let edge = stages[*index].inputs.values().find(|i| i.from.stages().contains(&next));
                let Some(edge) = edge else { continue };
                let label = format!("`{}` needs `{next}`", stages[*index].name);
                problem = Some(match problem {
                    Some(problem) => problem.also(edge.place, label),
                    None => Problem::at("these stages wait for each other", edge.place, label),
                });
            }
            let help = format!("the circle is {} -> {}", circle.join(" -> "), circle[0]);
            self.problems.extend(problem.map(|p| p.help(help)));
        }
    }

    fn targets(&mut self, targets: &Targets, stages: &[Stage], points: &Points) {
        let known = || {
            let stages = stages.iter().map(|s| s.name.as_str());
            stages.chain(targets.iter().map(|(key, _)| key.name.as_str()))
        };
        for (key, members) in targets {
            if let Some(stage) = stages.iter().find(|s| s.name == key.name) {
                self.problems.push(
                    Problem::at(
                        format!("`{}` is a stage and a target", key.name),
                        key.place,
                        "target",
                    )
                    .also(stage.place, "stage"),
                );
            }
            for (name, place) in members {
                let stands_for = points.resolve(name);
                let there = !stands_for.is_empty()
                    && stands_for.iter().all(|stage| known().any(|k| k == stage));
                if !there && self.problems.is_empty() {
                    let help = suggest(name, known());
                    self.problems.push(
                        Problem::at(format!("no stage or target `{name}`"), *place, "unknown")
                            .maybe_help(help),
                    );
                }
            }
            if reaches(&key.name, members, targets, targets.len()) {
                self.problems.push(Problem::at(
                    format!("target `{}` contains itself", key.name),
                    key.place,
                    "this target",
                ));
            }
        }
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

/// Whether target `name` is among what `members` stand for; `depth` bounds the search.
fn reaches(name: &str, members: &[(String, Place)], targets: &Targets, depth: usize) -> bool {
    members.iter().any(|(member, _)| {
        member == name
            || depth > 0
                && targets
                    .iter()
                    .find(|(key, _)| key.name == *member)
                    .is_some_and(|(_, inner)| reaches(name, inner, targets, depth - 1))
    })
}

/// A param error at the deepest part of its path that was written down.
fn param_problem(error: &ParamError, params: &Node, stage: &Key, kind: &str) -> Problem {
    let (mut node, mut place, mut used_at, mut exact) = (params, params.place, None, true);
    for (depth, step) in error.path.iter().enumerate() {
        used_at = used_at.or(node.used_at);
        let Some(next) = node.get(step) else {
            exact = false;
            break;
        };
        // An unknown key is the key's fault, not its value's.
        if depth + 1 == error.path.len()
            && error.message.starts_with("unknown field")
            && let Tree::Map(entries) = &node.tree
            && let Some((key, _)) = entries.iter().find(|(k, _)| k.name == *step)
        {
            place = key.place;
            break;
        }
        node = next;
        place = node.place;
    }
    used_at = used_at.or(node.used_at);
    let path = error.path.join(".");
    let message = if path.is_empty() {
        format!("params of stage `{}` (kind `{kind}`): {}", stage.name, error.message)
    } else {
        format!("param `{path}` of stage `{}` (kind `{kind}`): {}", stage.name, error.message)
    };
    let wrong = error.path.last().map_or("", String::as_str);
    let wrong = match node.to_value() {
        Value::String(text) if exact && error.message.starts_with("unknown variant") => text,
        _ => wrong.to_owned(),
    };
    let help = if error.expected.is_empty() {
        Some(format!("`pipe kinds {kind}` lists its params"))
    } else {
        suggest(&wrong, error.expected.iter().map(String::as_str))
    };
    let problem = Problem::at(message, place, "here").maybe_help(help);
    match used_at {
        Some(used) => problem.also(used, "used here"),
        None => problem,
    }
}
