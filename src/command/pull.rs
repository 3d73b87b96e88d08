//! `pipe pull`.

use super::{CommandError, Context, cache, remote, run};
use crate::display::{self, Mode, RunDisplay};
use crate::event::Event;
use crate::exit_code;
use crate::plan::PlanOptions;
use crate::runner::{self, RunOptions};

/// Stages that are fetched at the same time.
const JOBS: usize = 8;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stages or targets [default: the target `default`, else every stage]
    #[arg(value_name = "STAGE|TARGET")]
    names: Vec<String>,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let cap = cache::cap_of_environment()?;
    let selection = project.pipeline.select(&args.names)?;
    let remote = remote::wanted(&project)?;
    let options = PlanOptions::default();
    let run_options = RunOptions {
        jobs: JOBS,
        keep_going: true,
        interrupts: run::interrupts(),
        read: Some(remote),
        write: None,
        fetch_only: true,
    };
    let mut display =
        RunDisplay::new(Mode::detect(context.shared.json), context.shared.verbose > 0);
    let mut lock = project.lock.clone();
    let mut lacking = false;
    let mut show = |event| {
        lacking |= matches!(event, Event::StageNotFound { .. });
        display.show(&event);
    };
    let planner = project.planner(&options);
    let summary = runner::run(planner, &mut lock, &selection, &run_options, &mut show)?;
    if summary.fetched > 0 {
        cache::collect_after_run(&project.cache, cap);
    }
    Ok(match summary {
        summary if summary.defect => {
            display::defect();
            exit_code::BUG
        }
        summary if summary.interrupted => exit_code::INTERRUPTED,
        summary if summary.failed > 0 => exit_code::CACHE,
        _ if lacking => exit_code::REMOTE,
        _ => exit_code::OK,
    })
}
