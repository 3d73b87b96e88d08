//! Variables: `params:` at the top of the file, `${a.b}` in stages, `--set a.b=VALUE`.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::pipeline::problem::{Problem, suggest};
use crate::yaml::{Key, Node, Place, Tree};

/// The variables of a pipeline.
pub(crate) struct Variables<'a> {
    root: Option<&'a Node>,
}

impl<'a> Variables<'a> {
    pub(crate) fn new(root: Option<&'a Node>) -> Self {
        Self { root }
    }

    /// The value with every `${…}` replaced. A value that is exactly `${a.b}` takes the variable's
    /// type; inside text it is interpolated; `$${` stands for `${`.
    pub(crate) fn expand(&self, node: &Node, problems: &mut Vec<Problem>) -> Node {
        self.expanded(node, &mut Vec::new(), problems)
    }

    fn expanded(&self, node: &Node, trail: &mut Vec<String>, problems: &mut Vec<Problem>) -> Node {
        let tree = match &node.tree {
            Tree::Scalar(_) => return node.clone(),
            Tree::Text(text) if !text.contains("${") => return node.clone(),
            Tree::Text(text) => match parts(text) {
                Ok(parts) => return self.text(node, &parts, trail, problems),
                Err(message) => {
                    problems.push(Problem::at(message, node.place, "here"));
                    return node.clone();
                }
            },
            Tree::List(items) => {
                Tree::List(items.iter().map(|n| self.expanded(n, trail, problems)).collect())
            }
            Tree::Map(entries) => Tree::Map(
                entries
                    .iter()
                    .map(|(k, n)| (k.clone(), self.expanded(n, trail, problems)))
                    .collect(),
            ),
        };
        Node { tree, ..node.clone() }
    }

    fn text(
        &self,
        node: &Node,
        parts: &[Part],
        trail: &mut Vec<String>,
        problems: &mut Vec<Problem>,
    ) -> Node {
        if let [Part::Variable(path)] = parts {
            let mut value = self.value(path, node.place, trail, problems);
            value.used_at = Some(node.place);
            return value;
        }
        let mut text = String::new();
        for part in parts {
            match part {
                Part::Text(literal) => text.push_str(literal),
                Part::Variable(path) => {
                    let value = self.value(path, node.place, trail, problems);
                    match value.to_value() {
                        Value::String(s) => text.push_str(&s),
                        Value::Array(_) | Value::Object(_) => problems.push(Problem::at(
                            format!(
                                "`${{{path}}}` is {} and cannot stand inside text",
                                value.describe()
                            ),
                            node.place,
                            "used here",
                        )),
                        other => text.push_str(&other.to_string()),
                    }
                }
            }
        }
        Node { tree: Tree::Text(text), ..node.clone() }
    }

    fn value(
        &self,
        path: &str,
        place: Place,
        trail: &mut Vec<String>,
        problems: &mut Vec<Problem>,
    ) -> Node {
        let null = Node { place, used_at: None, tree: Tree::Scalar(Value::Null) };
        if trail.iter().any(|p| p == path) {
            let cycle = trail.join("` -> `");
            problems.push(
                Problem::at(
                    format!("variable `{path}` refers to itself"),
                    place,
                    "closes the circle",
                )
                .help(format!("the circle is `{cycle}` -> `{path}`")),
            );
            return null;
        }
        let found = path.split('.').try_fold(self.root, |n, step| Some(n?.get(step))).flatten();
        let Some(found) = found else {
            let names = self.names();
            let help = if names.is_empty() {
                Some("variables are defined under `params:` at the top of the file".to_owned())
            } else {
                suggest(path, names.iter().map(String::as_str))
            };
            problems.push(
                Problem::at(format!("no variable `{path}`"), place, "used here").maybe_help(help),
            );
            return null;
        };
        trail.push(path.to_owned());
        let value = self.expanded(found, trail, problems);
        trail.pop();
        value
    }

    /// Adds the dotted paths of all variables that a value reads, those of variables included.
    pub(crate) fn read_by(&self, node: &Node, into: &mut BTreeSet<String>) {
        match &node.tree {
            Tree::Scalar(_) => {}
            Tree::Text(text) => {
                for part in parts(text).unwrap_or_default() {
                    let Part::Variable(path) = part else { continue };
                    let found = path.split('.').try_fold(self.root, |n, s| Some(n?.get(s)));
                    if into.insert(path)
                        && let Some(found) = found.flatten()
                    {
                        self.read_by(found, into);
                    }
                }
            }
            Tree::List(items) => items.iter().for_each(|n| self.read_by(n, into)),
            Tree::Map(entries) => entries.iter().for_each(|(_, n)| self.read_by(n, into)),
        }
    }

    /// Dotted paths of all variables.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        if let Some(root) = self.root {
            paths(root, "", &mut names);
        }
        names
    }
}

fn paths(node: &Node, prefix: &str, names: &mut Vec<String>) {
    if let Tree::Map(entries) = &node.tree {
        for (key, value) in entries {
            let path = format!("{prefix}{}", key.name);
            paths(value, &format!("{path}."), names);
            names.push(path);
        }
    }
}

enum Part {
    Text(String),
    Variable(String),
}

fn parts(text: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            literal.push_str(&rest[..at - 1]);
            literal.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        literal.push_str(&rest[..at]);
        let end = rest[at..].find('}').ok_or("`${` without its `}` (write `$${` for a literal)")?;
        let path = rest[at + 2..at + end].trim();
        if path.is_empty() {
            return Err("`${}` names no variable".to_owned());
        }
        if !literal.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut literal)));
        }
        parts.push(Part::Variable(path.to_owned()));
        rest = &rest[at + end + 1..];
    }
    literal.push_str(rest);
    if !literal.is_empty() || parts.is_empty() {
        parts.push(Part::Text(literal));
    }
    Ok(parts)
}

/// Applies one parsed `--set PATH=VALUE` to the document: to the variable of that name, else to
/// the param of the stage that the path starts with.
pub(crate) fn apply_set(
    root: &mut Node,
    path: &str,
    at: Place,
    value: Node,
) -> Result<(), Problem> {
    let steps: Vec<&str> = path.split('.').collect();
    if steps.iter().any(|s| s.is_empty()) {
        return Err(Problem::at(format!("`{path}` is not a dotted path"), at, "here"));
    }
    let variable = root.get("params").is_some_and(|p| find(p, &steps).is_some());
    if variable {
        let mut full = vec!["params"];
        full.extend(&steps);
        return put(root, &full, at, value);
    }
    let stage = root.get("stages").and_then(|s| s.get(steps[0]));
    if stage.is_some() && steps.len() > 1 {
        let mut full = vec!["stages", steps[0], "params"];
        full.extend(&steps[1..]);
        return put(root, &full, at, value);
    }
    let mut known = Variables::new(root.get("params")).names();
    if let Some(Tree::Map(stages)) = root.get("stages").map(|s| &s.tree) {
        known.extend(stages.iter().map(|(k, _)| k.name.clone()));
    }
    let help = if stage.is_some() {
        Some(format!("`{path}` is a stage: name one of its params, as in `{path}.seed=1`"))
    } else {
        suggest(path, known.iter().map(String::as_str))
    };
    Err(Problem::at(format!("`{path}` is neither a variable nor a param of a stage"), at, "here")
        .maybe_help(help))
}

fn find<'a>(node: &'a Node, steps: &[&str]) -> Option<&'a Node> {
    steps.iter().try_fold(node, |n, step| n.get(step))
}

/// Replaces or adds the value under `steps`.
pub(super) fn put(node: &mut Node, steps: &[&str], at: Place, value: Node) -> Result<(), Problem> {
    let Some((step, rest)) = steps.split_first() else {
        *node = value;
        return Ok(());
    };
    if matches!(node.tree, Tree::Scalar(Value::Null)) {
        node.tree = Tree::Map(Vec::new());
    }
    match &mut node.tree {
        Tree::Map(entries) => {
            let index = entries.iter().position(|(k, _)| k.name == *step).unwrap_or_else(|| {
                let empty = Node { place: at, used_at: None, tree: Tree::Scalar(Value::Null) };
                entries.push((Key { place: at, name: (*step).to_owned() }, empty));
                entries.len() - 1
            });
            put(&mut entries[index].1, rest, at, value)
        }
        Tree::List(items) => {
            let length = items.len();
            let item = step.parse::<usize>().ok().and_then(|i| items.get_mut(i));
            let missing =
                || Problem::at(format!("`{step}` is not an index below {length}"), at, "here");
            put(item.ok_or_else(missing)?, rest, at, value)
        }
        _ => Err(Problem::at(
            format!("`{step}` is set inside a value that is {}", node.describe()),
            at,
            "here",
        )),
    }
}
