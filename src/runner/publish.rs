//! What a stage made: into the cache, and published under its fingerprint, last.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use contract::{Fault, OutputForm, Request, StageError};

use super::execute::{Job, Made};
use crate::cache::{WorkDir, differing_artifacts, is_left_open};
use crate::pipeline::Stage;
use crate::plan::Planner;
use crate::record::{OutputRecord, Record};

/// Stores the outputs of a stage, each in the form that was declared.
pub(super) fn store(
    planner: Planner<'_>,
    job: &Job<'_>,
    request: &Request,
    work: &WorkDir,
) -> Result<BTreeMap<String, OutputRecord>, StageError> {
    let mut stored = BTreeMap::new();
    let defect =
        |what: String| Err(StageError::internal(format!("stage `{}` {what}", job.stage.name)));
    for spec in &job.stage.signature.outputs {
        let path = &request.outputs[&spec.name];
        undeclared(path, &work.path().join("out").join(&spec.name))?;
        let Ok(meta) = fs::symlink_metadata(path) else {
            if spec.optional {
                continue;
            }
            return defect(format!("did not make its output `{}`", spec.name));
        };
        let fits = match spec.form {
            OutputForm::File => meta.is_file(),
            OutputForm::Tree => meta.is_dir(),
        };
        // Of a link more can be said than that it is neither.
        if !fits && !meta.is_symlink() {
            return defect(format!(
                "made its output `{}` in another form than declared",
                spec.name
            ));
        }
        let kept = planner.cache.ingest(path, spec.form).map_err(|error| {
            let mut error = StageError::from(error);
            error.message =
                format!("output `{}` of stage `{}`: {}", spec.name, job.stage.name, error.message);
            error
        })?;
        let output = OutputRecord {
            digest: kept.digest,
            form: spec.form,
            class: spec.class,
            bytes: kept.bytes,
            file_name: spec.file_name.clone(),
            exec: kept.exec,
        };
        stored.insert(spec.name.clone(), output);
    }
    Ok(stored)
}

/// Files beside an output would be lost silently.
fn undeclared(output: &Path, dir: &Path) -> Result<(), StageError> {
    let entries = fs::read_dir(dir).map_err(|e| StageError::io("list", dir, &e))?;
    let beside =
        |e: &fs::DirEntry| e.path() != output && !e.file_name().to_str().is_some_and(is_left_open);
    match entries.flatten().find(beside) {
        Some(extra) => Err(StageError::internal(format!(
            "the stage wrote {}, which is not one of its outputs",
            extra.path().display()
        ))),
        None => Ok(()),
    }
}

/// Refuses a record that was made with something else than the stage requires.
pub(super) fn required(stage: &Stage, record: &Record) -> Result<(), StageError> {
    for (key, wanted) in &stage.require {
        let found = record.provenance.get(key).cloned().unwrap_or_default();
        if found != *wanted {
            return Err(StageError::new(
                Fault::Environment,
                format!("stage `{}` requires {key} = {wanted} and ran with {found}", stage.name),
            )
            .help("nothing was published; run where the requirement can be met, or drop it"));
        }
    }
    Ok(())
}

/// Refuses at once what is known before the stage runs: of all that it requires only the version.
pub(super) fn possible(stage: &Stage) -> Result<(), StageError> {
    let version = env!("CARGO_PKG_VERSION");
    match stage.require.get("pipe") {
        Some(wanted) if wanted != version => Err(StageError::new(
            Fault::Environment,
            format!("stage `{}` requires pipe = {wanted} and this is {version}", stage.name),
        )
        .help("it was not run; use that version, or drop the requirement")),
        _ => Ok(()),
    }
}

/// Publishes the record of an execution whose outputs are stored.
pub(super) fn publish(
    planner: Planner<'_>,
    job: &Job<'_>,
    mut record: Record,
) -> Result<Made, StageError> {
    required(job.stage, &record)?;
    let cache = planner.cache;
    let kind = &job.stage.kind;
    let published = cache.record(kind, record.fingerprint)?;
    let mut supersede = false;
    if let Some(published) = &published {
        // One that this stage may not reuse would stay in the way of every run.
        let reusable = cache.check(published).is_ok() && required(job.stage, published).is_ok();
        supersede = job.forced || !reusable;
        let differing = differing_artifacts(published, &record);
        if !differing.is_empty() && !job.stage.signature.nondeterministic {
            record.warnings.push(format!(
                "not deterministic: {} differ from what the same fingerprint made before",
                differing.join(", ")
            ));
        }
        supersede |= !differing.is_empty();
    }
    let last = cache.last(&planner.pipeline.name, &job.stage.name);
    let unchanged = last.is_some_and(|last| differing_artifacts(&last, &record).is_empty());
    cache.publish(&record, supersede)?;
    Ok(Made::Here { record: Arc::new(record), unchanged })
}
