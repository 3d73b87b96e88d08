//! `pipe outputs`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{CommandError, Context};
use crate::cache::{Cache, CacheError};
use crate::display;
use crate::exit_code;
use crate::plan::{Decision, PlanOptions};
use crate::record::OutputRecord;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stage
    stage: String,
    /// Copy the outputs into this folder
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// Replace files in that folder that differ
    #[arg(long, requires = "to")]
    force: bool,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let stage = project.stage(&args.stage)?;
    let options = PlanOptions::default();
    let plan = project.planner(&options).plan(std::slice::from_ref(&stage.name), &project.lock)?;
    let reuse = plan.stages.iter().find_map(|planned| match &planned.decision {
        Decision::Reuse { record } if planned.stage == stage.name => Some(record),
        _ => None,
    });
    let Some(record) = reuse else {
        return Err(CommandError::usage(
            format!("stage `{}` as it is written now has no outputs in the cache", stage.name),
            format!("`pipe run {0}` makes them, `pipe why {0}` says what changed", stage.name),
        ));
    };
    let mut listed = Vec::new();
    for (name, output) in &record.outputs {
        let mut line = json!({"output": name, "digest": output.digest, "bytes": output.bytes,
            "form": output.form, "class": output.class});
        let mut text =
            format!("{name}  {}  {}", output.digest.short(), display::size(output.bytes));
        if let Some(dir) = &args.to {
            let to = dir.join(&output.file_name);
            if to.exists() && differs(&project.cache, output, &to)? {
                if !args.force {
                    return Err(CommandError::usage(
                        format!("{} is there already and differs", to.display()),
                        "choose another folder, or replace it with `--force`",
                    ));
                }
                project.cache.remove_copy(&to)?;
            }
            if !to.exists() {
                project.cache.copy_out(output, &to)?;
            }
            line["path"] = json!(to);
            text.push_str(&format!("  {}", to.display()));
        }
        listed.push((line, text));
    }
    if context.shared.json {
        let lines: Vec<_> = listed.into_iter().map(|(line, _)| line).collect();
        display::out(&serde_json::to_string_pretty(&lines).unwrap_or_default());
    } else {
        let lines: Vec<_> = listed.into_iter().map(|(_, text)| text).collect();
        display::out(&lines.join("\n"));
    }
    Ok(exit_code::OK)
}

/// Whether a copy is not what the output is: its bytes, or that it may be executed.
fn differs(cache: &Cache, output: &OutputRecord, copy: &Path) -> Result<bool, CacheError> {
    let may_run = || copy.metadata().is_ok_and(|meta| meta.permissions().mode() & 0o100 != 0);
    Ok(cache.digest_local(copy)? != output.digest || (output.exec && !may_run()))
}
