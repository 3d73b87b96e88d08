//! `pipe why`.

mod history;

use super::{CommandError, Context};
use crate::display::{self, duration};
use crate::exit_code;
use crate::plan::{Decision, PlanOptions, PlannedStage};
use crate::record::Record;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stage
    stage: String,
    /// Compare with an earlier execution instead: that of a run (`last`, or the start of its id), or
    /// the one whose fingerprint starts so
    #[arg(long, value_name = "ID", conflicts_with = "runs")]
    run: Option<String>,
    /// List the executions of the stage that the cache knows, newest first
    #[arg(long)]
    runs: bool,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let stage = project.stage(&args.stage)?;
    if args.runs || args.run.is_some() {
        return history::run(context, &project, stage, args.run.as_deref());
    }
    let options = PlanOptions::default();
    let selection = [stage.name.clone()];
    let plan = project.planner(&options).plan(&selection, &project.lock)?;
    let Some(planned) = plan.stages.iter().find(|s| s.stage == stage.name) else {
        return Ok(exit_code::OK);
    };
    if context.shared.json {
        display::out(&serde_json::to_string_pretty(planned).unwrap_or_default());
    } else {
        display::out(&text(
            planned,
            project.cache.last(&project.pipeline.name, &stage.name).as_ref(),
        ));
    }
    Ok(exit_code::OK)
}

fn text(planned: &PlannedStage, last: Option<&Record>) -> String {
    let name = &planned.stage;
    let mut lines = Vec::new();
    match &planned.decision {
        Decision::Reuse { record } => {
            lines.push(format!("{name} would not run: the cache holds what it would make"));
            lines.extend(described(record));
            return lines.join("\n");
        }
        Decision::Run { reasons } => {
            lines.push(format!("{name} would run:"));
            lines.extend(reasons.iter().map(|r| format!("  {r}")));
        }
        Decision::Maybe { waits_for, reasons } => {
            lines.push(format!(
                "{name} might run: it depends on what {} will make (see `pipe why {}`)",
                waits_for.join(", "),
                waits_for[0]
            ));
            lines.extend(reasons.iter().map(|r| format!("  {r}")));
        }
    }
    if let Some(last) = last {
        lines.push("compared with its last execution:".to_owned());
        lines.extend(described(last));
    }
    lines.join("\n")
}

fn described(record: &Record) -> Vec<String> {
    let mut lines = vec![
        format!("  fingerprint  {}", record.fingerprint),
        format!("  took         {}", duration(record.seconds)),
    ];
    for (name, digest) in &record.identity.inputs {
        lines.push(format!("  input        {name} {}", digest.short()));
    }
    for (name, output) in &record.outputs {
        let size = display::size(output.bytes);
        lines.push(format!("  output       {name} {} {size}", output.digest.short()));
    }
    for (key, value) in &record.provenance {
        lines.push(format!("  found        {key} = {value}"));
    }
    lines
}
