//! What a stage reads, looked at again just before it runs and once it has ended.
//!
//! Inputs are hard links to objects, and some users may write to anything: what was decided on is
//! only used where it is still the same. Files that look unchanged are not read again.

use std::collections::BTreeSet;

use contract::StageError;

use super::execute::Job;
use crate::cache::{CacheError, Unsound};
use crate::pipeline::InputRef;
use crate::plan::Planner;
use crate::record::OutputRecord;

/// An artifact of another stage that a stage reads.
struct Artifact<'a> {
    input: &'a str,
    stage: &'a str,
    made: &'a OutputRecord,
}

fn artifacts<'a>(job: &'a Job<'_>) -> Vec<Artifact<'a>> {
    let mut found = Vec::new();
    for (input, wired) in &job.stage.inputs {
        let (stages, output) = match &wired.from {
            InputRef::Local(_) => continue,
            InputRef::Output { stage, output } => (vec![stage], output),
            InputRef::Gathered(gathered) => {
                (gathered.members.iter().map(|m| &m.stage).collect(), &gathered.output)
            }
        };
        found.extend(stages.into_iter().filter_map(|stage| {
            let made = job.records.get(stage)?.outputs.get(output)?;
            Some(Artifact { input, stage, made })
        }));
    }
    found
}

/// The stages whose artifacts were lost or damaged since they were made or decided on; what is
/// left of these is in the quarantine now.
pub(super) fn lost(planner: Planner<'_>, job: &Job<'_>) -> Result<BTreeSet<String>, StageError> {
    let mut lost = BTreeSet::new();
    for artifact in artifacts(job) {
        if fault(planner, &artifact)?.is_some() {
            lost.insert(artifact.stage.to_owned());
        }
    }
    Ok(lost)
}

/// What the stage read must be what the fingerprint says.
pub(super) fn check_unchanged(planner: Planner<'_>, job: &Job<'_>) -> Result<(), StageError> {
    for (name, input) in &job.stage.inputs {
        let InputRef::Local(path) = &input.from else { continue };
        let digest = planner.cache.digest_local(&planner.pipeline.dir.join(path))?;
        if job.identity.inputs.get(name) != Some(&digest) {
            let message = format!("{} changed while the stage ran", path.display());
            return Err(StageError::input(message)
                .help("nothing was published; run again once the file stays as it is"));
        }
    }
    for artifact in artifacts(job) {
        let Some(what) = fault(planner, &artifact)? else { continue };
        let Artifact { input, stage, .. } = artifact;
        let message =
            format!("input `{input}` (made by `{stage}`) changed while the stage ran: {what}");
        return Err(StageError::input(message).help(
            "nothing was published; stages must not write to their inputs, only to copies of \
             them. Run again: what was changed is made anew",
        ));
    }
    Ok(())
}

/// What is wrong with an artifact, which then goes to the quarantine.
fn fault(planner: Planner<'_>, artifact: &Artifact<'_>) -> Result<Option<String>, CacheError> {
    match planner.cache.check_output(artifact.made) {
        Ok(()) => Ok(None),
        Err(Unsound::Damaged(what)) => {
            planner.cache.clear_output(artifact.made);
            Ok(Some(what))
        }
        Err(denied) => Err(denied.of(&format!("input `{}`", artifact.input))),
    }
}

/// Folders of the user are not stored; their listings are, for explanations.
pub(super) fn keep_listings(planner: Planner<'_>, job: &Job<'_>) {
    for input in job.stage.inputs.values() {
        let InputRef::Local(path) = &input.from else { continue };
        let path = planner.pipeline.dir.join(path);
        if path.is_dir() {
            planner.cache.keep_listing(&path);
        }
    }
}
