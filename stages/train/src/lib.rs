//! Stage kind `train`: fine-tunes a LoRA adapter on packed token rows.
//!
//! Artifacts hold no time, host or path: the same request gives the same bytes, also when it was
//! killed and resumed in between.

mod error;
mod guard;
mod learner;
mod log;
mod meter;
mod optimizer;
mod order;
mod params;
mod rows;
mod schedule;
mod state;
mod trainer;

use std::path::Path;

use contract::{
    Checkpoints, InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature,
    StageError, StageKind,
};
use data::TokenFile;
use model::ModelConfig;
use serde_json::{Map, Value, json};

use crate::error::TrainError;
use crate::learner::{DecoderLearner, HostLearner};
use crate::params::{Params, Select};
use crate::rows::PackedRows;
use crate::trainer::{Finished, Trainer};

/// Changes when the same request would give other artifacts.
///
/// 2: rates and dynamic maps to the last bit; bitsandbytes' optimiser to the letter on a GPU.
/// 3: a vocabulary that is no multiple of 8 is no longer cut off on a GPU.
const VERSION: u32 = 3;

/// The stage kind `train`.
pub struct Train;

impl StageKind for Train {
    fn name(&self) -> &'static str {
        "train"
    }

    fn summary(&self) -> &'static str {
        "fine-tunes a LoRA adapter on packed token rows"
    }

    fn version(&self) -> String {
        format!("{VERSION}+numerics.{}", model::NUMERICS_VERSION)
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params = Params::parse(params)?;
        let eval_help = "packed rows that are evaluated every `eval_steps` and after the last step";
        let eval = match params.select {
            Select::Best => InputSpec::required("eval_tokens", eval_help),
            Select::Last => InputSpec::optional("eval_tokens", eval_help),
        };
        Ok(Signature {
            params: params.to_value(),
            identity: params.identity(),
            inputs: vec![
                InputSpec::required("model", "folder of the model whose weights stay frozen"),
                InputSpec::required("tokens", "packed rows to train on"),
                eval,
                InputSpec::optional("init_adapter", "PEFT folder to start from"),
            ],
            outputs: vec![
                OutputSpec::tree("adapter", "adapter"),
                OutputSpec::file("log", "train-log.jsonl"),
            ],
            resources: params.device.resources(cfg!(feature = "cuda")),
            ..Signature::default()
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(request.threads).build();
        pool.map_err(StageError::internal)?.install(|| train(request, reporter))
    }
}

fn train(request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
    let params = Params::parse(&request.params).map_err(StageError::internal)?;
    let init = request.optional_input("init_adapter").map(AsRef::as_ref);
    let model = request.input("model")?;
    #[cfg(feature = "cuda")]
    if let Some(gpu) = cuda::open(params.device, params.dtype, reporter)? {
        let learner = learner::CudaLearner::load(gpu, &params, model, init)?;
        return train_with(learner, &params, request, reporter);
    }
    train_with(HostLearner::load(&params, model, init)?, &params, request, reporter)
}

fn train_with(
    mut learner: impl DecoderLearner,
    params: &Params,
    request: &Request,
    reporter: &mut Reporter,
) -> Result<Outcome, StageError> {
    let rows = |input| read_rows(request.input(input)?, input, learner.config());
    let train_rows = rows("tokens")?;
    let eval = request.optional_input("eval_tokens").map(|_| rows("eval_tokens")).transpose()?;
    let checkpoints = Checkpoints::of(request);
    let trainer = Trainer::new(params, &mut learner, &train_rows, eval.as_ref(), &checkpoints);
    let finished = trainer.run(reporter)?;
    let base = &params.base_model_name_or_path;
    learner.save(&finished.values, request.output("adapter")?, base)?;
    data::write_jsonl(request.output("log")?, &finished.log)?;
    Ok(outcome(&finished, &learner))
}

/// Reads a token file and refuses what the model would refuse hours later.
fn read_rows(
    path: &Path,
    input: &'static str,
    model: &ModelConfig,
) -> Result<PackedRows, StageError> {
    let rows = PackedRows::new(TokenFile::read(path)?);
    let (limit, vocabulary) = (model.max_position_embeddings, model.vocab_size);
    let all: Vec<usize> = (0..rows.len()).collect();
    if all.is_empty() {
        return Err(TrainError::NoRows { input }.into());
    }
    if let Some((row, length)) = rows.longer_than(limit) {
        return Err(TrainError::TooLong { input, row, length, limit }.into());
    }
    if let Some((row, token)) = rows.outside_vocabulary(vocabulary) {
        return Err(TrainError::Vocabulary { input, row, token, vocabulary }.into());
    }
    if rows.targets(&all) == 0 {
        return Err(TrainError::NoTargets { input }.into());
    }
    Ok(rows)
}

fn outcome(finished: &Finished, learner: &impl DecoderLearner) -> Outcome {
    let meter = &finished.meter;
    let mut telemetry = map(json!({
        "steps": finished.log.len(),
        "selected_step": finished.selected_step,
        "resumed_from_step": finished.resumed_from,
        "tokens_per_second": meter.tokens_per_second(),
        "step_seconds": meter.step_seconds(),
        "eval_seconds": meter.eval_seconds(),
        "peak_memory_bytes": meter::peak_memory(),
    }));
    telemetry.extend(learner.choices().into_iter().map(|(name, value)| (name.to_owned(), value)));
    let (backend, device) = learner.backend();
    let provenance = json!({ "backend": backend, "device": device });
    Outcome { telemetry, provenance: map(provenance), ..Outcome::default() }
}

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests;
