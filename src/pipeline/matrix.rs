//! `matrix:` of a stage: which params vary and at which points.
//!
//! A point is what `--set` could have asked for: changes of params of the stage, of variables, or
//! of params of a stage upstream. `single` changes one param at a time and keeps the plain point,
//! `product` combines all values, both together are crossed; then `exclude` takes points away and
//! `include` adds some.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Stage;
use super::problem::{Problem, suggest};
use super::read::Reader;
use super::variables::{Variables, put};
use crate::fingerprint::canonical;
use crate::yaml::{Key, Node, Place, Tree};

/// More points than this are a mistake.
pub(super) const MAX_POINTS: usize = 5000;

const KEYS: [&str; 4] = ["single", "product", "include", "exclude"];
const EXAMPLE: &str = "`product: {PARAM: [VALUES]}` makes all combinations, \
    `single: {PARAM: [VALUES]}` changes one param at a time";

/// What a swept param is a param of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// A stage.
    Param { stage: String, path: Vec<String> },
    /// The pipeline.
    Variable(Vec<String>),
}

impl Target {
    /// Dotted path, without the stage.
    pub(super) fn path(&self) -> String {
        match self {
            Self::Param { path, .. } | Self::Variable(path) => path.join("."),
        }
    }
}

/// A swept param.
pub(super) struct Axis {
    pub(super) target: Target,
    /// Where it was written first.
    pub(super) place: Place,
    /// Its value in the plain pipeline.
    pub(super) plain: Value,
    /// Its other values, each once.
    pub(super) values: Vec<(Value, Node)>,
}

/// Changes of the plain pipeline: index of a value by index of its axis.
pub(super) type Changes = BTreeMap<usize, usize>;

/// The matrix of one stage.
pub(super) struct Sweep {
    pub(super) stage: String,
    pub(super) place: Place,
    pub(super) axes: BTreeSet<usize>,
    pub(super) points: Vec<Changes>,
}

/// Values of one axis; none is the plain value.
type AxisValues = (usize, Vec<Option<usize>>);

/// Reads every matrix of a pipeline.
pub(super) struct Matrices<'r, 'k> {
    pub(super) reader: &'r mut Reader<'k>,
    pub(super) root: &'r Node,
    pub(super) stages: &'r [Stage],
    pub(super) axes: Vec<Axis>,
}

impl Matrices<'_, '_> {
    /// The matrix of a stage, with its problems reported.
    pub(super) fn sweep(&mut self, stage: &Stage, key: &Key, written: &Node) -> Option<Sweep> {
        let before = self.reader.problems.len();
        let variables = Variables::new(self.root.get("params"));
        let node = variables.expand(written, &mut self.reader.problems);
        let entries = self.reader.map(&node, "`matrix`")?;
        for (unknown, _) in entries.iter().filter(|(k, _)| !KEYS.contains(&k.name.as_str())) {
            let message = format!("a matrix has no key `{}`", unknown.name);
            let problem = Problem::at(message, unknown.place, "unknown key");
            self.reader.problems.push(problem.help(EXAMPLE));
        }
        let mut section = |name| node.get(name).map(|n| self.axis_values(stage, n));
        let (single, product) = (section("single"), section("product"));
        let empty = single.is_none() && product.is_none() && node.get("include").is_none();
        if empty && self.reader.problems.len() == before {
            let problem = Problem::at("a matrix without points", key.place, "here");
            self.reader.problems.push(problem.help(EXAMPLE));
        }
        let (single, product) = (single.unwrap_or_default(), product.unwrap_or_default());
        let mut varied = BTreeSet::new();
        for (axis, _) in single.iter().chain(&product) {
            if !varied.insert(*axis) {
                let message = format!("`{}` is varied twice", self.axes[*axis].target.path());
                self.reader.problems.push(Problem::at(message, key.place, "in this matrix"));
            }
        }
        let size = 1 + single.iter().map(|(_, v)| v.len()).sum::<usize>();
        let size = product.iter().try_fold(size, |n, (_, v)| n.checked_mul(v.len()));
        if size.is_none_or(|n| n > MAX_POINTS + 1) {
            self.too_many(key.place, "points");
        }
        if self.reader.problems.len() > before {
            return None;
        }
        let has_base = !single.is_empty() || !product.is_empty();
        let mut points = if has_base { crossed(&single, &product) } else { Vec::new() };
        self.exclude(stage, &node, &mut points);
        self.include(stage, &node, &mut points);
        let mut seen = BTreeSet::new();
        points.retain(|point| seen.insert(point.clone()));
        if points.is_empty() && self.reader.problems.len() == before {
            let problem = Problem::at("a matrix without points", key.place, "all are excluded");
            self.reader.problems.push(problem);
        }
        let mut axes: BTreeSet<usize> = points.iter().flat_map(BTreeMap::keys).copied().collect();
        axes.extend(single.iter().chain(&product).map(|(axis, _)| *axis));
        Some(Sweep { stage: stage.name.clone(), place: key.place, axes, points })
    }

    fn too_many(&mut self, place: Place, what: &str) {
        let message = format!("a matrix of more than {MAX_POINTS} {what}");
        self.reader.problems.push(Problem::at(message, place, "this matrix"));
    }

    fn axis_values(&mut self, stage: &Stage, node: &Node) -> Vec<AxisValues> {
        let mut found = Vec::new();
        for (key, list) in self.reader.map(node, "`single` and `product`").unwrap_or_default() {
            let values = match &list.tree {
                Tree::List(values) if values.len() > MAX_POINTS => {
                    self.too_many(list.place, "values");
                    continue;
                }
                Tree::List(values) if !values.is_empty() => values,
                _ => {
                    let message = format!("`{}` needs a list of values", key.name);
                    let problem = Problem::at(message, list.place, "expected a list");
                    self.reader.problems.push(problem.help("for example `[1e-4, 2e-4]`"));
                    continue;
                }
            };
            let Some(axis) = self.axis(stage, key, &values[0]) else { continue };
            found.push((axis, values.iter().map(|v| self.value(axis, v)).collect()));
        }
        found
    }

    /// Points given one by one, each a mapping of changes.
    fn entries(&mut self, stage: &Stage, node: Option<&Node>) -> Vec<(Place, Vec<AxisValues>)> {
        let items = match node.map(|n| &n.tree) {
            Some(Tree::List(items)) if items.len() <= MAX_POINTS => items.as_slice(),
            Some(Tree::List(_)) => {
                self.too_many(node.map(|n| n.place).unwrap_or_default(), "points");
                return Vec::new();
            }
            Some(_) => {
                self.reader.problems.extend(node.map(|n| {
                    let label = "expected a list of mappings";
                    Problem::at("`include` and `exclude` list points", n.place, label)
                        .help("for example `[{learning_rate: 1e-4, seed: 3}]`")
                }));
                return Vec::new();
            }
            None => return Vec::new(),
        };
        let mut found = Vec::new();
        for item in items {
            let mut entry = Vec::new();
            for (key, value) in self.reader.map(item, "a point").unwrap_or_default() {
                let Some(axis) = self.axis(stage, key, value) else { continue };
                entry.push((axis, vec![self.value(axis, value)]));
            }
            found.push((item.place, entry));
        }
        found
    }

    fn exclude(&mut self, stage: &Stage, node: &Node, points: &mut Vec<Changes>) {
        for (place, entry) in self.entries(stage, node.get("exclude")) {
            let before = points.len();
            points.retain(|point| {
                entry.iter().any(|(axis, values)| point.get(axis).copied() != values[0])
            });
            if points.len() == before && self.reader.problems.is_empty() {
                let problem = Problem::at("this excludes no point", place, "here");
                self.reader
                    .problems
                    .push(problem.help("a point is excluded where it has every value given here"));
            }
        }
    }

    fn include(&mut self, stage: &Stage, node: &Node, points: &mut Vec<Changes>) {
        for (_, entry) in self.entries(stage, node.get("include")) {
            let change = |(axis, values): (usize, Vec<Option<usize>>)| Some((axis, values[0]?));
            points.push(entry.into_iter().filter_map(change).collect());
        }
    }

    /// The axis of a key: a param of the stage, else a variable, else `STAGE.PARAM`.
    fn axis(&mut self, stage: &Stage, key: &Key, example: &Node) -> Option<usize> {
        let target = self.target(stage, key, example)?;
        if let Some(known) = self.axes.iter().position(|a| a.target == target) {
            return Some(known);
        }
        if self.axes.len() == MAX_POINTS {
            self.too_many(key.place, "swept params");
            return None;
        }
        let plain = self.plain(&target);
        self.axes.push(Axis { target, place: key.place, plain, values: Vec::new() });
        Some(self.axes.len() - 1)
    }

    fn target(&mut self, stage: &Stage, key: &Key, example: &Node) -> Option<Target> {
        let path: Vec<String> = key.name.split('.').map(str::to_owned).collect();
        let own = || Target::Param { stage: stage.name.clone(), path: path.clone() };
        let written = self.written_params(&stage.name);
        if found(written, &path).is_some() || within(&stage.signature.params, &path).is_some() {
            return Some(own());
        }
        if found(self.root.get("params"), &path).is_some() {
            return Some(Target::Variable(path));
        }
        if path.len() > 1
            && let Some(other) = self.stages.iter().find(|s| s.name == path[0])
        {
            return Some(Target::Param { stage: other.name.clone(), path: path[1..].to_vec() });
        }
        if self.resolved(stage, &path, example).is_some() {
            return Some(own());
        }
        let mut known: Vec<String> = match &stage.signature.params {
            Value::Object(params) => params.keys().cloned().collect(),
            _ => Vec::new(),
        };
        known.extend(Variables::new(self.root.get("params")).names());
        let message = format!(
            "`{}` is neither a param of stage `{}`, nor a variable, nor `STAGE.PARAM`",
            key.name, stage.name
        );
        let help = suggest(&key.name, known.iter().map(String::as_str));
        self.reader
            .problems
            .push(Problem::at(message, key.place, "unknown param").maybe_help(help));
        None
    }

    /// The value of a target in the plain pipeline: as written, else the default.
    fn plain(&self, target: &Target) -> Value {
        let variables = Variables::new(self.root.get("params"));
        let expanded = |node: &Node| variables.expand(node, &mut Vec::new()).to_value();
        match target {
            Target::Variable(path) => found(self.root.get("params"), path).map(expanded),
            Target::Param { stage, path } => {
                found(self.written_params(stage), path).map(expanded).or_else(|| {
                    let stage = self.stages.iter().find(|s| s.name == *stage)?;
                    within(&stage.signature.params, path).cloned()
                })
            }
        }
        .unwrap_or_default()
    }

    /// Index of a value on its axis; none where it changes nothing.
    fn value(&mut self, axis: usize, node: &Node) -> Option<usize> {
        let value = node.to_value();
        let text = canonical(&value);
        if text == canonical(&self.axes[axis].plain) {
            return None;
        }
        if let Target::Param { stage, path } = &self.axes[axis].target
            && let Some(stage) = self.stages.iter().find(|s| s.name == *stage)
            && let Some(signature) = self.resolved(stage, path, node)
            && signature == stage.signature
        {
            return None;
        }
        let values = &mut self.axes[axis].values;
        let known = values.iter().position(|(v, _)| canonical(v) == text);
        Some(known.unwrap_or_else(|| {
            values.push((value, node.clone()));
            values.len() - 1
        }))
    }

    /// What the kind of a stage makes of its params with one of them changed, if it takes them.
    fn resolved(&self, stage: &Stage, path: &[String], to: &Node) -> Option<contract::Signature> {
        let null = || Node { place: stage.place, used_at: None, tree: Tree::Scalar(Value::Null) };
        let mut params = self.written_params(&stage.name).cloned().unwrap_or_else(null);
        let steps: Vec<&str> = path.iter().map(String::as_str).collect();
        put(&mut params, &steps, to.place, to.clone()).ok()?;
        let mut problems = Vec::new();
        let variables = Variables::new(self.root.get("params"));
        let params = variables.expand(&params, &mut problems).to_value();
        let kind = self.reader.kinds.get(&stage.kind).filter(|_| problems.is_empty())?;
        kind.resolve(&params).ok()
    }

    fn written_params(&self, stage: &str) -> Option<&Node> {
        self.root.get("stages")?.get(stage)?.get("params")
    }
}

/// All single changes, beside no change, crossed with all combinations.
fn crossed(single: &[AxisValues], product: &[AxisValues]) -> Vec<Changes> {
    let mut points = vec![Changes::new()];
    for (axis, values) in single {
        points.extend(values.iter().flatten().map(|value| Changes::from([(*axis, *value)])));
    }
    for (axis, values) in product {
        let with = |point: &Changes, value: &Option<usize>| {
            let mut point = point.clone();
            point.extend(value.map(|v| (*axis, v)));
            point
        };
        let crossed = points.iter().flat_map(|p| values.iter().map(move |v| with(p, v)));
        points = crossed.collect();
    }
    points
}

fn found<'n>(node: Option<&'n Node>, path: &[String]) -> Option<&'n Node> {
    path.iter().try_fold(node?, |n, step| n.get(step))
}

fn within<'v>(value: &'v Value, path: &[String]) -> Option<&'v Value> {
    path.iter().try_fold(value, |v, step| match v {
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        other => other.get(step),
    })
}
