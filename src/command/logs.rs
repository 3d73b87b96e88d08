//! `pipe logs`.

use super::{CommandError, Context};
use crate::display;
use crate::exit_code;

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
    let Some(log) = project.cache.newest_log(&stage.name) else {
        return Err(CommandError::usage(
            format!("stage `{}` has no log in this cache", stage.name),
            "logs are kept where a stage ran; a reused stage has none",
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
