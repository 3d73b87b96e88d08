//! `pipe watch`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{CommandError, Context, current_dir, report, run};
use crate::display;
use crate::exit_code;
use crate::pipeline::InputRef;
use crate::watch::Snapshot;

/// At most this many changed files are named in a line.
const SHOWN: usize = 5;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stages or targets [default: the target `default`, else every stage]
    #[arg(value_name = "STAGE|TARGET")]
    names: Vec<String>,
    /// Stages that may run at the same time [default: cores, at most 4]
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// After a failure, go on with the stages that do not depend on the failed one
    #[arg(long)]
    keep_going: bool,
}

/// What a run reads of the user's files, and where its cache is.
struct Watched {
    paths: Vec<PathBuf>,
    cache: PathBuf,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let file = std::path::absolute(context.pipeline_path()?)
        .map_err(|e| CommandError::usage(format!("no current folder: {e}"), "change to one"))?;
    let here = current_dir()?;
    let interrupts = run::interrupts();
    let stop = || interrupts.load(Ordering::SeqCst) > 0;
    let run_args = run::Args::of(args.names.clone(), args.jobs, args.keep_going);
    // A pipeline that does not load leaves what is watched as it was.
    let mut watched = Watched { paths: Vec::new(), cache: file.join("none") };
    loop {
        // Before the file is read: an edit from here on is a reason to run again.
        let pipeline = Snapshot::of([&file], Path::new("/none"));
        let inputs = inputs(context, args);
        let loaded = inputs.is_ok();
        match inputs {
            Ok(inputs) => watched = inputs,
            Err(error) => {
                report(&error);
            }
        }
        let look = || Snapshot::of(&watched.paths, &watched.cache);
        let before = look().with(pipeline);
        if loaded {
            let done = run::execute(context, &run_args, Arc::clone(&interrupts));
            if let Err(error) = done {
                report(&error);
            }
        }
        if stop() {
            return Ok(exit_code::INTERRUPTED);
        }
        display::note("waiting for changes; Ctrl-C stops");
        let look = || look().with(Snapshot::of([&file], Path::new("/none")));
        let Some(changed) = before.wait(&look, &stop) else { return Ok(exit_code::INTERRUPTED) };
        display::note(&format!("changed: {}", listed(&changed, &here)));
    }
}

/// Local inputs of the stages that a run covers.
fn inputs(context: &Context<'_>, args: &Args) -> Result<Watched, CommandError> {
    let project = context.project()?;
    let selection = project.pipeline.select(&args.names)?;
    let mut paths = Vec::new();
    for name in project.graph.with_upstream(&selection) {
        let inputs = project.pipeline.stage(&name).into_iter().flat_map(|s| s.inputs.values());
        paths.extend(inputs.filter_map(|input| match &input.from {
            InputRef::Local(path) => Some(project.pipeline.dir.join(path)),
            _ => None,
        }));
    }
    paths.sort();
    paths.dedup();
    Ok(Watched { paths, cache: project.cache.root().to_owned() })
}

fn listed(changed: &[PathBuf], here: &Path) -> String {
    let shown = changed.iter().take(SHOWN);
    let shown = shown.map(|path| path.strip_prefix(here).unwrap_or(path).display().to_string());
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if changed.len() > SHOWN {
        text.push_str(&format!(" and {} more", changed.len() - SHOWN));
    }
    text
}
