//! `pipe doctor`.

use std::path::Path;

use super::{CommandError, Context, current_dir};
use crate::display::{self, table};
use crate::doctor::{self, Check, Status};
use crate::exit_code;

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(context: &Context<'_>, _args: &Args) -> Result<u8, CommandError> {
    // A pipeline that does not parse, or none at all, is no reason not to look at the host.
    let dir = match context.pipeline_path() {
        Ok(path) => {
            let dir = path.parent().unwrap_or(Path::new("")).to_owned();
            current_dir()?.join(dir)
        }
        Err(_) => current_dir()?,
    };
    let cache = match context.project() {
        Ok(project) => project.cache,
        Err(_) => context.cache(&dir)?,
    };
    let checks = doctor::examine(&cache);
    if context.shared.json {
        display::out(&serde_json::to_string_pretty(&checks).unwrap_or_default());
    } else {
        display::out(&text(&checks));
    }
    let failed = checks.iter().any(|check| check.status == Status::Fail);
    Ok(if failed { exit_code::CACHE } else { exit_code::OK })
}

fn text(checks: &[Check]) -> String {
    let mut rows = Vec::new();
    for check in checks {
        let status = match check.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        rows.push(vec![status.to_owned(), check.name.to_owned(), check.found.clone()]);
        if let Some(help) = &check.help {
            rows.push(vec![String::new(), String::new(), format!("-> {help}")]);
        }
    }
    table(&rows)
}
