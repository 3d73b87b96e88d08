//! The longest chain of stages of one run.

use std::collections::BTreeMap;

use crate::event::PathStep;
use crate::plan::Planner;

/// The chain with the largest sum of seconds among the stages that ran, producers first. A stage
/// that was reused took no time and links what it stands between.
pub(super) fn of(planner: Planner<'_>, took: &BTreeMap<String, f64>) -> Vec<PathStep> {
    if took.is_empty() {
        return Vec::new();
    }
    // Seconds up to and with a stage, and the stage before it on that chain.
    let mut reached: BTreeMap<&str, (f64, Option<&str>)> = BTreeMap::new();
    let mut end: Option<(&str, f64)> = None;
    for name in planner.graph.order() {
        let Some(stage) = planner.pipeline.stage(name) else { continue };
        let before = stage
            .needs()
            .filter_map(|need| Some((need, reached.get(need)?.0)))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        let own = took.get(name).copied().unwrap_or(0.0);
        let (need, sum) = before.map_or((None, own), |(need, sum)| (Some(need), sum + own));
        reached.insert(&stage.name, (sum, need));
        // A stage that did not run cannot be the end of the chain.
        if took.contains_key(name) && end.is_none_or(|(_, longest)| sum > longest) {
            end = Some((&stage.name, sum));
        }
    }
    let mut path = Vec::new();
    let mut at = end.map(|(name, _)| name);
    while let Some(name) = at {
        if let Some(seconds) = took.get(name) {
            path.push(PathStep { stage: name.to_owned(), seconds: *seconds });
        }
        at = reached.get(name).and_then(|(_, before)| *before);
    }
    path.reverse();
    path
}
