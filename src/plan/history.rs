//! A stage as it is written now against any earlier execution of it.

use serde::Serialize;

use super::{Decision, FileChanges, PlanError, Planner, Reason, Records, reason};
use crate::cache::TreeEntry;
use crate::digest::{Digest, Fingerprint};
use crate::fingerprint::Identity;
use crate::gather;
use crate::lockfile::Lockfile;
use crate::pipeline::{Gathered, InputRef, Stage};
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
            let differences = if same {
                Vec::new()
            } else {
                self.changes(stage, &earlier.identity, &identity, &known)
            };
            (Some(now), differences)
        } else {
            (None, self.known_changes(stage, &earlier.identity, &known, lock)?)
        };
        Ok(Comparison { earlier: earlier.fingerprint, now, waits_for, differences })
    }

    /// Every difference between two identities, with the files inside changed folders named.
    pub(super) fn changes(
        &self,
        stage: &Stage,
        old: &Identity,
        new: &Identity,
        known: &Records,
    ) -> Vec<Reason> {
        let mut found = reason::changes(stage, old, new);
        for reason in &mut found {
            let Reason::Input { input, files, forgotten, .. } = reason else { continue };
            let digests = (old.inputs.get(input), new.inputs.get(input));
            let (Some(before), Some(after)) = digests else { continue };
            (*files, *forgotten) = match &stage.inputs.get(input).map(|i| &i.from) {
                Some(InputRef::Gathered(gathered)) => {
                    let find = || self.gathered_changes(gathered, old, known);
                    let changes = known.differing((*before, *after), find);
                    (changes.clone(), changes.is_none())
                }
                Some(from) => self.file_changes(from, *before, *after),
                None => continue,
            };
        }
        found
    }

    /// The files by which two states of a folder differ, or that the old ones are forgotten.
    fn file_changes(
        &self,
        from: &InputRef,
        before: Digest,
        after: Digest,
    ) -> (Option<FileChanges>, bool) {
        // A file's digest names no listing, and reading it as one could take long.
        let folder = match from {
            InputRef::Local(path) => self.pipeline.dir.join(path).is_dir(),
            InputRef::Output { stage, output } => {
                let spec = self.pipeline.stage(stage).and_then(|s| s.output(output));
                spec.is_some_and(|spec| spec.form == contract::OutputForm::Tree)
            }
            InputRef::Gathered(_) => false,
        };
        let listed = |digest| if folder { self.cache.listed(digest) } else { None };
        let Some(after) = listed(after) else { return (None, false) };
        let before = listed(before);
        let changes = before.map(|before| FileChanges::between(&before, &after));
        let forgotten = changes.is_none();
        (changes, forgotten)
    }

    /// The files by which a gathered input differs from what it was.
    fn gathered_changes(
        &self,
        gathered: &Gathered,
        earlier: &Identity,
        known: &Records,
    ) -> Option<FileChanges> {
        let stages = gathered.members.iter().map(|m| m.stage.as_str());
        let records = stages.map(|name| Some((name, known.get(name)?.as_ref())));
        let after = gather::files(gathered, records.collect::<Option<_>>()?, self.cache);
        Some(FileChanges::between(&self.gathered_before(gathered, earlier)?, &after))
    }

    /// The files of a gathered input of an earlier execution: what its points made in the run that
    /// this was part of.
    fn gathered_before(&self, gathered: &Gathered, earlier: &Identity) -> Option<Vec<TreeEntry>> {
        let of = earlier.fingerprint();
        let runs = self.cache.runs().ok()?;
        let run = runs.into_iter().find(|run| {
            run.stages.iter().any(|s| s.fingerprint == Some(of) && s.kind == earlier.kind)
        })?;
        let points = run.stages.iter().filter(|s| is_point(&s.stage, &gathered.stage));
        let records = points.map(|point| {
            let record = self.cache.record(&point.kind, point.fingerprint?).ok()??;
            Some((point.stage.as_str(), record))
        });
        let records: Vec<_> = records.collect::<Option<_>>()?;
        if records.is_empty() {
            return None;
        }
        let records = records.iter().map(|(name, record)| (*name, record)).collect();
        Some(gather::files(gathered, records, self.cache))
    }
}

/// Whether a stage is a point of `swept`, the default one included.
fn is_point(name: &str, swept: &str) -> bool {
    name.strip_prefix(swept).is_some_and(|rest| rest.is_empty() || rest.starts_with('@'))
}
