//! `pipe run`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use contract::Progress;

use super::{CommandError, Context, Project, cache, remote};
use crate::cache::Cache;
use crate::display::{Mode, RunDisplay, Trace};
use crate::event::Event;
use crate::exit_code;
use crate::plan::PlanOptions;
use crate::runner::{self, RunOptions};
use crate::runs::RunLog;

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "one a flag")]
pub(super) struct Args {
    /// Stages or targets [default: the target `default`, else every stage]
    #[arg(value_name = "STAGE|TARGET")]
    names: Vec<String>,
    /// Run the named stages although they are cached (without names: every stage of the run)
    #[arg(long)]
    force: bool,
    /// Run nothing but the named stages; what they need must be cached
    #[arg(long)]
    only: bool,
    /// Run this stage and everything downstream of it although they are cached
    #[arg(long, value_name = "STAGE")]
    from: Option<String>,
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
        Self {
            names,
            force: false,
            only: false,
            from: None,
            jobs,
            keep_going,
            logs: false,
            cache_cap: None,
            trace: None,
        }
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
    let selection = project.pipeline.select(&args.names)?;
    let options = plan_options(&project, args, &selection)?;
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
    let mut log = RunLog::new(&project.pipeline, &args.names, &sets);
    let mut trace = args.trace.as_ref().map(|path| (path, Trace::default()));
    let mut show = |event| {
        log.observe(&event);
        if let Some((_, trace)) = &mut trace {
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
    if let Some((path, trace)) = &trace {
        trace.write(path).map_err(|e| {
            let message = format!("could not write {}: {e}", path.display());
            CommandError::usage(message, "`--trace` takes a file that can be written")
        })?;
    }
    let summary = summary?;
    log.finish().iter().for_each(|record| project.cache.put_run(record));
    project.lock = lock;
    if summary.ran + summary.fetched > 0 {
        cache::collect_after_run(&project.cache, cap);
    }
    Ok(match summary {
        summary if summary.interrupted => exit_code::INTERRUPTED,
        summary if summary.failed > 0 => exit_code::STAGE_FAILED,
        _ => exit_code::OK,
    })
}

/// What `--force`, `--from` and `--only` mean for the plan.
fn plan_options(
    project: &Project,
    args: &Args,
    selection: &[String],
) -> Result<PlanOptions, CommandError> {
    let needed = project.graph.with_upstream(selection);
    let mut options = PlanOptions::default();
    if args.force {
        let named: BTreeSet<String> = selection.iter().cloned().collect();
        options.force =
            if args.names.is_empty() { needed.iter().cloned().collect() } else { named };
    }
    if let Some(from) = &args.from {
        project.stage(from)?;
        let below = project.graph.with_downstream(std::slice::from_ref(from));
        options.force.extend(below.into_iter().filter(|s| needed.contains(s)));
    }
    if args.only {
        options.only = Some(selection.iter().cloned().collect());
    }
    Ok(options)
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
