//! Whether references, dependences and targets of what was read lead somewhere.

use std::collections::HashMap;

use contract::OutputClass;

use super::{Reader, Targets};
use crate::pipeline::problem::{Problem, suggest};
use crate::pipeline::{Gathered, InputRef, Points, Stage};
use crate::yaml::Place;

impl Reader<'_> {
    /// Fills in default outputs and checks that every reference leads somewhere.
    pub(super) fn references(&mut self, stages: &[Stage]) {
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

    pub(super) fn cycles(&mut self, stages: &[Stage]) {
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

    pub(super) fn targets(&mut self, targets: &Targets, stages: &[Stage], points: &Points) {
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
