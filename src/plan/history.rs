//! A stage as it is written now against any earlier execution of it.

use serde::Serialize;

use super::{Decision, FileChanges, PlanError, Planner, Reason, Records, reason};
use crate::digest::{Digest, Fingerprint};
use crate::fingerprint::Identity;
use crate::lockfile::Lockfile;
use crate::pipeline::{InputRef, Stage};
use crate::record::Record;

/// How a stage as it is written now differs from an earlier execution.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The earlier execution.
    pub earlier: Fingerprint,
    /// What it would be now; none while an input is not known.
    pub now: Option<Fingerprint>,
    /// Stages upstream that run or may run first; their outputs count as unchanged here.
    pub waits_for: Vec<String>,
    /// Every difference; empty where there is none.
    pub differences: Vec<Reason>,
}

impl Planner<'_> {
    /// Compares a stage with an earlier execution of it.
    ///
    /// # Errors
    /// [`PlanError`] for a missing local input or an unusable cache.
    pub fn compare(
        &self,
        stage: &Stage,
        earlier: &Record,
        lock: &Lockfile,
    ) -> Result<Comparison, PlanError> {
        let plan = self.plan(std::slice::from_ref(&stage.name), lock)?;
        let mut known = Records::new();
        for planned in plan.stages {
            if let Decision::Reuse { record } = planned.decision
                && planned.stage != stage.name
            {
                known.insert(planned.stage, record);
            }
        }
        let waits_for = self.waits_for(stage, &known);
        let (now, differences) = if waits_for.is_empty() {
            let identity = self.identity(stage, &known, lock)?;
            let now = identity.fingerprint();
            let same = now == earlier.fingerprint;
            let differences =
                if same { Vec::new() } else { self.changes(stage, &earlier.identity, &identity) };
            (Some(now), differences)
        } else {
            (None, self.known_changes(stage, &earlier.identity, &known, lock)?)
        };
        Ok(Comparison { earlier: earlier.fingerprint, now, waits_for, differences })
    }

    /// Every difference between two identities, with the files inside changed folders named.
    pub(super) fn changes(&self, stage: &Stage, old: &Identity, new: &Identity) -> Vec<Reason> {
        let mut found = reason::changes(stage, old, new);
        for reason in &mut found {
            let Reason::Input { input, files, .. } = reason else { continue };
            let digests = (old.inputs.get(input), new.inputs.get(input));
            if let (Some(before), Some(after)) = digests {
                *files = self.file_changes(stage, input, *before, *after);
            }
        }
        found
    }

    fn file_changes(
        &self,
        stage: &Stage,
        input: &str,
        before: Digest,
        after: Digest,
    ) -> Option<FileChanges> {
        // A file's digest names no listing, and reading it as one could take long.
        let after = match &stage.inputs.get(input)?.from {
            InputRef::Local(path) => {
                let path = self.pipeline.dir.join(path);
                if path.is_dir() { self.cache.listed(after) } else { None }
            }
            InputRef::Output { stage: from, output } => {
                let form = self.pipeline.stage(from)?.output(output)?.form;
                let tree = form == contract::OutputForm::Tree;
                if tree { self.cache.listed(after) } else { None }
            }
            InputRef::Gathered(_) => None,
        };
        let after = after?;
        Some(FileChanges::between(&self.cache.listed(before)?, &after))
    }
}
