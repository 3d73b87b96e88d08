//! `pipe plan`.

use super::selection::Selection;
use super::{CommandError, Context, remote};
use crate::cache::unix_seconds;
use crate::display::{self, duration};
use crate::exit_code;
use crate::plan::{Decision, Plan, PlannedStage};
use crate::remote::Settings;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Exit with code 6 when anything would or might run
    #[arg(long)]
    check: bool,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let (selection, options) = args.selection.resolve(&project)?;
    let plan = project.planner(&options).plan(&selection, &project.lock)?;
    let remote = remote::settings(&project)?.filter(Settings::reads);
    if context.shared.json {
        let mut json = serde_json::to_value(&plan).unwrap_or_default();
        if let Some(profile) = &project.pipeline.profile {
            json["profile"] = serde_json::to_value(profile).unwrap_or_default();
        }
        if let Some(remote) = &remote {
            json["remote"] = remote.shown().into();
        }
        display::out(&serde_json::to_string_pretty(&json).unwrap_or_default());
    } else {
        let mut text = text(&plan);
        if let Some(profile) = &project.pipeline.profile {
            text.push_str(&format!("{}\n", profile.summary()));
        }
        if let Some(remote) = remote.filter(|_| plan.would_run()) {
            text.push_str(&format!(
                "a plan asks no network; `run` and `pull` first ask {} for what would run\n",
                remote.shown()
            ));
        }
        display::out(&text);
    }
    let found = args.check && plan.would_run();
    Ok(if found { exit_code::WOULD_RUN } else { exit_code::OK })
}

fn text(plan: &Plan) -> String {
    let width = plan.stages.iter().map(|s| s.stage.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for stage in &plan.stages {
        let lines = lines(stage);
        out.push_str(&format!("{:width$}  {}\n", stage.stage, lines[0]));
        for line in &lines[1..] {
            out.push_str(&format!("{:width$}         {line}\n", ""));
        }
    }
    let count =
        |test: fn(&Decision) -> bool| plan.stages.iter().filter(|s| test(&s.decision)).count();
    let run = count(|d| matches!(d, Decision::Run { .. }));
    let maybe = count(|d| matches!(d, Decision::Maybe { .. }));
    let reuse = count(|d| matches!(d, Decision::Reuse { .. }));
    out.push_str(&format!("{run} would run, {maybe} might run, {reuse} would be reused\n"));
    out
}

fn lines(stage: &PlannedStage) -> Vec<String> {
    match &stage.decision {
        Decision::Reuse { record } => {
            let ago = duration(unix_seconds().saturating_sub(record.finished_at) as f64);
            let took = duration(record.seconds);
            vec![format!("reuse  {} (made {ago} ago in {took})", record.fingerprint.short())]
        }
        Decision::Run { reasons } => reasons
            .iter()
            .enumerate()
            .map(|(i, reason)| if i == 0 { format!("run    {reason}") } else { reason.to_string() })
            .collect(),
        Decision::Maybe { waits_for, reasons } => {
            let mut lines =
                vec![format!("maybe  depends on what {} will make", waits_for.join(", "))];
            lines.extend(reasons.iter().map(ToString::to_string));
            if reasons.is_empty() {
                lines.push("early cutoff: reused if they make what they made before".to_owned());
            }
            lines
        }
    }
}
