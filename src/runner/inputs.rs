//! What a stage reads: looked at again just before it runs, laid out, and looked at once it has
//! ended.
//!
//! Inputs are hard links to objects, and some users may write to anything: what was decided on is
//! only used where it is still the same. Files that look unchanged are not read again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use contract::StageError;

use super::execute::Job;
use crate::cache::{CacheError, LaidOut, Unsound, WorkDir};
use crate::gather;
use crate::pipeline::InputRef;
use crate::plan::Planner;
use crate::record::{OutputRecord, Record};

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
pub(super) fn lost(
    planner: Planner<'_>,
    job: &Job<'_>,
) -> Result<BTreeMap<String, Arc<Record>>, StageError> {
    let mut lost = BTreeMap::new();
    for artifact in artifacts(job) {
        if fault(planner, &artifact)?.is_some()
            && let Some(record) = job.records.get(artifact.stage)
        {
            lost.insert(artifact.stage.to_owned(), Arc::clone(record));
        }
    }
    Ok(lost)
}

/// The inputs of a stage as it sees them.
#[derive(Default)]
pub(super) struct Inputs<'a> {
    /// Where they are, by name.
    pub(super) paths: BTreeMap<String, PathBuf>,
    laid_out: Vec<Read<'a>>,
}

/// What was laid out of an artifact.
struct Read<'a> {
    input: &'a str,
    /// Who made it.
    stage: &'a str,
    files: Vec<LaidOut>,
}

/// Puts the inputs of a stage into its working folder; files of the user stay where they are.
pub(super) fn lay_out<'a>(
    planner: Planner<'_>,
    job: &'a Job<'_>,
    work: &WorkDir,
) -> Result<Inputs<'a>, CacheError> {
    let mut inputs = Inputs::default();
    for (name, input) in &job.stage.inputs {
        let mut to = work.path().join("in").join(name);
        match &input.from {
            InputRef::Local(path) => to = planner.pipeline.dir.join(path),
            InputRef::Gathered(gathered) => {
                let made = gather::materialise(gathered, &job.records, planner.cache, &to)?;
                let read = |(stage, files)| Read { input: name, stage, files };
                inputs.laid_out.extend(made.into_iter().map(read));
            }
            InputRef::Output { stage, output } => {
                let Some(made) = job.records.get(stage).and_then(|r| r.outputs.get(output)) else {
                    continue;
                };
                to = to.join(&made.file_name);
                let files = planner.cache.materialise(made, &to)?;
                inputs.laid_out.push(Read { input: name, stage, files });
            }
        }
        inputs.paths.insert(name.clone(), to);
    }
    Ok(inputs)
}

/// What the stage read must be what the fingerprint says.
pub(super) fn check_unchanged(
    planner: Planner<'_>,
    job: &Job<'_>,
    inputs: &Inputs<'_>,
) -> Result<(), StageError> {
    for (name, input) in &job.stage.inputs {
        let InputRef::Local(path) = &input.from else { continue };
        let digest = planner.cache.digest_local(&planner.pipeline.dir.join(path))?;
        if job.identity.inputs.get(name) != Some(&digest) {
            let message = format!("{} changed while the stage ran", path.display());
            return Err(StageError::input(message)
                .help("nothing was published; run again once the file stays as it is"));
        }
    }
    for Read { input, stage, files } in &inputs.laid_out {
        let Some(unsound) = files.iter().find_map(|f| planner.cache.is_intact(f).err()) else {
            continue;
        };
        let Unsound::Damaged(what) = unsound else {
            return Err(unsound.of(&format!("input `{input}`")).into());
        };
        // The object, which may be the very file, must not be read by others.
        for artifact in artifacts(job).iter().filter(|a| (a.input, a.stage) == (*input, *stage)) {
            fault(planner, artifact)?;
        }
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
