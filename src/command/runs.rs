//! `pipe runs`.

use serde_json::{Value, json};

use super::metrics::{self, number};
use super::params;
use super::side::{Entry, Side, find_run, unknown};
use super::{CommandError, Context, Project};
use crate::cache::unix_seconds;
use crate::digest::Fingerprint;
use crate::display::{self, duration, table};
use crate::exit_code;
use crate::plan::beside;
use crate::runs::{RunRecord, RunStatus};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Args {
    /// List the runs that did something, newest first
    Ls {
        /// Runs of every pipeline that uses this cache
        #[arg(long)]
        all: bool,
    },
    /// Show what a run did
    Show {
        /// Beginning of the run's id, or `last`
        #[arg(default_value = "last")]
        run: String,
    },
    /// Compare runs, points or git revisions: stages, params and metrics
    Compare {
        /// `RUN`, `REVISION`, or `[RUN|REVISION:]STAGE`
        from: String,
        /// The same [default: the pipeline as it is; for a point: the point, against the default]
        to: Option<String>,
    },
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let (text, value) = match args {
        Args::Ls { all } => list(&project, *all)?,
        Args::Show { run } => {
            let run = find_run(&project, run)?.ok_or_else(|| unknown(&project, run))?;
            (shown(&run), json!(run))
        }
        Args::Compare { from, to } => {
            let (from, to) = context.sides(&project, from, to.as_deref())?;
            compare(&project, &from, &to)?
        }
    };
    display::out(&if context.shared.json {
        serde_json::to_string_pretty(&value).unwrap_or_default()
    } else {
        text
    });
    Ok(exit_code::OK)
}

fn ago(run: &RunRecord) -> String {
    format!("{} ago", duration(unix_seconds().saturating_sub(run.started_at) as f64))
}

fn asked(run: &RunRecord) -> String {
    let selection = run.selection.iter().cloned();
    let set = run.set.iter().map(|set| format!("--set {set}"));
    selection.chain(set).collect::<Vec<_>>().join(" ")
}

fn list(project: &Project, all: bool) -> Result<(String, Value), CommandError> {
    let mut runs = project.cache.runs()?;
    runs.retain(|r| all || r.pipeline == project.pipeline.name);
    if runs.is_empty() {
        return Ok(("no runs in this cache".to_owned(), json!([])));
    }
    let row = |run: &RunRecord| {
        let mut row = vec![run.id.clone(), ago(run), duration(run.seconds)];
        for status in [RunStatus::Ran, RunStatus::Reused, RunStatus::Failed] {
            row.push(format!("{} {}", run.count(status), status.word()));
        }
        row.extend(all.then(|| run.pipeline.clone()));
        row.push(asked(run));
        row
    };
    Ok((table(&runs.iter().map(row).collect::<Vec<_>>()), json!(runs)))
}

fn shown(run: &RunRecord) -> String {
    let mut text =
        format!("{}  {}, took {}  {}\n", run.id, ago(run), duration(run.seconds), asked(run));
    let row = |stage: &crate::runs::RunStage| {
        let fingerprint = stage.fingerprint.map_or_else(String::new, Fingerprint::short);
        let took = duration(stage.seconds);
        vec![stage.stage.clone(), stage.status.word().to_owned(), fingerprint, took]
    };
    text.push_str(&table(&run.stages.iter().map(row).collect::<Vec<_>>()));
    text
}

/// What can be said of a stage on both sides.
fn verdict(a: Option<&Entry>, b: Option<&Entry>) -> &'static str {
    match (a, b) {
        (Some(_), None) => "only before",
        (None, _) => "only after",
        (Some(a), Some(b)) => match (&a.record, &b.record) {
            (Some(a), Some(b)) if a.fingerprint == b.fingerprint => "same",
            (Some(a), Some(b)) if crate::cache::differing_artifacts(a, b).is_empty() => {
                "changed, same artifacts"
            }
            (Some(_), Some(_)) => "changed",
            (None, None) => "not cached",
            (None, Some(_)) => "not cached before",
            (Some(_), None) => "not cached after",
        },
    }
}

fn compare(project: &Project, from: &Side, to: &Side) -> Result<(String, Value), CommandError> {
    let heads = ["stage", "", "before", "after", "took before", "took after"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let (mut details, mut listed) = (Vec::new(), Vec::new());
    for (name, a, b) in Side::pairs(from, to) {
        let verdict = verdict(a, b);
        let short = |e: Option<&Entry>| {
            e.and_then(|e| e.record.as_ref()).map_or("-".to_owned(), |r| r.fingerprint.short())
        };
        let seconds = |e: Option<&Entry>| e.and_then(|e| e.record.as_ref()).map(|r| r.seconds);
        let took = |e| seconds(e).map_or("-".to_owned(), duration);
        rows.push(vec![name.clone(), verdict.to_owned(), short(a), short(b), took(a), took(b)]);
        let (mut params_json, mut metrics_json) = (Vec::new(), Vec::new());
        if let (Some(_), Some(_), false) = (a, b, verdict == "same") {
            for (path, before, after) in params::differing(a, b) {
                let (was, is) = beside(before.as_ref(), after.as_ref(), "-");
                details.push(vec![name.clone(), path.clone(), was, is]);
                params_json.push(json!({"param": path, "before": before, "after": after}));
            }
            for change in metrics::differing(project, a, b)? {
                let cell = |v: Option<f64>| v.map_or("-".to_owned(), number);
                let (path, before, after) = (change.path, change.before, change.after);
                details.push(vec![name.clone(), path.clone(), cell(before), cell(after)]);
                metrics_json.push(json!({"metric": path, "before": before, "after": after}));
            }
        }
        let fingerprint = |e: Option<&Entry>| e?.record.as_ref().map(|r| r.fingerprint);
        listed.push(json!({"stage": name, "verdict": verdict,
            "before": {"fingerprint": fingerprint(a), "seconds": seconds(a)},
            "after": {"fingerprint": fingerprint(b), "seconds": seconds(b)},
            "params": params_json, "metrics": metrics_json}));
    }
    let mut text = table(&rows);
    if !details.is_empty() {
        text.push_str("\n\n");
        text.push_str(&table(&details));
    }
    Ok((text, json!({"from": from.name, "to": to.name, "stages": listed})))
}
