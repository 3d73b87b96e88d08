//! The decoder's frozen weights under their checkpoint names.

use std::path::Path;
use std::sync::OnceLock;

use burn::backend::Flex;
use burn::tensor::{Device, Tensor, TensorData};
use checkpoint::{ModelConfig, ModelFolder, Variations, Weights};
use kernels::rope::RopeTable;
use rayon::prelude::*;

use crate::generate::PackedWeights;
use crate::linear::Frozen;
use crate::matrix::{Matrix, PinnedMatrix};
use crate::{Adapter, LoraConfig, ModelError};

/// A loaded decoder with frozen weights.
pub struct Model {
    pub(crate) config: ModelConfig,
    /// Token embeddings `[vocabulary, hidden]`; also the head where it is tied.
    pub embed_tokens: Matrix,
    /// Layers in order.
    pub layers: Vec<Layer>,
    /// Final norm `[hidden]`.
    pub norm: Tensor<1>,
    /// Head `[vocabulary, hidden]` where it is not tied.
    pub lm_head: Option<Matrix>,
    pub(crate) packed: OnceLock<PackedWeights>,
    rope: OnceLock<RopeTable>,
}

/// One decoder layer.
pub struct Layer {
    /// Weights `[out, in]` in the order of [`crate::PROJECTIONS`].
    pub projections: Vec<Matrix>,
    /// Biases `[out]` in the same order, where the family has them.
    pub biases: Vec<Option<Tensor<1>>>,
    /// Norm before attention.
    pub input_layernorm: Tensor<1>,
    /// Norm of the output of attention, where the family has it.
    pub attention_output_norm: Option<Tensor<1>>,
    /// Norm before the feed-forward block: Llama's `post_attention_layernorm`, Gemma-2's
    /// `pre_feedforward_layernorm`.
    pub feed_forward_norm: Tensor<1>,
    /// Norm of the output of the feed-forward block, where the family has it.
    pub feed_forward_output_norm: Option<Tensor<1>>,
}

impl Model {
    /// Loads a model folder (GGUF, or `config.json` with safetensors) onto the CPU.
    ///
    /// # Errors
    /// [`ModelError`] naming the file and tensor that is missing, misshapen or of a type that is
    /// not supported.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let folder = ModelFolder::open(folder)?;
        let config = ModelConfig::read(&folder)?;
        let weights = Weights::open(&folder, &config)?;
        let device = Device::flex();
        let matrix = |name: &str, shape| Matrix::load(&weights, name, shape, false);
        let vector = |name: &str, len: usize| -> Result<Tensor<1>, ModelError> {
            let values = weights.load(name, &[len])?;
            Ok(Tensor::from_data(TensorData::new(values, [len]), &device))
        };
        let Variations { output_norms, norm_offset, .. } = config.variations;
        let norm = |name: &str| -> Result<Tensor<1>, ModelError> {
            let weight = vector(&format!("{name}.weight"), config.hidden_size)?;
            Ok(if norm_offset == 0.0 { weight } else { weight + norm_offset })
        };
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let layer = |index: usize| -> Result<Layer, ModelError> {
            let mut projections = Vec::new();
            let mut biases = Vec::new();
            for projection in 0..crate::PROJECTIONS.len() {
                let name = crate::adapter::projection_name(index, projection);
                let (inputs, outputs) = config.linear_shape(projection);
                let shape = [outputs, inputs];
                projections.push(Matrix::load(&weights, &format!("{name}.weight"), shape, true)?);
                let biased = config.qkv_bias && projection < 3;
                let bias = biased.then(|| vector(&format!("{name}.bias"), outputs)).transpose()?;
                biases.push(bias);
            }
            let norm = |name: &str| norm(&format!("model.layers.{index}.{name}"));
            let output_norm = |name: &str| output_norms.then(|| norm(name)).transpose();
            let pre = if output_norms { "pre_feedforward" } else { "post_attention" };
            Ok(Layer {
                projections,
                biases,
                input_layernorm: norm("input_layernorm")?,
                attention_output_norm: output_norm("post_attention_layernorm")?,
                feed_forward_norm: norm(&format!("{pre}_layernorm"))?,
                feed_forward_output_norm: output_norm("post_feedforward_layernorm")?,
            })
        };
        let layers = (0..config.num_hidden_layers)
            .into_par_iter()
            .map(layer)
            .collect::<Result<Vec<_>, _>>()?;
        let head = weights.has("lm_head.weight") && !config.tie_word_embeddings;
        Ok(Self {
            embed_tokens: matrix("model.embed_tokens.weight", [vocabulary, hidden])?,
            norm: norm("model.norm")?,
            lm_head: head.then(|| matrix("lm_head.weight", [vocabulary, hidden])).transpose()?,
            layers,
            config,
            packed: OnceLock::new(),
            rope: OnceLock::new(),
        })
    }

    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of the weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        let linear = self.layers.iter().flat_map(|layer| &layer.projections);
        let outer = [&self.embed_tokens].into_iter().chain(&self.lm_head);
        linear.chain(outer).map(|matrix| matrix.bytes() as u64).sum()
    }

    /// Longest context of the model in tokens.
    pub fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Backend and device, for provenance.
    pub fn backend(&self) -> (String, String) {
        let threads = rayon::current_num_threads();
        ("burn-flex".to_owned(), format!("cpu {:?} x{threads}", kernels::isa()).to_lowercase())
    }

    /// A fresh adapter; see [`Adapter::fresh`].
    ///
    /// # Errors
    /// As [`Adapter::fresh`].
    pub fn new_adapter(&self, config: &LoraConfig, seed: u64) -> Result<Adapter, ModelError> {
        Adapter::fresh(&self.config, config, seed)
    }

    /// Rotary table of all positions of the model.
    pub(crate) fn rope(&self) -> &RopeTable {
        self.rope.get_or_init(|| {
            let c = &self.config;
            RopeTable::new(c.max_position_embeddings, c.head_dim, c.rope_theta)
        })
    }

    /// The head `[vocabulary, hidden]`.
    pub(crate) fn head(&self) -> &Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The weights' own memory, borrowed through the tensors' primitives.
    pub(crate) fn pin(&self) -> Pinned {
        Pinned {
            embed: self.embed_tokens.pin(),
            head: self.head().pin(),
            norm: Memory::of(&self.norm),
            layers: self
                .layers
                .iter()
                .map(|layer| PinnedLayer {
                    projections: layer
                        .projections
                        .iter()
                        .zip(&layer.biases)
                        .map(|(w, b)| {
                            let [outputs, inputs] = w.dims();
                            (w.pin(), b.as_ref().map(Memory::of), inputs, outputs)
                        })
                        .collect(),
                    input_norm: Memory::of(&layer.input_layernorm),
                    attention_output_norm: layer.attention_output_norm.as_ref().map(Memory::of),
                    feed_forward_norm: Memory::of(&layer.feed_forward_norm),
                    feed_forward_output_norm: (layer.feed_forward_output_norm.as_ref())
                        .map(Memory::of),
                })
                .collect(),
        }
    }
}

/// A share of a flex tensor's memory.
pub(crate) struct Memory(burn::backend::flex::FlexTensor);

impl Memory {
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let primitive = tensor.clone().try_into_primitive::<Flex>();
        Self(primitive.expect("invariant: models are loaded onto flex"))
    }

    pub(crate) fn slice(&self) -> &[f32] {
        self.0.storage::<f32>()
    }
}

/// Shares of all weights.
pub(crate) struct Pinned {
    pub(crate) embed: PinnedMatrix,
    pub(crate) head: PinnedMatrix,
    pub(crate) norm: Memory,
    pub(crate) layers: Vec<PinnedLayer>,
}

/// Shares of one layer's weights.
pub(crate) struct PinnedLayer {
    projections: Vec<(PinnedMatrix, Option<Memory>, usize, usize)>,
    pub(crate) input_norm: Memory,
    pub(crate) attention_output_norm: Option<Memory>,
    pub(crate) feed_forward_norm: Memory,
    pub(crate) feed_forward_output_norm: Option<Memory>,
}

impl PinnedLayer {
    /// Every projection in the order of [`crate::PROJECTIONS`].
    pub(crate) fn projections(&self) -> impl Iterator<Item = Frozen<'_>> {
        (0..self.projections.len()).map(|index| self.projection(index))
    }

    pub(crate) fn projection(&self, index: usize) -> Frozen<'_> {
        let (weight, bias, inputs, outputs) = &self.projections[index];
        Frozen {
            weight: weight.view(),
            bias: bias.as_ref().map(Memory::slice),
            inputs: *inputs,
            outputs: *outputs,
        }
    }
}
