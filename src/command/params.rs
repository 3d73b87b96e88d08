//! `pipe params`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::metrics::flatten;
use super::side::{Entry, Side};
use super::{CommandError, Context};
use crate::display::{self, table};
use crate::exit_code;
use crate::fingerprint::canonical;
use crate::plan::beside;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Args {
    /// Show which params differ, defaults included
    Diff {
        /// `[RUN|REVISION:][STAGE]`, such as `HEAD~1:` or `train@learning_rate=1e-4`
        from: String,
        /// The same [default: the pipeline as it is; for a point: the point, against the default]
        to: Option<String>,
    },
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let Args::Diff { from, to } = args;
    let (from, to) = context.sides(&project, from, to.as_deref())?;
    let (mut rows, mut listed) = (Vec::new(), Vec::new());
    for (name, a, b) in Side::pairs(&from, &to) {
        for (path, before, after) in differing(a, b) {
            let (was, is) = beside(before.as_ref(), after.as_ref(), "-");
            rows.push(vec![name.clone(), path.clone(), was, "->".to_owned(), is]);
            listed.push(json!({"stage": name, "param": path, "before": before, "after": after}));
        }
    }
    if context.shared.json {
        let value = json!({"from": from.name, "to": to.name, "changes": listed});
        display::out(&serde_json::to_string_pretty(&value).unwrap_or_default());
    } else if rows.is_empty() {
        display::out("no param differs");
    } else {
        display::out(&table(&rows));
    }
    Ok(exit_code::OK)
}

/// A param that differs: dotted path, before, after.
type Difference = (String, Option<Value>, Option<Value>);

/// Params, swept variables included, that differ between two entries.
pub(super) fn differing(a: Option<&Entry>, b: Option<&Entry>) -> Vec<Difference> {
    let read = |entry: Option<&Entry>| {
        let mut leaves: BTreeMap<String, Value> = BTreeMap::new();
        if let Some(entry) = entry {
            flatten("", &entry.params, &mut |path, value| {
                leaves.insert(path.to_owned(), value.clone());
            });
            // A swept variable may count through a stage upstream alone.
            for (param, value) in &entry.point {
                leaves.entry(param.clone()).or_insert_with(|| value.clone());
            }
        }
        leaves
    };
    let (before, after) = (read(a), read(b));
    let mut paths: Vec<&String> = before.keys().chain(after.keys()).collect();
    paths.sort();
    paths.dedup();
    let difference = |path: &String| {
        let (before, after) = (before.get(path).cloned(), after.get(path).cloned());
        let same = before.as_ref().map(canonical) == after.as_ref().map(canonical);
        (!same).then(|| (path.clone(), before, after))
    };
    paths.into_iter().filter_map(difference).collect()
}
