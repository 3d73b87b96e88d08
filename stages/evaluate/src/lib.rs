//! Stage kind `evaluate`: answers prompts greedily and scores the function calls in the answers.
//!
//! Two evaluations are compared only where prompts and decoding are equal. Resumption and the number
//! of threads never change an answer, and on the CPU the batch size does not either; on a GPU it is the
//! number of rows of products, whose sums cuBLASLt may order otherwise for another one.

mod answerer;
mod estimate;
mod evaluation;
mod generation;
mod literal;
mod metrics;
mod params;
mod parse;
mod score;
mod statistics;
mod summary;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trial;

use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError, StageKind,
};
use serde_json::Value;

use crate::params::Params;

/// Changes when the same answers would be parsed, scored or summed up differently, or a device would
/// answer differently.
///
/// 1: first. 2: Python calls over several lines count once; on a GPU the number of prompts decides
/// no shape of a product.
const VERSION: u32 = 2;

/// The stage kind `evaluate`.
pub struct Evaluate;

impl StageKind for Evaluate {
    fn name(&self) -> &'static str {
        "evaluate"
    }

    fn summary(&self) -> &'static str {
        "answers prompts greedily and scores the function calls in the answers"
    }

    fn version(&self) -> String {
        format!("{VERSION}+numerics.{}", model::NUMERICS_VERSION)
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params = Params::parse(params)?;
        Ok(Signature {
            params: params.to_value()?,
            identity: params.identity()?,
            inputs: vec![
                InputSpec::required("model", "folder of the model"),
                InputSpec::required("prompts", "prompts with their right answers"),
                InputSpec::optional("manual", "prompts that are answered and not scored"),
                InputSpec::optional("adapter", "PEFT folder applied to the model"),
                InputSpec::optional("baseline_metrics", "metrics of the run to compare with"),
                InputSpec::optional("baseline_predictions", "predictions of that run"),
            ],
            outputs: vec![
                OutputSpec::file("metrics", "metrics.json"),
                OutputSpec::file("predictions", "predictions.jsonl"),
                OutputSpec::file("manual", "manual.jsonl").optional(),
            ],
            resources: params.device.resources(cfg!(feature = "cuda")),
            ..Signature::default()
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params = Params::parse(&request.params).map_err(StageError::internal)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(request.threads).build();
        pool.map_err(StageError::internal)?.install(|| {
            let load = answerer::loader(&params, reporter)?;
            evaluation::run(&params, request, reporter, &*load)
        })
    }
}

/// The most memory this process has held, in bytes, where the system says.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
