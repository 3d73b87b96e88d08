//! What pinned and gathering inputs stand for.

use super::Expander;
use crate::pipeline::points::{PointParams, point_name};
use crate::pipeline::problem::{Problem, suggest};
use crate::pipeline::{Gathered, InputRef, Member};
use crate::yaml::{Node, Tree};

impl Expander<'_, '_> {
    /// Fills in what pinned and gathering inputs stand for, in plain stages and copies.
    pub(super) fn settle(&mut self) {
        let mut settled: Vec<(usize, String, InputRef)> = Vec::new();
        for (i, stage) in self.stages.iter().enumerate() {
            for (name, input) in &stage.inputs {
                let pin = self.reader.pins.get(&(stage.name.clone(), name.clone())).cloned();
                let found = match (&input.from, pin) {
                    (InputRef::Output { stage: from, output }, Some(at)) => self
                        .pinned(from, &at)
                        .map(|stage| InputRef::Output { stage, output: output.clone() }),
                    (InputRef::Gathered(gathered), _) => self.gathered(gathered, input.place),
                    _ => continue,
                };
                match found {
                    Ok(from) => settled.push((i, name.clone(), from)),
                    Err(problem) => self.reader.problems.push(problem),
                }
            }
        }
        for (i, name, from) in settled {
            for (_, copy) in self.copies.iter_mut().filter(|(base, _)| *base == i) {
                if let Some(input) = copy.inputs.get_mut(&name) {
                    input.from = from.clone();
                }
            }
            self.settled.push((i, name, from));
        }
    }

    fn pinned(&self, from: &str, at: &Node) -> Result<String, Problem> {
        let entries = match &at.tree {
            Tree::Map(entries) => entries.as_slice(),
            _ => &[],
        };
        let mut changes = PointParams::new();
        for (key, value) in entries {
            let value = value.to_value();
            let Some(plain) = self.points.plain.get(&key.name) else {
                let message = format!("no matrix varies `{}`", key.name);
                let help = suggest(&key.name, self.labels.iter().map(String::as_str));
                return Err(Problem::at(message, key.place, "unknown param").maybe_help(help));
            };
            if crate::fingerprint::canonical(plain) != crate::fingerprint::canonical(&value) {
                changes.insert(key.name.clone(), value);
            }
        }
        let name = point_name(from, &changes);
        if changes.is_empty() || self.points.of(from).contains(&name) {
            return Ok(name);
        }
        let help = suggest(&name, self.points.of(from).iter().map(String::as_str));
        let message = format!("stage `{from}` has no point `{name}`");
        Err(Problem::at(message, at.place, "no such point").maybe_help(help))
    }

    fn gathered(
        &self,
        gathered: &Gathered,
        place: crate::yaml::Place,
    ) -> Result<InputRef, Problem> {
        let names = self.points.of(&gathered.stage);
        if names.is_empty() {
            let message = format!("stage `{}` has no points to gather", gathered.stage);
            return Err(Problem::at(message, place, "gathered here").help(format!(
                "no `matrix` reaches it; for its one output write `{}.{}`",
                gathered.stage, gathered.output
            )));
        }
        let member = |name: &String| Member {
            stage: name.clone(),
            params: self.points.params(name).cloned().unwrap_or_default(),
        };
        let members = names.iter().map(member).collect();
        Ok(InputRef::Gathered(Gathered { members, ..gathered.clone() }))
    }
}
