//! LoRA factors (Hu et al., 2021) as one flat f32 buffer: `y = W·x + scale · B·(A·x)`.

use std::ops::Range;

use checkpoint::{LINEAR, ModelConfig};
use kernels::dropout::mix;
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// The projections of a layer that can be adapted, in the order of their factors.
pub const PROJECTIONS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Projections that read the same input; their A factors lie side by side, so that one product
/// serves them all.
pub(crate) const GROUPS: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4, 5], &[6]];

/// What to adapt and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub alpha: f32,
    /// Probability of zeroing an input feature of the adapter while training.
    pub dropout: f32,
    /// Names of the adapted projections, such as `q_proj`.
    pub targets: Vec<String>,
    /// The scale is `alpha / √r` (Kalajdzievski, 2023) instead of `alpha / r`.
    #[serde(default)]
    pub use_rslora: bool,
    /// Every output feature has a magnitude of its own (DoRA).
    #[serde(default)]
    pub use_dora: bool,
    /// The weights under the adapter are what this many iterations of LoftQ make of the whole ones.
    #[serde(default)]
    pub loftq_iter: Option<u32>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            alpha: 16.0,
            dropout: 0.0,
            targets: PROJECTIONS.map(str::to_owned).to_vec(),
            use_rslora: false,
            use_dora: false,
            loftq_iter: None,
        }
    }
}

/// LoRA factors as one flat f32 buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// What is adapted.
    pub config: LoraConfig,
    /// Where each factor lies in `values`: layer by layer in the order of [`PROJECTIONS`].
    pub factors: Vec<Factor>,
    /// All factors.
    pub values: Vec<f32>,
}

/// The pair of factors of one adapted linear.
#[derive(Clone, Debug, PartialEq)]
pub struct Factor {
    /// Checkpoint name without `.weight`, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Layer.
    pub layer: usize,
    /// Index in [`PROJECTIONS`].
    pub projection: usize,
    /// `A [r, in]`, row-major.
    pub a: Range<usize>,
    /// `B [out, r]`, row-major.
    pub b: Range<usize>,
    /// Magnitudes `[out]` with DoRA, else empty.
    pub magnitude: Range<usize>,
    /// Input features.
    pub inputs: usize,
    /// Output features.
    pub outputs: usize,
}

/// Dropout of one micro-step: masks are a function of these alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the micro-step since the start of training.
    pub micro_step: u64,
}

impl DropoutKey {
    /// Key of one group's input in one layer.
    pub(crate) fn of(self, layer: usize, group: usize) -> u64 {
        mix(self.seed ^ mix(self.micro_step ^ mix((layer * GROUPS.len() + group) as u64)))
    }
}

/// Full checkpoint name of a projection.
pub(crate) fn projection_name(layer: usize, projection: usize) -> String {
    format!("model.layers.{layer}.{}", LINEAR[projection])
}

impl Adapter {
    /// An adapter with all factors zero.
    ///
    /// # Errors
    /// [`ModelError::Input`] for an unknown target, a rank of zero or a dropout outside `[0, 1)`.
    pub fn zeros(model: &ModelConfig, config: &LoraConfig) -> Result<Self, ModelError> {
        for target in &config.targets {
            if !PROJECTIONS.contains(&target.as_str()) {
                return Err(ModelError::Input(format!(
                    "unknown LoRA target `{target}`; known are {}",
                    PROJECTIONS.join(", ")
                )));
            }
        }
        if config.r == 0 || config.targets.is_empty() || !(0.0..1.0).contains(&config.dropout) {
            return Err(ModelError::Input(
                "LoRA needs a rank of at least 1, a target, and a dropout in [0, 1)".to_owned(),
            ));
        }
        let mut factors = Vec::new();
        let mut end = 0;
        let mut take = |len: usize| {
            end += len;
            end - len..end
        };
        for layer in 0..model.num_hidden_layers {
            for group in GROUPS {
                let wanted: Vec<usize> = group
                    .iter()
                    .copied()
                    .filter(|p| config.targets.iter().any(|t| t == PROJECTIONS[*p]))
                    .collect();
                let first = factors.len();
                for &projection in &wanted {
                    let (inputs, outputs) = model.linear_shape(projection);
                    factors.push(Factor {
                        name: projection_name(layer, projection),
                        layer,
                        projection,
                        a: take(config.r * inputs),
                        b: 0..0,
                        magnitude: 0..0,
                        inputs,
                        outputs,
                    });
                }
                for factor in &mut factors[first..] {
                    factor.b = take(factor.outputs * config.r);
                }
                for factor in factors[first..].iter_mut().filter(|_| config.use_dora) {
                    factor.magnitude = take(factor.outputs);
                }
            }
        }
        let values = vec![0.0; end];
        Ok(Self { config: config.clone(), factors, values })
    }

    /// What `B·A` is multiplied by.
    pub fn scale(&self) -> f32 {
        self.config.scale()
    }

    /// The tensors inside `values`, which they tile.
    pub fn tensors(&self) -> Vec<Range<usize>> {
        let of_factor = |f: &Factor| [f.a.clone(), f.b.clone(), f.magnitude.clone()];
        let mut tensors: Vec<_> = self.factors.iter().flat_map(of_factor).collect();
        tensors.retain(|range| !range.is_empty());
        tensors.sort_by_key(|range| range.start);
        tensors
    }

    /// Where the factors of a group of projections in one layer are.
    pub(crate) fn group(&self, layer: usize, group: usize) -> Range<usize> {
        let per_layer = self.config.targets_in_order();
        let before = per_layer.iter().filter(|p| **p < GROUPS[group][0]).count();
        let count = per_layer.iter().filter(|p| GROUPS[group].contains(p)).count();
        let first = layer * per_layer.len() + before;
        first..first + count
    }
}

impl LoraConfig {
    /// `alpha / r`, or `alpha / √r` with `use_rslora`.
    pub fn scale(&self) -> f32 {
        let r = self.r as f32;
        self.alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    fn targets_in_order(&self) -> Vec<usize> {
        (0..PROJECTIONS.len())
            .filter(|p| self.targets.iter().any(|t| t == PROJECTIONS[*p]))
            .collect()
    }
}
