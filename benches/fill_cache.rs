//! Publishes a record for every stage of a pipeline without running any: each output is one small
//! file. For benches of plans over thousands of stages, which would take hours to run.
//!
//!     fill_cache PIPELINE.yaml CACHE

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use contract::{OutputForm, StageKind};
use pipe::cache::Cache;
use pipe::graph::StageGraph;
use pipe::lockfile::Lockfile;
use pipe::pipeline::{Kinds, Overrides, Pipeline, Stage};
use pipe::plan::{Decided, Decision, PlanOptions, Planner, Records};
use pipe::record::{OutputRecord, Record};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, file, root] = args.as_slice() else { return Err("fill_cache PIPELINE CACHE".into()) };
    let kinds: [&dyn StageKind; 2] = [&stage_select::Select, &stage_command::Command];
    let pipeline = Pipeline::load(Path::new(file), Overrides::default(), Kinds(&kinds))?;
    let graph = StageGraph::new(&pipeline);
    let cache = Cache::open(Path::new(root))?;
    let lock = Lockfile::beside(Path::new(file))?;
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
    cache.flush();
    Ok(())
}

/// The record of an execution that wrote its own name.
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
        telemetry: serde_json::Map::new(),
        provenance: serde_json::Map::new(),
        warnings: Vec::new(),
        lock: None,
    };
    for spec in &stage.signature.outputs {
        if spec.form != OutputForm::File {
            return Err(format!("output `{}` of `{}` is a folder", spec.name, stage.name).into());
        }
        let path = work.path().join(&spec.file_name);
        std::fs::write(&path, format!("{}\n", stage.name))?;
        let stored = cache.ingest(&path, OutputForm::File)?;
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
