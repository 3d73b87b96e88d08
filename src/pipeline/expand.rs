//! Turns the sweeps of a pipeline into named stages.
//!
//! A point of a stage is the stage as it would be if the point's changes had been `--set`. Only
//! stages that a change reaches get a copy; all others are shared. A stage downstream of a sweep
//! has its points too, unless the input says which point it follows (`from` with `at`) or gathers
//! all (`gather`). Sweeps that meet in one stage are crossed.

mod settle;

use std::collections::{BTreeMap, BTreeSet};

use super::matrix::{Axis, Changes, MAX_POINTS, Matrices, Sweep, Target};
use super::points::{PointParams, Points, point_name};
use super::problem::Problem;
use super::read::Reader;
use super::variables::{Variables, put};
use super::{InputRef, Stage};
use crate::yaml::{Key, Node, Tree};

/// More stages than this, points included, are a mistake.
const MAX_STAGES: usize = 20_000;

/// A validated pipeline without points to one with them.
pub(super) fn expand(
    reader: &mut Reader<'_>,
    root: &Node,
    stages: Vec<Stage>,
) -> (Vec<Stage>, Points) {
    let written: BTreeMap<&str, &Node> = match root.get("stages").map(|n| &n.tree) {
        Some(Tree::Map(entries)) => entries.iter().map(|(k, n)| (k.name.as_str(), n)).collect(),
        _ => BTreeMap::new(),
    };
    let gathers = |s: &Stage| s.inputs.values().any(|i| matches!(i.from, InputRef::Gathered(_)));
    let varies = |node: &&Node| node.get("matrix").is_some();
    if reader.pins.is_empty() && !written.values().any(varies) && !stages.iter().any(gathers) {
        return (stages, Points::default());
    }
    let mut matrices = Matrices { reader, root, stages: &stages, axes: Vec::new() };
    let mut sweeps = Vec::new();
    for stage in &stages {
        if let Some(written) = written.get(stage.name.as_str()).and_then(|n| n.get("matrix")) {
            let key = Key { place: written.place, name: stage.name.clone() };
            sweeps.extend(matrices.sweep(stage, &key, written));
        }
    }
    let axes = matrices.axes;
    if !reader.problems.is_empty() {
        return (stages, Points::default());
    }
    let mut expander = Expander::new(reader, root, written, &stages, axes, sweeps);
    expander.check_labels();
    expander.spread();
    expander.check_effects();
    if expander.reader.problems.is_empty() {
        expander.points();
        expander.settle();
    }
    let Expander { copies, points, settled, .. } = expander;
    let mut stages = stages;
    for (i, name, from) in settled {
        if let Some(input) = stages[i].inputs.get_mut(&name) {
            input.from = from;
        }
    }
    (assembled(stages, copies, &points), points)
}

/// Every plain stage followed by its copies.
fn assembled(stages: Vec<Stage>, mut copies: Vec<(usize, Stage)>, points: &Points) -> Vec<Stage> {
    let rank: BTreeMap<&String, usize> =
        points.of.values().flat_map(|names| names.iter().zip(0..)).collect();
    copies.sort_by_key(|(base, stage)| (*base, rank.get(&stage.name).copied()));
    let mut copies = copies.into_iter().peekable();
    let mut all = Vec::with_capacity(stages.len());
    for (i, stage) in stages.into_iter().enumerate() {
        all.push(stage);
        while let Some((_, copy)) = copies.next_if(|(base, _)| *base == i) {
            all.push(copy);
        }
    }
    all
}

struct Expander<'r, 'k> {
    reader: &'r mut Reader<'k>,
    root: &'r Node,
    /// What is written of every stage.
    written: BTreeMap<&'r str, &'r Node>,
    stages: &'r [Stage],
    axes: Vec<Axis>,
    sweeps: Vec<Sweep>,
    /// Names of the axes in names of points.
    labels: Vec<String>,
    index: BTreeMap<&'r str, usize>,
    /// Stages, producers first.
    order: Vec<usize>,
    /// Axes that can change a stage, itself or through what it follows.
    used: Vec<BTreeSet<usize>>,
    /// Sweeps whose points a stage has.
    reached_by: Vec<BTreeSet<usize>>,
    copies: Vec<(usize, Stage)>,
    /// What inputs of plain stages stand for.
    settled: Vec<(usize, String, InputRef)>,
    points: Points,
}

impl<'r, 'k> Expander<'r, 'k> {
    fn new(
        reader: &'r mut Reader<'k>,
        root: &'r Node,
        written: BTreeMap<&'r str, &'r Node>,
        stages: &'r [Stage],
        axes: Vec<Axis>,
        sweeps: Vec<Sweep>,
    ) -> Self {
        let labels = labels(&axes);
        let plain = labels.iter().cloned().zip(axes.iter().map(|a| a.plain.clone())).collect();
        Self {
            reader,
            root,
            written,
            stages,
            axes,
            sweeps,
            labels,
            index: stages.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect(),
            order: crate::graph::order(stages),
            used: vec![BTreeSet::new(); stages.len()],
            reached_by: vec![BTreeSet::new(); stages.len()],
            copies: Vec::new(),
            settled: Vec::new(),
            points: Points { plain, ..Points::default() },
        }
    }

    /// Stages whose points a stage follows.
    fn follows(&self, stage: usize) -> BTreeSet<usize> {
        let name = &self.stages[stage].name;
        let inputs = self.stages[stage].inputs.iter();
        let followed = inputs.filter_map(|(input, i)| match &i.from {
            InputRef::Output { stage, .. }
                if !self.reader.pins.contains_key(&(name.clone(), input.clone())) =>
            {
                self.index.get(stage.as_str()).copied()
            }
            _ => None,
        });
        followed.collect()
    }

    /// Finds out which axes and sweeps reach which stages.
    fn spread(&mut self) {
        for i in self.order.clone() {
            let (mut used, mut reached) = (self.touching(i), BTreeSet::new());
            for from in self.follows(i) {
                used.extend(&self.used[from]);
                reached.extend(&self.reached_by[from]);
            }
            let name = &self.stages[i].name;
            reached.extend(self.sweeps.iter().position(|s| s.stage == *name));
            (self.used[i], self.reached_by[i]) = (used, reached);
        }
    }

    /// Axes that change what is written of a stage itself.
    fn touching(&self, stage: usize) -> BTreeSet<usize> {
        let name = &self.stages[stage].name;
        let variables = Variables::new(self.root.get("params"));
        let mut read = BTreeSet::new();
        if let Some(node) = self.written.get(name.as_str()) {
            for part in ["params", "inputs", "env", "require"] {
                node.get(part).into_iter().for_each(|n| variables.read_by(n, &mut read));
            }
        }
        let touches = |axis: &Axis| match &axis.target {
            Target::Param { stage, .. } => stage == name,
            Target::Variable(path) => {
                let path = path.join(".");
                let below =
                    |a: &str, b: &str| a.strip_prefix(b).is_some_and(|r| r.starts_with('.'));
                read.iter().any(|r| *r == path || below(r, &path) || below(&path, r))
            }
        };
        (0..self.axes.len()).filter(|a| touches(&self.axes[*a])).collect()
    }

    /// Names of points must not be ambiguous.
    fn check_labels(&mut self) {
        let mut seen = BTreeSet::new();
        for (label, axis) in self.labels.iter().zip(&self.axes) {
            if !seen.insert(label) {
                let message = format!("two different swept params are called `{label}`");
                self.reader.problems.push(Problem::at(message, axis.place, "the second"));
            }
        }
    }

    /// Refuses axes without effect and sweeps that contradict each other.
    fn check_effects(&mut self) {
        for sweep in &self.sweeps {
            let used = &self.used[self.index[sweep.stage.as_str()]];
            for axis in sweep.axes.iter().filter(|a| !used.contains(a)) {
                let axis = &self.axes[*axis];
                let message = format!(
                    "`{}` changes nothing of stage `{}`: neither it nor a stage upstream reads it",
                    axis.target.path(),
                    sweep.stage
                );
                self.reader.problems.push(Problem::at(message, axis.place, "without effect"));
            }
        }
        for (i, reached) in self.reached_by.iter().enumerate() {
            let mut seen: BTreeMap<usize, &Sweep> = BTreeMap::new();
            for sweep in reached.iter().map(|s| &self.sweeps[*s]) {
                for axis in &sweep.axes {
                    let Some(other) = seen.insert(*axis, sweep) else { continue };
                    let message = format!(
                        "stages `{}` and `{}` both vary `{}`, and both reach `{}`",
                        other.stage,
                        sweep.stage,
                        self.axes[*axis].target.path(),
                        self.stages[i].name
                    );
                    self.reader.problems.push(
                        Problem::at(message, sweep.place, "varied again here")
                            .also(other.place, "varied here")
                            .help("vary it in one of them; stages downstream follow"),
                    );
                    return;
                }
            }
        }
    }

    /// Makes the points of every stage that a sweep reaches, and what they need upstream.
    fn points(&mut self) {
        for i in self.order.clone() {
            if self.reached_by[i].is_empty() {
                continue;
            }
            let Some(combinations) = self.combinations(i) else { return };
            let mut names: Vec<String> = Vec::with_capacity(combinations.len());
            let mut seen = BTreeSet::new();
            for changes in combinations {
                let name = self.request(i, &changes);
                if seen.insert(name.clone()) {
                    names.push(name);
                }
            }
            self.points.of.insert(self.stages[i].name.clone(), names);
            if !self.reader.problems.is_empty() {
                return;
            }
        }
        self.shared_points();
    }

    fn combinations(&mut self, stage: usize) -> Option<Vec<Changes>> {
        let sweeps = self.reached_by[stage].iter().map(|s| &self.sweeps[*s]);
        let mut all = vec![Changes::new()];
        for sweep in sweeps {
            if all.len().saturating_mul(sweep.points.len()) > MAX_POINTS {
                let name = &self.stages[stage].name;
                let message = format!("stage `{name}` would have more than {MAX_POINTS} points");
                let place = self.stages[stage].place;
                self.reader.problems.push(
                    Problem::at(message, place, "sweeps meet here")
                        .help("follow one point with `{from: STAGE.OUTPUT, at: {…}}`"),
                );
                return None;
            }
            let with =
                |a: &Changes, b: &Changes| a.iter().chain(b).map(|(k, v)| (*k, *v)).collect();
            all = all.iter().flat_map(|a| sweep.points.iter().map(move |b| with(a, b))).collect();
        }
        Some(all)
    }

    /// Name of a stage at a point; the stage and those upstream are made where they are missing.
    fn request(&mut self, stage: usize, changes: &Changes) -> String {
        let wanted = self.name(stage, changes);
        let mut open = vec![(stage, changes.clone())];
        while let Some((stage, changes)) = open.pop() {
            let name = self.name(stage, &changes);
            if self.points.params.contains_key(&name) {
                continue;
            }
            self.points.params.insert(name.clone(), self.params(stage, &changes));
            if !name.contains('@') {
                continue;
            }
            if self.copies.len() >= MAX_STAGES {
                let message = format!("more than {MAX_STAGES} stages");
                let place = self.stages[stage].place;
                self.reader.problems.push(Problem::at(message, place, "reached by sweeps"));
                return wanted;
            }
            let follows = self.follows(stage);
            if let Some(mut copy) = self.copy(stage, &changes) {
                copy.name = name;
                self.check_wiring(&self.stages[stage], &copy);
                for (input, i) in &mut copy.inputs {
                    let pinned = self
                        .reader
                        .pins
                        .contains_key(&(self.stages[stage].name.clone(), input.clone()));
                    if let (InputRef::Output { stage: from, .. }, false) = (&mut i.from, pinned)
                        && let Some(from_index) = self.index.get(from.as_str())
                    {
                        *from = self.name(*from_index, &changes);
                    }
                }
                self.copies.push((stage, copy));
            }
            open.extend(follows.into_iter().map(|from| (from, changes.clone())));
        }
        wanted
    }

    /// A change of params must not change which stages a stage reads.
    fn check_wiring(&mut self, plain: &Stage, copy: &Stage) {
        for (name, input) in &copy.inputs {
            let from = plain.inputs.get(name).map(|i| &i.from);
            let differs = match (&input.from, from) {
                (InputRef::Local(_), Some(InputRef::Local(_))) => false,
                (now, Some(before)) => now != before,
                (_, None) => true,
            };
            if differs {
                let message =
                    format!("a matrix changes where `{name}` of `{}` comes from", plain.name);
                self.reader.problems.push(
                    Problem::at(message, input.place, "varies")
                        .help("vary params; wire each source to a stage of its own"),
                );
            }
        }
    }

    /// The stage as it would be with the changes.
    fn copy(&mut self, stage: usize, changes: &Changes) -> Option<Stage> {
        let plain = &self.stages[stage];
        let mut node: Node = without_matrix(self.written.get(plain.name.as_str())?);
        let mut variables = self.root.get("params").cloned();
        for (axis, value) in changes.iter().filter(|(a, _)| self.used[stage].contains(a)) {
            let (_, value) = &self.axes[*axis].values[*value];
            let result = match &self.axes[*axis].target {
                Target::Param { stage, path } if *stage == plain.name => {
                    let steps = std::iter::once("params").chain(path.iter().map(String::as_str));
                    put(&mut node, &steps.collect::<Vec<_>>(), value.place, value.clone())
                }
                Target::Param { .. } => Ok(()),
                Target::Variable(path) => {
                    let steps: Vec<&str> = path.iter().map(String::as_str).collect();
                    match &mut variables {
                        Some(root) => put(root, &steps, value.place, value.clone()),
                        None => Ok(()),
                    }
                }
            };
            self.reader.problems.extend(result.err());
        }
        let key = Key { place: plain.place, name: plain.name.clone() };
        self.reader.stage(&key, &node, &Variables::new(variables.as_ref()))
    }

    fn name(&self, stage: usize, changes: &Changes) -> String {
        let changes = changes.iter().filter(|(axis, _)| self.used[stage].contains(axis));
        let changes = changes.map(|(axis, value)| {
            (self.labels[*axis].clone(), self.axes[*axis].values[*value].0.clone())
        });
        point_name(&self.stages[stage].name, &changes.collect())
    }

    /// Value of every axis that counts for a stage.
    fn params(&self, stage: usize, changes: &Changes) -> PointParams {
        let value = |axis: &usize| match changes.get(axis) {
            Some(value) => self.axes[*axis].values[*value].0.clone(),
            None => self.axes[*axis].plain.clone(),
        };
        self.used[stage].iter().map(|axis| (self.labels[*axis].clone(), value(axis))).collect()
    }

    /// Points of stages that only were copied for others: the plain stage and its copies.
    fn shared_points(&mut self) {
        for (stage, copy) in &self.copies {
            let plain = &self.stages[*stage];
            if !self.reached_by[*stage].is_empty() {
                continue;
            }
            let names = self
                .points
                .of
                .entry(plain.name.clone())
                .or_insert_with(|| vec![plain.name.clone()]);
            names.push(copy.name.clone());
        }
        for i in 0..self.stages.len() {
            let name = &self.stages[i].name;
            if self.points.of.contains_key(name) && !self.points.params.contains_key(name) {
                let params = self.params(i, &Changes::new());
                self.points.params.insert(name.clone(), params);
            }
        }
    }
}

/// What is written of a stage but its matrix, which can be by far the longest part.
fn without_matrix(written: &Node) -> Node {
    let Tree::Map(entries) = &written.tree else { return written.clone() };
    let rest = entries.iter().filter(|(key, _)| key.name != "matrix").cloned().collect();
    Node { tree: Tree::Map(rest), ..*written }
}

/// Names of axes: the path of the param, with its stage where another axis has the same path.
fn labels(axes: &[Axis]) -> Vec<String> {
    let label = |axis: &Axis| {
        let path = axis.target.path();
        let shared = axes.iter().filter(|other| other.target.path() == path).count() > 1;
        match &axis.target {
            Target::Param { stage, .. } if shared => format!("{stage}.{path}"),
            _ => path,
        }
    };
    axes.iter().map(label).collect()
}
