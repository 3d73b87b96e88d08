//! The stages of a pipeline as a directed graph: order, closures, cycles, drawings.

mod drawing;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::fmt::Write;

use petgraph::Direction;
use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};

use crate::pipeline::{Gathered, InputRef, Pipeline, Stage};

/// Stages and who needs whom.
#[derive(Debug)]
pub struct StageGraph {
    /// Node `i` is stage `i` of the pipeline; edges run from producer to consumer. Nodes beyond
    /// the stages stand for gathered lists: `n` stages that gather `m` points are `n + m` edges.
    graph: DiGraph<(), ()>,
    names: Vec<String>,
    order: Vec<usize>,
    /// Length of the longest way to each node from one that needs nothing.
    depth: Vec<usize>,
    rank: HashMap<String, usize>,
}

impl StageGraph {
    /// The graph of a validated pipeline.
    pub fn new(pipeline: &Pipeline) -> Self {
        let graph = edges(&pipeline.stages);
        let (order, depth) = topological(&graph, pipeline.stages.len());
        let names: Vec<String> = pipeline.stages.iter().map(|s| s.name.clone()).collect();
        let rank = order.iter().enumerate().map(|(rank, i)| (names[*i].clone(), rank)).collect();
        Self { graph, names, order, depth, rank }
    }

    /// All stages, producers first, file order among those that are ready.
    pub fn order(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(|i| self.names[*i].as_str())
    }

    /// The named stages and everything upstream of them, in [`StageGraph::order`].
    pub fn with_upstream(&self, names: &[String]) -> Vec<String> {
        self.reach(names, Direction::Incoming)
    }

    /// The named stages and everything downstream of them, in [`StageGraph::order`].
    pub fn with_downstream(&self, names: &[String]) -> Vec<String> {
        self.reach(names, Direction::Outgoing)
    }

    fn reach(&self, names: &[String], direction: Direction) -> Vec<String> {
        let mut seen = vec![false; self.graph.node_count()];
        let mut open: Vec<usize> = names.iter().filter_map(|n| self.index(n)).collect();
        while let Some(i) = open.pop() {
            if !std::mem::replace(&mut seen[i], true) {
                let near = self.graph.neighbors_directed(NodeIndex::new(i), direction);
                open.extend(near.map(NodeIndex::index));
            }
        }
        let reached = self.order.iter().filter(|i| seen[**i]);
        reached.map(|i| self.names[*i].clone()).collect()
    }

    /// Some stages in groups, each in the order given: what a stage needs is in an earlier group.
    pub fn waves<'n>(&self, names: &'n [String]) -> Vec<Vec<&'n str>> {
        let mut by_depth: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        for name in names {
            let depth = self.index(name).map_or(0, |i| self.depth[i]);
            by_depth.entry(depth).or_default().push(name);
        }
        by_depth.into_values().collect()
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.rank.get(name).map(|rank| self.order[*rank])
    }

    /// Graphviz DOT; `note` adds a line under a stage's name.
    pub fn to_dot(&self, pipeline: &Pipeline, note: impl Fn(&str) -> Option<String>) -> String {
        let mut out = String::from("digraph pipeline {\n  rankdir=LR;\n  node [shape=box];\n");
        for stage in &pipeline.stages {
            let label = lines(stage, note(&stage.name)).join("\\n");
            let _ =
                writeln!(out, "  \"{}\" [label=\"{}\"];", stage.name, label.replace('"', "\\\""));
        }
        for (from, to, label) in labelled_edges(pipeline) {
            let _ = writeln!(out, "  \"{from}\" -> \"{to}\" [label=\"{label}\"];");
        }
        out.push_str("}\n");
        out
    }

    /// Mermaid; `note` adds a line under a stage's name.
    pub fn to_mermaid(&self, pipeline: &Pipeline, note: impl Fn(&str) -> Option<String>) -> String {
        let mut out = String::from("flowchart LR\n");
        let id = |name: &str| self.index(name).map_or_else(String::new, |i| format!("s{i}"));
        for stage in &pipeline.stages {
            let label = lines(stage, note(&stage.name)).join("<br>").replace('"', "#quot;");
            let _ = writeln!(out, "  {}[\"{label}\"]", id(&stage.name));
        }
        for (from, to, label) in labelled_edges(pipeline) {
            let _ = writeln!(out, "  {} -->|{label}| {}", id(from), id(to));
        }
        out
    }
}

fn lines(stage: &Stage, note: Option<String>) -> Vec<String> {
    let mut lines = vec![stage.name.clone()];
    if stage.kind != stage.name {
        lines.push(format!("({})", stage.kind));
    }
    lines.extend(note);
    lines
}

fn labelled_edges(pipeline: &Pipeline) -> Vec<(&str, &str, &str)> {
    let mut edges = Vec::new();
    for stage in &pipeline.stages {
        for input in stage.inputs.values() {
            let (InputRef::Output { output, .. } | InputRef::Gathered(Gathered { output, .. })) =
                &input.from
            else {
                continue;
            };
            let from = input.from.stages().into_iter();
            edges.extend(from.map(|from| (from, stage.name.as_str(), output.as_str())));
        }
    }
    edges
}

fn edges(stages: &[Stage]) -> DiGraph<(), ()> {
    let index: HashMap<&str, usize> =
        stages.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
    let mut graph = DiGraph::with_capacity(stages.len(), stages.len() * 2);
    for _ in stages {
        graph.add_node(());
    }
    let mut lists = HashMap::new();
    for (to, input) in
        stages.iter().enumerate().flat_map(|(to, s)| s.inputs.values().map(move |i| (to, i)))
    {
        let to = NodeIndex::new(to);
        let connect = |graph: &mut DiGraph<(), ()>, to| {
            for from in input.from.stages().into_iter().filter_map(|n| index.get(n)) {
                graph.add_edge(NodeIndex::new(*from), to, ());
            }
        };
        match &input.from {
            InputRef::Gathered(gathered) if !gathered.members.is_empty() => {
                let list = *lists.entry(gathered.members.as_ptr()).or_insert_with(|| {
                    let list = graph.add_node(());
                    connect(&mut graph, list);
                    list
                });
                graph.add_edge(list, to, ());
            }
            _ => connect(&mut graph, to),
        }
    }
    graph
}

/// Indices of stages without circles, producers first.
pub(crate) fn order(stages: &[Stage]) -> Vec<usize> {
    topological(&edges(stages), stages.len()).0
}

/// Kahn's algorithm; the lowest file position first among the ready ones. A gathered list, a node
/// from `stages` on, takes no place of its own in the order. With it the depth of every node.
fn topological(graph: &DiGraph<(), ()>, stages: usize) -> (Vec<usize>, Vec<usize>) {
    let incoming = |i| graph.neighbors_directed(i, Direction::Incoming).count();
    let mut waiting: Vec<usize> = graph.node_indices().map(incoming).collect();
    let ready = waiting.iter().enumerate().filter(|(_, n)| **n == 0).map(|(i, _)| Reverse(i));
    let mut ready: BinaryHeap<Reverse<usize>> = ready.collect();
    let mut order = Vec::with_capacity(stages);
    let mut depth = vec![0; graph.node_count()];
    while let Some(Reverse(i)) = ready.pop() {
        order.push(i);
        let mut done = vec![i];
        while let Some(i) = done.pop() {
            for next in graph.neighbors(NodeIndex::new(i)).map(NodeIndex::index) {
                waiting[next] -= 1;
                depth[next] = depth[next].max(depth[i] + 1);
                match waiting[next] {
                    0 if next < stages => ready.push(Reverse(next)),
                    0 => done.push(next),
                    _ => {}
                }
            }
        }
    }
    (order, depth)
}

/// One circle of every knot of stages that wait for each other, as indices into `stages`, each
/// stage needing the next.
pub(crate) fn cycles(stages: &[Stage]) -> Vec<Vec<usize>> {
    let graph = edges(stages);
    let mut found = Vec::new();
    for knot in tarjan_scc(&graph) {
        let looped = knot.len() > 1 || graph.contains_edge(knot[0], knot[0]);
        if !looped {
            continue;
        }
        // Walk against the edges inside the knot until a stage comes up twice.
        let inside: BTreeSet<_> = knot.iter().copied().collect();
        let mut walk = vec![knot[knot.len() - 1]];
        loop {
            let last = walk[walk.len() - 1];
            let next =
                graph.neighbors_directed(last, Direction::Incoming).find(|n| inside.contains(n));
            let Some(next) = next else { break };
            if let Some(at) = walk.iter().position(|n| *n == next) {
                found.push(walk[at..].iter().map(|n| n.index()).collect());
                break;
            }
            walk.push(next);
        }
    }
    found
}
