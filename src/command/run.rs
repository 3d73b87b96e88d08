//! `pipe run`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use contract::Progress;

use super::selection::Selection;
use super::{CommandError, Context, cache, remote};
use crate::cache::Cache;
use crate::display::{self, Mode, RunDisplay, TraceFile};
use crate::event::Event;
use crate::exit_code;
use crate::runner::{self, RunOptions};
use crate::runs::RunLog;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Stages that may run at the same time [default: cores, at most 4]
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// After a failure, go on with the stages that do not depend on the failed one
    #[arg(long)]
    keep_going: bool,
    /// Show the stages' log lines, and those of reused stages while their logs are kept
    #[arg(long)]
    logs: bool,
    /// Size above which the cache is collected once a day after a run, or `off`
    /// [default: `PIPE_CACHE_CAP`, else 200GiB]
    #[arg(long, value_name = "SIZE", value_parser = cache::parse_cap)]
    cache_cap: Option<cache::Cap>,
    /// Write a Chrome trace of the run to a file, for Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

impl Args {
    /// A run of some names without further wishes.
    pub(super) fn of(names: Vec<String>, jobs: Option<u16>, keep_going: bool) -> Self {
        let selection = Selection::of(names);
        Self { selection, jobs, keep_going, logs: false, cache_cap: None, trace: None }
    }
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    execute(context, args, interrupts())
}

/// Runs; `interrupts` counts those by the user.
pub(super) fn execute(
    context: &Context<'_>,
    args: &Args,
    interrupts: Arc<AtomicUsize>,
) -> Result<u8, CommandError> {
    let mut project = context.project()?;
    let cap = args.cache_cap.map_or_else(cache::cap_of_environment, |cap| Ok(cap.0))?;
    let (selection, options) = args.selection.resolve(&project)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let profile = project.pipeline.profile.as_ref();
    let jobs = args.jobs.or(profile.and_then(|p| p.jobs));
    let jobs = jobs.map_or(cores.clamp(2, 4), usize::from);
    let mut sets = profile.map(|p| p.set.clone()).unwrap_or_default();
    sets.extend_from_slice(&context.shared.set);
    let remote = remote::of_run(&project)?;
    let run_options = RunOptions {
        jobs,
        keep_going: args.keep_going,
        interrupts,
        read: remote.clone().filter(|r| r.settings().reads()),
        write: remote.filter(|r| r.settings().writes()),
        fetch_only: false,
    };
    let mut display =
        RunDisplay::new(Mode::detect(context.shared.json), context.shared.verbose > 0 || args.logs);

    let mut lock = project.lock.clone();
    let planner = project.planner(&options);
    let mut log = RunLog::new(&project.pipeline, &args.selection.names, &sets);
    let mut trace = args.trace.as_deref().map(trace_file).transpose()?;
    let mut show = |event| {
        log.observe(&event);
        if let Some(trace) = &mut trace {
            trace.add(&event);
        }
        display.show(&event);
        if args.logs {
            for line in replay(planner.cache, &event) {
                display.show(&line);
            }
        }
    };
    let summary = runner::run(planner, &mut lock, &selection, &run_options, &mut show);
    // A disk that is full by now costs the trace and nothing else.
    if let Some(Err(error)) = trace.map(TraceFile::finish) {
        display::note(&format!("warning: the trace could not be written: {error}"));
    }
    let summary = summary?;
    log.finish().iter().for_each(|record| project.cache.put_run(record));
    project.lock = lock;
    if summary.ran + summary.fetched > 0 {
        cache::collect_after_run(&project.cache, cap);
    }
    Ok(match summary {
        summary if summary.defect => {
            display::defect();
            exit_code::BUG
        }
        summary if summary.interrupted => exit_code::INTERRUPTED,
        summary if summary.failed > 0 => exit_code::STAGE_FAILED,
        _ => exit_code::OK,
    })
}

/// Opens the file of `--trace`, before the run has anything to lose.
fn trace_file(path: &Path) -> Result<TraceFile, CommandError> {
    TraceFile::create(path).map_err(|e| {
        let message = format!("could not write {}: {e}", path.display());
        CommandError::usage(message, "`--trace` takes a file that can be written")
    })
}

/// Counts the interrupts by the user from now on.
pub(super) fn interrupts() -> Arc<AtomicUsize> {
    let interrupts = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&interrupts);
    let handler = ctrlc::set_handler(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    if let Err(error) = handler {
        tracing::warn!(%error, "cannot listen for interrupts");
    }
    interrupts
}

/// The log of a reused stage, as the stage would have said it.
fn replay(cache: &Cache, event: &Event) -> Vec<Event> {
    let Event::StageReused { stage, fingerprint, .. } = event else { return Vec::new() };
    let log = cache.log_of(*fingerprint).and_then(|path| std::fs::read(path).ok());
    let text = log.unwrap_or_default();
    let said = |line: &str| {
        let progress = Progress::Log { message: line.to_owned() };
        Event::StageProgress { stage: stage.clone(), progress }
    };
    String::from_utf8_lossy(&text).lines().map(said).collect()
}
