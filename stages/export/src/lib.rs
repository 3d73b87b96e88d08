//! Stage kind `export`: a model merged with its adapter, for other programs: bf16 safetensors or
//! one GGUF file, with tokenizer, chat template and an Ollama Modelfile.
//!
//! What is written is a model folder like any other: `evaluate` takes it where it takes the model.

mod folder;
mod gguf;
mod merged;
mod modelfile;
mod out;
#[cfg(test)]
mod tests;

use checkpoint::{GgmlType, ModelConfig, ModelFolder, Weights};
use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError,
    StageKind, parse_params,
};
use model::Adapter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::merged::Merged;
use crate::out::Written;

/// Changes when the same model and adapter would be written differently.
const VERSION: &str = "1";

/// The stage kind `export`.
pub struct Export;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Params {
    format: Format,
    merge_onto: Base,
    /// Most bytes of tensors in one file of safetensors.
    #[schemars(range(min = 1))]
    max_shard_bytes: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            format: Format::Safetensors,
            merge_onto: Base::Decoded,
            // transformers' default in earlier versions, "5GB".
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum Format {
    /// bf16, as transformers reads it.
    #[serde(rename = "safetensors")]
    Safetensors,
    /// GGUF with matrices in f16.
    #[serde(rename = "gguf-f16")]
    GgufF16,
    /// GGUF with matrices in 8 bits.
    #[serde(rename = "gguf-q8_0")]
    GgufQ8,
    /// GGUF with matrices in 4 bits.
    #[serde(rename = "gguf-q4_0")]
    GgufQ4,
}

/// The weights that the adapter is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Base {
    /// Those that it was trained on, decoded where they are quantised.
    Decoded,
    /// Those before quantisation, from the input `original`.
    Original,
}

impl StageKind for Export {
    fn name(&self) -> &'static str {
        "export"
    }

    fn summary(&self) -> &'static str {
        "merges a model with its adapter and writes safetensors or GGUF, with an Ollama Modelfile"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        if params.max_shard_bytes == 0 {
            return Err(ParamError::at("max_shard_bytes", "at least 1"));
        }
        let mut inputs = vec![
            InputSpec::required("model", "folder of the model that was trained on"),
            InputSpec::optional("adapter", "PEFT folder to merge"),
        ];
        if params.merge_onto == Base::Original {
            inputs.push(InputSpec::required("original", "folder of its weights in 16 or 32 bits"));
        }
        Ok(Signature {
            inputs,
            outputs: vec![
                OutputSpec::tree("model", "model"),
                OutputSpec::file("stats", "export.json"),
            ],
            resources: [("cpu".to_owned(), 1)].into(),
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params: Params = request.params()?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(request.threads).build();
        pool.map_err(StageError::internal)?.install(|| export(&params, request, reporter))
    }
}

fn export(
    params: &Params,
    request: &Request,
    reporter: &mut Reporter,
) -> Result<Outcome, StageError> {
    let model = ModelFolder::open(request.input("model")?)?;
    let config = ModelConfig::read(&model)?;
    let adapter = request
        .optional_input("adapter")
        .map(|folder| Adapter::load_peft_to_merge(folder, &config))
        .transpose()?;
    let base = match params.merge_onto {
        Base::Decoded => None,
        Base::Original => {
            let original = ModelFolder::open(request.input("original")?)?;
            let found = ModelConfig::read(&original)?;
            merged::check_original(&config, &original, &found)?;
            Some((original, found))
        }
    };
    let (base, base_config) = base.as_ref().map_or((&model, &config), |(f, c)| (f, c));
    let weights = Weights::open(base, base_config)?;
    let merged = Merged::new(&weights, base_config, adapter, params.merge_onto, params.format)?;
    let out = request.output("model")?;
    std::fs::create_dir(out).map_err(|e| StageError::io("create", out, &e))?;
    let written = match params.format {
        Format::Safetensors => {
            folder::write(&merged, (&model, base), params.max_shard_bytes, out, reporter)?
        }
        Format::GgufF16 => gguf::write(&merged, &model, GgmlType::F16, out, reporter)?,
        Format::GgufQ8 => gguf::write(&merged, &model, GgmlType::Q8_0, out, reporter)?,
        Format::GgufQ4 => gguf::write(&merged, &model, GgmlType::Q4_0, out, reporter)?,
    };
    modelfile::write(&model, params.format != Format::Safetensors, out)?;
    data::write_json(request.output("stats")?, &stats(params, &merged, &written))?;
    reporter.log(format!(
        "{} tensors, {} merged, {} bytes; written weights differ from the exact ones by {:.3e} \
         (relative, root mean square)",
        written.tensors,
        merged.adapted(),
        written.bytes,
        written.relative_error()
    ));
    Ok(Outcome::default())
}

fn stats(params: &Params, merged: &Merged<'_>, written: &Written) -> Value {
    json!({
        "format": params.format,
        "merge_onto": params.merge_onto,
        "files": written.files,
        "tensors": written.tensors,
        "merged": merged.adapted(),
        "bytes": written.bytes,
        "relative_error": written.relative_error(),
    })
}
