//! `pipe metrics`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::side::{Entry, Side, cached};
use super::{CommandError, Context, Project};
use crate::display::{self, table};
use crate::exit_code;

/// Larger files are no metrics.
const LARGEST: u64 = 16 << 20;
/// Metrics that fit beside each other.
const MOST_COLUMNS: usize = 6;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Args {
    /// Show the metrics of stages, points, runs or revisions [default: all that are cached]
    Show {
        /// `[RUN|REVISION:][STAGE]`, such as `'dev-eval@*'` or `last:tuned-eval`
        #[arg(value_name = "SIDE")]
        sides: Vec<String>,
        #[command(flatten)]
        which: Which,
    },
    /// Show which metrics differ and by how much
    Diff {
        /// `[RUN|REVISION:][STAGE]`, such as `HEAD~1:tuned-eval`
        from: String,
        /// The same [default: the pipeline as it is; for a point: the point, against the default]
        to: Option<String>,
        #[command(flatten)]
        which: Which,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// Only metrics whose dotted path begins so; may be repeated
    #[arg(long = "metric", value_name = "PATH")]
    metrics: Vec<String>,
    /// Output that holds the metrics, as JSON
    #[arg(long, value_name = "NAME", default_value = "metrics")]
    output: String,
}

impl Which {
    fn takes(&self, path: &str) -> bool {
        self.metrics.is_empty() || self.metrics.iter().any(|m| path.starts_with(m.as_str()))
    }
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    match args {
        Args::Show { sides, which } => show(context, &project, sides, which)?,
        Args::Diff { from, to, which } => {
            let (from, to) = context.sides(&project, from, to.as_deref())?;
            diff(context, &project, &from, &to, which)?;
        }
    }
    Ok(exit_code::OK)
}

fn show(
    context: &Context<'_>,
    project: &Project,
    sides: &[String],
    which: &Which,
) -> Result<(), CommandError> {
    let asked = !sides.is_empty();
    let sides = match sides {
        [] => vec![Side::now(project, None)?],
        sides => sides.iter().map(|s| context.side(project, s)).collect::<Result<Vec<_>, _>>()?,
    };
    let (mut found, mut listed) = (Vec::new(), Vec::new());
    for side in &sides {
        for entry in &side.entries {
            // Only what was named must be there.
            if asked && side.entries.len() == 1 {
                cached(side, entry)?;
            }
            let Some(numbers) = numbers(project, entry, which)? else { continue };
            let fingerprint = entry.record.as_ref().map(|r| r.fingerprint);
            listed.push(json!({"from": side.name, "stage": entry.stage, "point": entry.point,
                "fingerprint": fingerprint, "metrics": numbers}));
            let place = if side.place.is_empty() { "" } else { &format!("{}:", side.place) };
            found.push((format!("{place}{}", entry.stage), numbers));
        }
    }
    if context.shared.json {
        display::out(&serde_json::to_string_pretty(&listed).unwrap_or_default());
    } else if found.is_empty() {
        display::note("no metrics in the cache for these stages");
    } else {
        display::out(&table(&shown(&found)));
    }
    Ok(())
}

/// A line a metric; a line a stage where several stages have few metrics.
fn shown(found: &[(String, BTreeMap<String, f64>)]) -> Vec<Vec<String>> {
    let metrics: BTreeSet<&String> = found.iter().flat_map(|(_, numbers)| numbers.keys()).collect();
    if found.len() == 1 || metrics.len() > MOST_COLUMNS {
        let line = |stage: &String, (path, value): (&String, &f64)| {
            vec![stage.clone(), path.clone(), number(*value)]
        };
        return found.iter().flat_map(|(s, n)| n.iter().map(move |m| line(s, m))).collect();
    }
    let heads = std::iter::once("stage".to_owned()).chain(metrics.iter().map(|m| (*m).clone()));
    let mut rows = vec![heads.collect()];
    for (stage, numbers) in found {
        let cell = |metric: &&String| numbers.get(*metric).map_or("-".to_owned(), |v| number(*v));
        rows.push(std::iter::once(stage.clone()).chain(metrics.iter().map(cell)).collect());
    }
    rows
}

fn diff(
    context: &Context<'_>,
    project: &Project,
    from: &Side,
    to: &Side,
    which: &Which,
) -> Result<(), CommandError> {
    let (mut rows, mut listed) = (Vec::new(), Vec::new());
    let pairs = Side::pairs(from, to);
    for (name, a, b) in &pairs {
        if let (1, Some(a), Some(b)) = (pairs.len(), a, b) {
            cached(from, a)?;
            cached(to, b)?;
        }
        for change in changed_metrics(project, *a, *b, which)? {
            let cell = |v: Option<f64>| v.map_or("-".to_owned(), number);
            let by = change.before.zip(change.after).map(|(a, b)| b - a);
            rows.push(vec![
                name.clone(),
                change.path.clone(),
                cell(change.before),
                "->".to_owned(),
                cell(change.after),
                by.map_or(String::new(), |by| format!("({by:+.4})")),
            ]);
            listed.push(json!({"stage": name, "metric": change.path, "before": change.before,
                "after": change.after, "change": by}));
        }
    }
    if context.shared.json {
        let value = json!({"from": from.name, "to": to.name, "changes": listed});
        display::out(&serde_json::to_string_pretty(&value).unwrap_or_default());
    } else if rows.is_empty() {
        display::out("no metric differs");
    } else {
        display::out(&table(&rows));
    }
    Ok(())
}

/// One metric that differs.
pub(super) struct Change {
    pub(super) path: String,
    pub(super) before: Option<f64>,
    pub(super) after: Option<f64>,
}

fn changed_metrics(
    project: &Project,
    a: Option<&Entry>,
    b: Option<&Entry>,
    which: &Which,
) -> Result<Vec<Change>, CommandError> {
    let read = |entry: Option<&Entry>| match entry {
        Some(entry) => Ok(numbers(project, entry, which)?.unwrap_or_default()),
        None => Ok::<_, CommandError>(BTreeMap::new()),
    };
    let (before, after) = (read(a)?, read(b)?);
    let mut paths: Vec<&String> = before.keys().chain(after.keys()).collect();
    paths.sort();
    paths.dedup();
    let change = |path: &String| {
        let (before, after) = (before.get(path).copied(), after.get(path).copied());
        (before != after).then(|| Change { path: path.clone(), before, after })
    };
    Ok(paths.into_iter().filter_map(change).collect())
}

/// What differs between the outputs called `metrics` of two entries.
pub(super) fn differing(
    project: &Project,
    a: Option<&Entry>,
    b: Option<&Entry>,
) -> Result<Vec<Change>, CommandError> {
    let which = Which { metrics: Vec::new(), output: "metrics".to_owned() };
    changed_metrics(project, a, b, &which)
}

/// Every number of a stage's metrics by dotted path; none where it has none in the cache.
fn numbers(
    project: &Project,
    entry: &Entry,
    which: &Which,
) -> Result<Option<BTreeMap<String, f64>>, CommandError> {
    let record = entry.record.as_ref();
    let Some(output) = record.and_then(|r| r.outputs.get(&which.output)) else { return Ok(None) };
    let text = project.cache.read_output(output, LARGEST)?;
    let value: Value = serde_json::from_slice(&text).map_err(|e| {
        let message = format!("`{}.{}` is no JSON: {e}", entry.stage, which.output);
        CommandError::usage(message, "`--output NAME` names the output that holds metrics")
    })?;
    let mut numbers = BTreeMap::new();
    flatten("", &value, &mut |path, value| {
        if let Some(number) = value.as_f64().filter(|_| which.takes(path)) {
            numbers.insert(path.to_owned(), number);
        }
    });
    Ok(Some(numbers))
}

/// Calls `leaf` with the dotted path of every value that is neither list nor mapping.
pub(super) fn flatten(prefix: &str, value: &Value, leaf: &mut dyn FnMut(&str, &Value)) {
    let below = |step: &str| {
        if prefix.is_empty() { step.to_owned() } else { format!("{prefix}.{step}") }
    };
    match value {
        Value::Object(entries) => {
            entries.iter().for_each(|(key, value)| flatten(&below(key), value, leaf));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, v)| flatten(&below(&i.to_string()), v, leaf));
        }
        other => leaf(prefix, other),
    }
}

/// At most six digits after the point, as few as there are.
pub(super) fn number(value: f64) -> String {
    let rounded = (value * 1e6).round() / 1e6;
    if rounded == 0.0 && value != 0.0 { format!("{value:e}") } else { format!("{rounded}") }
}
