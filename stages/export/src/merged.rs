//! The weights of a model with the adapter added, one tensor at a time.

use checkpoint::{Family, LINEAR, LinearWeight, ModelConfig, ModelFolder, Weights};
use contract::StageError;
use model::Adapter;

use crate::{Base, Format};

/// Norms that a layer may have.
const NORMS: [&str; 4] = [
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
];

/// A tensor's name and row-major shape.
pub(crate) type Named = (String, Vec<usize>);

/// A model with its adapter.
pub(crate) struct Merged<'a> {
    weights: &'a Weights<'a>,
    pub(crate) config: &'a ModelConfig,
    adapter: Option<Adapter>,
    onto: Base,
    /// Added to the norms: what the source's norms hold less than those of the format.
    norm_shift: f32,
}

impl<'a> Merged<'a> {
    /// # Errors
    /// Says that the head is missing although it is not tied.
    pub(crate) fn new(
        weights: &'a Weights<'a>,
        config: &'a ModelConfig,
        adapter: Option<Adapter>,
        onto: Base,
        format: Format,
    ) -> Result<Self, StageError> {
        if !config.tie_word_embeddings && !weights.has("lm_head.weight") {
            return Err(StageError::input(
                "the model has no `lm_head.weight`, and its configuration does not tie the head \
                 to the embedding",
            ));
        }
        // Gemma-2's norms are `1 + w`: transformers stores w, llama.cpp the sum.
        let has_offset = config.family == Family::Gemma2 && format == Format::Safetensors;
        let norm_shift = config.variations.norm_offset - f32::from(u8::from(has_offset));
        Ok(Self { weights, config, adapter, onto, norm_shift })
    }

    /// Linear layers that the adapter changes.
    pub(crate) fn adapted(&self) -> usize {
        self.adapter.as_ref().map_or(0, |a| a.factors.len())
    }

    /// Every tensor in transformers' names; of a tied head, the embedding alone.
    pub(crate) fn tensors(&self) -> Vec<Named> {
        let c = self.config;
        let mut all =
            vec![("model.embed_tokens.weight".to_owned(), vec![c.vocab_size, c.hidden_size])];
        for layer in 0..c.num_hidden_layers {
            for (index, linear) in LINEAR.iter().enumerate() {
                let name = format!("model.layers.{layer}.{linear}");
                let (inputs, outputs) = c.linear_shape(index);
                all.push((format!("{name}.weight"), vec![outputs, inputs]));
                if c.qkv_bias && index < 3 {
                    all.push((format!("{name}.bias"), vec![outputs]));
                }
            }
            let norms = NORMS.iter().map(|norm| format!("model.layers.{layer}.{norm}.weight"));
            let there = norms.filter(|name| self.weights.has(name));
            all.extend(there.map(|name| (name, vec![c.hidden_size])));
        }
        all.push(("model.norm.weight".to_owned(), vec![c.hidden_size]));
        if !c.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![c.vocab_size, c.hidden_size]));
        }
        all
    }

    /// The tensor in row-major f32, merged.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or has values that are not finite; one that is
    /// quantised where the original weights were asked for.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, StageError> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let mut values = match *shape {
            [outputs, inputs] if name.contains(".layers.") => {
                let weight = self.weights.load_linear(name, [outputs, inputs])?;
                if self.onto == Base::Original && matches!(weight, LinearWeight::Nf4(_)) {
                    return Err(quantised(name));
                }
                let of_loftq = self.adapter.as_ref().is_some_and(|a| a.config.loftq_iter.is_some());
                if of_loftq && matches!(weight, LinearWeight::Nf4(_)) {
                    return Err(StageError::input(format!(
                        "`{name}` has four bits already, and LoftQ started the adapter beside \
                         those that it makes of whole weights"
                    ))
                    .help("wire the model that was trained on as `model`"));
                }
                weight.into_f32()
            }
            _ => self.weights.load(name, shape)?,
        };
        if self.norm_shift != 0.0 && name.ends_with("norm.weight") {
            for weight in &mut values {
                *weight += self.norm_shift;
            }
        }
        if let Some(adapter) = &self.adapter
            && let Some(factor) = adapter.factor(module)
        {
            adapter.merge(factor, &mut values)?;
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let message = format!("`{name}`: merged value {at} is {}", values[at]);
            return Err(StageError::input(message).help("the training may have diverged"));
        }
        Ok(values)
    }
}

fn quantised(name: &str) -> StageError {
    StageError::input(format!("input `original`: `{name}` is quantised"))
        .help("wire the model in 16 bits, or merge with `merge_onto: decoded`")
}

/// Refuses weights that are not those of `model` before quantisation.
///
/// # Errors
/// Says what differs, or which tensor is quantised.
pub(crate) fn check_original(
    model: &ModelConfig,
    original: &ModelFolder,
    found: &ModelConfig,
) -> Result<(), StageError> {
    let sizes = |c: &ModelConfig| {
        [
            ("num_hidden_layers", c.num_hidden_layers),
            ("hidden_size", c.hidden_size),
            ("intermediate_size", c.intermediate_size),
            ("num_attention_heads", c.num_attention_heads),
            ("num_key_value_heads", c.num_key_value_heads),
            ("head_dim", c.head_dim),
            ("vocab_size", c.vocab_size),
        ]
    };
    for ((what, wanted), (_, is)) in sizes(model).into_iter().zip(sizes(found)) {
        if wanted != is {
            return Err(StageError::input(format!(
                "input `original` is another model: `{what}` is {is}, of `model` {wanted}"
            )));
        }
    }
    if model.family != found.family {
        return Err(StageError::input("input `original` is a model of another family"));
    }
    if let ModelFolder::Gguf { gguf } = original
        && let Some(tensor) = gguf.tensors().find(|t| t.dtype.block_len() > 1)
    {
        return Err(quantised(&tensor.name));
    }
    Ok(())
}

/// llama.cpp's and transformers' names of a family.
pub(crate) fn architecture(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::Llama => ("llama", "LlamaForCausalLM"),
        Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
        Family::Gemma2 => ("gemma2", "Gemma2ForCausalLM"),
    }
}
