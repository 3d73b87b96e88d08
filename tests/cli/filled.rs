//! A cache that is filled without running anything, for tests and benches of plans.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use contract::OutputForm;
use pipe::cache::Cache;
use pipe::graph::StageGraph;
use pipe::lockfile::Lockfile;
use pipe::pipeline::{Kinds, Overrides, Pipeline, Stage};
use pipe::plan::{Decided, Decision, PlanOptions, Planner, Records};
use pipe::record::{OutputRecord, Record};
use serde_json::Map;

/// Publishes a record of every stage that has none; what it looked at is not flushed.
pub(crate) fn filled(
    file: &Path,
    overrides: Overrides<'_>,
    kinds: Kinds<'_>,
    root: &Path,
) -> Result<Cache, Box<dyn Error>> {
    let pipeline = Pipeline::load(file, overrides, kinds)?;
    let graph = StageGraph::new(&pipeline);
    let cache = Cache::open(root)?;
    let lock = Lockfile::beside(file)?;
    let options = PlanOptions::default();
    let planner = Planner { pipeline: &pipeline, graph: &graph, cache: &cache, options: &options };
    let mut records = Records::new();
    for name in graph.order() {
        let Some(stage) = pipeline.stage(name) else { continue };
        let decided = planner.decide(stage, &records, &lock)?;
        let record = match decided.decision {
            Decision::Reuse { record } => record,
            _ => Arc::new(publish(&cache, stage, decided)?),
        };
        cache.set_last(&pipeline.name, name, &stage.kind, record.fingerprint);
        records.insert(name.to_owned(), record);
    }
    Ok(cache)
}

/// The record of an execution that wrote its own fingerprint; a folder holds one file.
fn publish(cache: &Cache, stage: &Stage, decided: Decided) -> Result<Record, Box<dyn Error>> {
    let work = cache.work_dir()?;
    let mut record = Record {
        fingerprint: decided.fingerprint,
        identity: decided.identity,
        stage: stage.name.clone(),
        params: stage.signature.params.clone(),
        outputs: [].into(),
        seconds: 0.0,
        started_at: 0,
        finished_at: 0,
        telemetry: Map::new(),
        provenance: Map::new(),
        warnings: Vec::new(),
        lock: None,
    };
    for spec in &stage.signature.outputs {
        let path = work.path().join(&spec.file_name);
        let file = match spec.form {
            OutputForm::File => path.clone(),
            OutputForm::Tree => {
                fs::create_dir(&path)?;
                path.join("file")
            }
        };
        fs::write(file, format!("{} {}", spec.name, record.fingerprint))?;
        let stored = cache.ingest(&path, spec.form)?;
        let output = OutputRecord {
            digest: stored.digest,
            form: spec.form,
            class: spec.class,
            bytes: stored.bytes,
            file_name: spec.file_name.clone(),
            exec: false,
        };
        record.outputs.insert(spec.name.clone(), output);
    }
    cache.publish(&record, false)?;
    Ok(record)
}
