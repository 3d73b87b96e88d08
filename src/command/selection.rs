//! Which stages a run or its plan is about, and which of them run although they are cached.

use super::{CommandError, Project};
use crate::plan::PlanOptions;

#[derive(Debug, Default, clap::Args)]
pub(super) struct Selection {
    /// Stages or targets [default: the target `default`, else every stage]
    #[arg(value_name = "STAGE|TARGET")]
    pub(super) names: Vec<String>,
    /// The named stages run although they are cached (without names: every stage)
    #[arg(long)]
    force: bool,
    /// Nothing but the named stages runs; what they need must be cached
    #[arg(long)]
    only: bool,
    /// This stage and everything downstream of it run although they are cached
    #[arg(long, value_name = "STAGE")]
    from: Option<String>,
}

impl Selection {
    /// Some names without further wishes.
    pub(super) fn of(names: Vec<String>) -> Self {
        Self { names, ..Self::default() }
    }

    /// The selected stages, and what `--force`, `--from` and `--only` mean for the plan.
    pub(super) fn resolve(
        &self,
        project: &Project,
    ) -> Result<(Vec<String>, PlanOptions), CommandError> {
        let selection = project.pipeline.select(&self.names)?;
        let needed = project.graph.with_upstream(&selection);
        let mut options = PlanOptions::default();
        if self.force {
            let all = if self.names.is_empty() { &needed } else { &selection };
            options.force = all.iter().cloned().collect();
        }
        if let Some(from) = &self.from {
            let from = project.stage(from)?.name.clone();
            let below = project.graph.with_downstream(&[from]);
            options.force.extend(below.into_iter().filter(|s| needed.contains(s)));
        }
        if self.only {
            options.only = Some(selection.iter().cloned().collect());
        }
        Ok((selection, options))
    }
}
