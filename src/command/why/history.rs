//! `pipe why --runs` and `pipe why --run`.

use serde_json::json;

use super::super::side::find_run;
use super::super::{CommandError, Context, Project};
use super::described;
use crate::cache::unix_seconds;
use crate::display::{self, duration};
use crate::exit_code;
use crate::pipeline::Stage;
use crate::plan::{Comparison, PlanOptions};
use crate::record::Record;
use crate::runs::RunRecord;

pub(super) fn run(
    context: &Context<'_>,
    project: &Project,
    stage: &Stage,
    wanted: Option<&str>,
) -> Result<u8, CommandError> {
    let mut records = project.cache.records(&stage.kind)?;
    let Some(wanted) = wanted else {
        records.retain(|r| r.stage == stage.name);
        display::out(&if context.shared.json { listed_json(&records) } else { listed(&records) });
        return Ok(exit_code::OK);
    };
    let earlier = match find_run(project, wanted)? {
        Some(run) => of_run(project, stage, &run)?,
        None => found(records, stage, wanted)?,
    };
    let options = PlanOptions::default();
    let comparison = project.planner(&options).compare(stage, &earlier, &project.lock)?;
    if context.shared.json {
        display::out(&serde_json::to_string_pretty(&comparison).unwrap_or_default());
    } else {
        display::out(&text(&stage.name, &comparison, &earlier));
    }
    Ok(exit_code::OK)
}

/// What the stage ran as, or was reused as, in a run.
fn of_run(project: &Project, stage: &Stage, run: &RunRecord) -> Result<Record, CommandError> {
    let ran = run.stages.iter().find(|s| s.stage == stage.name);
    let record = match ran.and_then(|s| Some((&s.kind, s.fingerprint?))) {
        Some((kind, fingerprint)) => project.cache.record(kind, fingerprint)?,
        None => None,
    };
    record.ok_or_else(|| {
        let what = match ran {
            Some(ran) if ran.fingerprint.is_some() => "gc has removed what it made",
            Some(ran) => ran.status.word(),
            None => "it was not part of it",
        };
        CommandError::usage(
            format!("run {} has no execution of `{}`: {what}", run.id, stage.name),
            format!("`pipe why {} --runs` lists them", stage.name),
        )
    })
}

/// The one execution whose fingerprint starts with `wanted`, of whichever stage of the kind.
fn found(records: Vec<Record>, stage: &Stage, wanted: &str) -> Result<Record, CommandError> {
    let prefix = wanted.to_ascii_lowercase();
    let mut fitting: Vec<Record> =
        records.into_iter().filter(|r| r.fingerprint.to_hex().starts_with(&prefix)).collect();
    match (fitting.pop(), fitting.len()) {
        (Some(record), 0) => Ok(record),
        (Some(_), more) => Err(CommandError::usage(
            format!("{} executions start with `{wanted}`", more + 1),
            "give more of its digits",
        )),
        (None, _) => Err(CommandError::usage(
            format!("no execution of kind `{}` starts with `{wanted}`", stage.kind),
            format!("`pipe why {} --runs` lists them", stage.name),
        )),
    }
}

fn listed(records: &[Record]) -> String {
    if records.is_empty() {
        return "the cache knows no execution of it".to_owned();
    }
    let line = |record: &Record| {
        let ago = duration(unix_seconds().saturating_sub(record.finished_at) as f64);
        format!("{}  {ago} ago, took {}", record.fingerprint.short(), duration(record.seconds))
    };
    records.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn listed_json(records: &[Record]) -> String {
    let entry = |record: &Record| {
        json!({"fingerprint": record.fingerprint, "stage": record.stage,
            "finished_at": record.finished_at, "seconds": record.seconds})
    };
    let entries: Vec<_> = records.iter().map(entry).collect();
    serde_json::to_string_pretty(&entries).unwrap_or_default()
}

fn text(name: &str, comparison: &Comparison, earlier: &Record) -> String {
    let short = comparison.earlier.short();
    let mut lines = Vec::new();
    if !comparison.differences.is_empty() {
        lines.push(format!("{name} differs from {short}:"));
        lines.extend(comparison.differences.iter().map(|reason| format!("  {reason}")));
    } else if comparison.waits_for.is_empty() {
        lines.push(format!("{name} is {short}: nothing differs"));
    } else {
        lines.push(format!("nothing that is known yet differs from {short}"));
    }
    if !comparison.waits_for.is_empty() {
        let waits_for = comparison.waits_for.join(", ");
        lines.push(format!("  what {waits_for} will make is not known yet"));
    }
    lines.push("that execution:".to_owned());
    lines.extend(described(earlier));
    lines.join("\n")
}
