//! `pipe push`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{CommandError, Context, remote, run};
use crate::display::{Mode, RunDisplay};
use crate::event::Event;
use crate::exit_code;
use crate::plan::{Decision, PlanOptions};
use crate::runner;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stages or targets [default: the target `default`, else every stage]
    #[arg(value_name = "STAGE|TARGET")]
    names: Vec<String>,
    /// Ask for every object although the remote has the record, and replace what is incomplete
    #[arg(long)]
    verify: bool,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let clock = Instant::now();
    let project = context.project()?;
    let selection = project.pipeline.select(&args.names)?;
    let remote = remote::wanted(&project)?;
    let settings = remote.settings();
    if !settings.writes() {
        let (message, help) = if settings.is_http() {
            ("plain HTTP can be read only".to_owned(), "name the store itself: s3://, gs://, az://")
        } else if settings.is_unaccepted() {
            (
                "this is the build of a pull request, which does not write with `write: ci`"
                    .to_owned(),
                "builds of accepted code write; PIPE_REMOTE_WRITE=always overrides the pipeline file",
            )
        } else {
            let policy = settings.write;
            (
                format!("the remote's policy is `write: {policy}`"),
                "CI=true makes this CI; PIPE_REMOTE_WRITE=always overrides the pipeline file",
            )
        };
        return Err(CommandError::usage(message, help));
    }
    let options = PlanOptions::default();
    let planner = project.planner(&options);
    let plan = planner.plan(&selection, &project.lock)?;
    let all = plan.stages.len();
    let cached = plan.stages.into_iter().filter_map(|planned| match planned.decision {
        Decision::Reuse { record } => Some((planned.stage, record)),
        _ => None,
    });
    let records: Vec<(String, Arc<_>)> = cached.collect();
    let not_cached = all - records.len();
    let interrupts = run::interrupts();
    let mut display =
        RunDisplay::new(Mode::detect(context.shared.json), context.shared.verbose > 0);
    let (mut stored, mut there) = (0, 0);
    let mut show = |event: Event| {
        if let Event::StagePushed { stored: new, .. } = &event {
            *(if *new { &mut stored } else { &mut there }) += 1;
        }
        display.show(&event);
    };
    let failed = runner::push(planner, &remote, records, args.verify, &interrupts, &mut show);
    let seconds = clock.elapsed().as_secs_f64();
    display.show(&Event::PushFinished { stored, there, failed, not_cached, seconds });
    Ok(match failed {
        _ if interrupts.load(Ordering::SeqCst) > 0 => exit_code::INTERRUPTED,
        0 => exit_code::OK,
        _ => exit_code::REMOTE,
    })
}
