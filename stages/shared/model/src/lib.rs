//! The decoder, its LoRA adapter, training micro-step and generation.

use std::ops::Range;
use std::path::Path;

/// Version of the arithmetic: part of the version of every stage kind that computes with it.
pub const NUMERICS_VERSION: u32 = 1;

/// A model that cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint or adapter is wrong.
    #[error("{0}")]
    Input(String),
    /// The file system refused.
    #[error("could not {doing} {path}: {source}")]
    Io {
        /// Completes "could not".
        doing: &'static str,
        /// File.
        path: String,
        /// What the file system said.
        source: std::io::Error,
    },
}

impl From<ModelError> for contract::StageError {
    fn from(error: ModelError) -> Self {
        match &error {
            ModelError::Input(message) => Self::input(message.clone()),
            ModelError::Io { doing, path, source } => Self::io(doing, Path::new(path), source),
        }
    }
}

/// A loaded decoder with frozen weights.
pub struct Model {}

/// What to adapt and how.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Scale is `alpha / r`.
    pub alpha: f32,
    /// Probability of zeroing an input feature of the adapter while training.
    pub dropout: f32,
    /// Names of the adapted projections, such as `q_proj`.
    pub targets: Vec<String>,
}

/// LoRA factors as one flat f32 buffer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What is adapted.
    pub config: LoraConfig,
    /// Where each factor lies in `values`, in a fixed order.
    pub factors: Vec<Factor>,
    /// All factors, one after another.
    pub values: Vec<f32>,
}

/// The pair of factors of one adapted linear.
#[derive(Clone, Debug, PartialEq)]
pub struct Factor {
    /// Checkpoint name without `.weight`, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `A [r, in]`, row-major.
    pub a: Range<usize>,
    /// `B [out, r]`, row-major.
    pub b: Range<usize>,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
}

/// Token rows of one forward and backward pass.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// Token ids `[n]`, all rows one after another.
    pub tokens: &'a [i32],
    /// Segment bounds inside `tokens`: attention and positions restart at each.
    pub cu_seqlens: &'a [i32],
    /// Target of each position `[n]` (the next token of the same segment), or -100 for none.
    pub targets: &'a [i32],
}

/// Sum of token losses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Sum of cross-entropy over targets, in nats.
    pub sum: f64,
    /// Number of targets.
    pub targets: u64,
}

/// Dropout of one micro-step: masks are a function of these alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the micro-step since the start of training.
    pub micro_step: u64,
}

/// Greedy generation.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens generated for a prompt.
    pub max_new_tokens: usize,
    /// Token ids that end a row.
    pub end_tokens: Vec<u32>,
    /// Rows decoded together.
    pub batch_size: usize,
}

/// A finished row of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Index of the prompt.
    pub prompt: usize,
    /// New tokens without the end token.
    pub tokens: Vec<u32>,
    /// An end token was produced within the limit.
    pub ended: bool,
}

impl Model {
    /// Loads a model folder (GGUF, or `config.json` with safetensors) onto the CPU.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let _ = folder;
        unimplemented!()
    }

    /// Bytes of the weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        unimplemented!()
    }

    /// Longest context of the model in tokens.
    pub fn max_positions(&self) -> usize {
        unimplemented!()
    }

    /// Backend and device, for provenance: `("flex", "cpu avx2 x2")`.
    pub fn backend(&self) -> (String, String) {
        unimplemented!()
    }

    /// A fresh adapter: A uniform in ±1/sqrt(in) (PEFT's default), B zero, from a counter-based
    /// generator keyed by `seed` and the factor's name.
    pub fn new_adapter(&self, config: &LoraConfig, seed: u64) -> Result<Adapter, ModelError> {
        let _ = (config, seed);
        unimplemented!()
    }

    /// Adds the gradient of `scale * sum of token losses` with respect to the adapter's values to
    /// `grad` (same length as `adapter.values`). Deterministic.
    pub fn loss_and_grad(
        &self,
        adapter: &Adapter,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: Option<DropoutKey>,
        grad: &mut [f32],
    ) -> Result<Loss, ModelError> {
        let _ = (adapter, batch, scale, dropout, grad);
        unimplemented!()
    }

    /// Sum of token losses, forward only.
    pub fn loss(
        &self,
        adapter: Option<&Adapter>,
        batch: MicroBatch<'_>,
    ) -> Result<Loss, ModelError> {
        let _ = (adapter, batch);
        unimplemented!()
    }

    /// Generates greedily for every prompt, `batch_size` rows at a time, calling `done` as rows
    /// finish (in any order). `done` returns false to stop early. A row's tokens do not depend on
    /// the batch.
    pub fn generate(
        &self,
        adapter: Option<&Adapter>,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), ModelError> {
        let _ = (adapter, prompts, options, done);
        unimplemented!()
    }
}

impl Adapter {
    /// Reads a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) for `model`.
    pub fn load_peft(folder: &Path, model: &Model) -> Result<Self, ModelError> {
        let _ = (folder, model);
        unimplemented!()
    }

    /// Writes a PEFT folder. `base` is the value of `base_model_name_or_path`.
    pub fn save_peft(&self, folder: &Path, base: &str) -> Result<(), ModelError> {
        let _ = (folder, base);
        unimplemented!()
    }
}
