//! `pipe graph`.

use super::{CommandError, Context};
use crate::display;
use crate::exit_code;
use crate::plan::{Decision, PlanOptions};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Language of the drawing
    #[arg(long, value_enum, default_value_t = Format::Mermaid)]
    format: Format,
    /// Write beside each stage whether it would run
    #[arg(long)]
    plan: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    Dot,
    Mermaid,
    Svg,
    Html,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let plan = if args.plan {
        let all: Vec<String> = project.pipeline.stages.iter().map(|s| s.name.clone()).collect();
        let options = PlanOptions::default();
        Some(project.planner(&options).plan(&all, &project.lock)?)
    } else {
        None
    };
    let note = |stage: &str| {
        let planned = plan.as_ref()?.stages.iter().find(|s| s.stage == stage)?;
        let word = match planned.decision {
            Decision::Reuse { .. } => "cached",
            Decision::Run { .. } => "would run",
            Decision::Maybe { .. } => "might run",
        };
        Some(word.to_owned())
    };
    display::out(&match args.format {
        Format::Dot => project.graph.to_dot(&project.pipeline, note),
        Format::Mermaid => project.graph.to_mermaid(&project.pipeline, note),
        Format::Svg => project.graph.to_svg(&project.pipeline, note),
        Format::Html => project.graph.to_html(&project.pipeline, note),
    });
    Ok(exit_code::OK)
}
