//! `pipe init`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{CommandError, Context, PIPELINE_FILE};
use crate::display;
use crate::exit_code;

/// The quickstart, which is also what a new project starts from.
const QUICKSTART: &str = include_str!("../../pipelines/quickstart.yaml");
const OWN_ROWS: &str = include_str!("init/own-rows.yaml");
const IGNORED: &str = "/cache/";
/// Fewer rows than this cannot be split into something to learn from and something to test on.
const FEWEST_ROWS: usize = 5;
/// More test rows than this cost time and tell little more.
const MOST_TEST_ROWS: usize = 200;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder of the new project
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Learn from these rows: JSON Lines of `{"messages": […], "tools": […]}`
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Replace a pipeline that is there
    #[arg(long)]
    force: bool,
}

pub(super) fn run(_context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let path = args.dir.join(PIPELINE_FILE);
    if path.exists() && !args.force {
        return Err(CommandError::usage(
            format!("{} is there already", path.display()),
            "choose another folder, or replace it with `--force`",
        ));
    }
    let text = match &args.from {
        Some(rows) => own_rows(&args.dir, rows)?,
        None => QUICKSTART.replace(" -f pipelines/quickstart.yaml", ""),
    };
    let io = |path: &Path, e: std::io::Error| {
        CommandError::usage(
            format!("could not write {}: {e}", path.display()),
            "is the folder writable?",
        )
    };
    fs::create_dir_all(&args.dir).map_err(|e| io(&args.dir, e))?;
    fs::write(&path, text).map_err(|e| io(&path, e))?;
    let ignore = args.dir.join(".gitignore");
    let mut lines = fs::read_to_string(&ignore).unwrap_or_default();
    if !lines.lines().any(|l| l.trim() == IGNORED) {
        if !lines.is_empty() && !lines.ends_with('\n') {
            lines.push('\n');
        }
        lines.push_str(IGNORED);
        lines.push('\n');
        fs::write(&ignore, lines).map_err(|e| io(&ignore, e))?;
    }
    display::out(&format!("wrote {}\nnext: `pipe plan`, then `pipe run`", path.display()));
    Ok(exit_code::OK)
}

fn own_rows(dir: &Path, rows: &Path) -> Result<String, CommandError> {
    let wrong = |what: String| {
        CommandError::usage(
            what,
            "one row a line: {\"messages\": [{\"role\": …, \"content\": …}], \"tools\": […]}",
        )
    };
    let text = fs::read_to_string(rows)
        .map_err(|e| wrong(format!("could not read {}: {e}", rows.display())))?;
    let mut count = 0;
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = |what: String| wrong(format!("{}:{}: {what}", rows.display(), i + 1));
        let row: Value = serde_json::from_str(line).map_err(|e| at(e.to_string()))?;
        if !row["messages"].is_array() {
            return Err(at("a row without a list of `messages`".to_owned()));
        }
        count += 1;
    }
    if count < FEWEST_ROWS {
        return Err(wrong(format!("{} has {count} rows, too few to split", rows.display())));
    }
    let test = (count / 5).clamp(1, MOST_TEST_ROWS);
    let train = count - test;
    let absolute = |p: &Path| std::path::absolute(p).unwrap_or_else(|_| p.to_owned());
    let (rows, dir) = (absolute(rows), absolute(dir));
    let shown = rows.strip_prefix(&dir).unwrap_or(&rows).display().to_string();
    // JSON text is YAML text.
    let quoted = Value::String(shown).to_string();
    Ok(OWN_ROWS
        .replace("@ROWS@", &quoted)
        .replace("@COUNT@", &count.to_string())
        .replace("@TRAIN@", &train.to_string()))
}
