//! `pipe logs`.

use super::{CommandError, Context};
use crate::display;
use crate::exit_code;
use crate::plan::{Decision, PlanOptions};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stage
    stage: String,
    /// Print the path of the log instead of its text
    #[arg(long)]
    path: bool,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let stage = project.stage(&args.stage)?;
    let options = PlanOptions::default();
    let plan = project.planner(&options).plan(std::slice::from_ref(&stage.name), &project.lock);
    let planned = plan.ok().and_then(|plan| plan.stages.into_iter().last());
    // Of a stage that would be reused, the log of what would be reused; otherwise the newest,
    // which may be that of a failure.
    let reused = match planned.map(|planned| planned.decision) {
        Some(Decision::Reuse { record }) => project.cache.log_of(record.fingerprint),
        _ => None,
    };
    let Some(log) = reused.or_else(|| project.cache.newest_log(&stage.name)) else {
        return Err(CommandError::usage(
            format!("stage `{}` has no log in this cache", stage.name),
            "logs are kept in the cache of the run that made the artifacts",
        ));
    };
    if args.path {
        display::out(&log.display().to_string());
        return Ok(exit_code::OK);
    }
    let text = std::fs::read(&log).map_err(|e| {
        CommandError::usage(
            format!("could not read {}: {e}", log.display()),
            "the file may be gone",
        )
    })?;
    display::out(&String::from_utf8_lossy(&text));
    Ok(exit_code::OK)
}
