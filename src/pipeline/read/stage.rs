//! One entry of `stages`: its kind, params, inputs and environment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use contract::{ParamError, Signature};
use serde_json::Value;

use super::{Reader, STAGE_KEYS};
use crate::pipeline::problem::{Problem, suggest};
use crate::pipeline::variables::Variables;
use crate::pipeline::{Gathered, Input, InputRef, Stage};
use crate::yaml::{Key, Node, Tree};

impl Reader<'_> {
    pub(in crate::pipeline) fn stage(
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
                let from = if spec.gathered { "{gather: STAGE.OUTPUT}" } else { "STAGE.OUTPUT" };
                let (name, about) = (&spec.name, &spec.help);
                let help = format!("`{name}`: {about}; wire it as `{name}: {from}`");
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
