//! AdamW (Loshchilov and Hutter, 2019) over the adapter's flat buffer, and global clipping.
//!
//! Every element's update is a function of its own numbers (or of its block of 256, for the 8-bit
//! variant) in f32, so threads never change a bit. Scalars of a step are formed in f64 first, as
//! PyTorch forms them in Python.

mod dynamic_map;
mod eight_bit;

use std::ops::Range;

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use eight_bit::BlockStates;

/// Elements a task takes.
const CHUNK: usize = 16 * 1024;
/// Tensors with fewer elements keep f32 states in the 8-bit variant, as in bitsandbytes.
const LEAST_QUANTISED: usize = 4096;

/// Which AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OptimizerKind {
    /// `torch.optim.AdamW`: decays before the update.
    Adamw,
    /// bitsandbytes' `AdamW8bit`: moments in 8 bits a piece, decays after the update.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}

/// Constants of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AdamConfig {
    pub(crate) kind: OptimizerKind,
    pub(crate) betas: [f64; 2],
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
}

/// The optimiser and its states.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Optimizer {
    config: AdamConfig,
    /// Updates done.
    updates: u64,
    tensors: Vec<(Range<usize>, States)>,
}

/// First and second moment of one tensor.
#[derive(Clone, Debug, PartialEq)]
enum States {
    F32 { m: Vec<f32>, v: Vec<f32> },
    Blocks(BlockStates),
}

/// Scalars of one update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalars {
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    /// Learning rate over the first bias correction.
    step: f32,
    /// Square root of the second bias correction.
    root: f32,
    eps: f32,
    /// `1 - lr * weight_decay`.
    decay: f32,
}

impl Optimizer {
    /// Fresh states for tensors that tile a buffer.
    pub(crate) fn new(config: AdamConfig, tensors: &[Range<usize>]) -> Self {
        let states = |range: &Range<usize>| {
            let quantised =
                config.kind == OptimizerKind::Adamw8bit && range.len() >= LEAST_QUANTISED;
            let zeros = || vec![0.0; range.len()];
            let states = if quantised {
                States::Blocks(BlockStates::new(range.len()))
            } else {
                States::F32 { m: zeros(), v: zeros() }
            };
            (range.clone(), states)
        };
        Self { config, updates: 0, tensors: tensors.iter().map(states).collect() }
    }

    /// One update of `values` by `grad`.
    pub(crate) fn update(&mut self, learning_rate: f64, values: &mut [f32], grad: &[f32]) {
        self.updates += 1;
        let scalars = self.scalars(learning_rate);
        let kind = self.config.kind;
        for (range, states) in &mut self.tensors {
            let (p, g) = (&mut values[range.clone()], &grad[range.clone()]);
            match states {
                States::Blocks(blocks) => blocks.update(scalars, p, g),
                States::F32 { m, v } => p
                    .par_chunks_mut(CHUNK)
                    .zip(g.par_chunks(CHUNK))
                    .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
                    .for_each(|((p, g), (m, v))| match kind {
                        OptimizerKind::Adamw => update_torch(scalars, p, g, m, v),
                        OptimizerKind::Adamw8bit => update_bitsandbytes(scalars, p, g, m, v),
                    }),
            }
        }
    }

    fn scalars(&self, learning_rate: f64) -> Scalars {
        let [beta1, beta2] = self.config.betas;
        let power = self.updates.min(i32::MAX as u64) as i32;
        let (first, second) = (1.0 - beta1.powi(power), 1.0 - beta2.powi(power));
        Scalars {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step: (learning_rate / first) as f32,
            root: second.sqrt() as f32,
            eps: self.config.eps as f32,
            decay: (1.0 - learning_rate * self.config.weight_decay) as f32,
        }
    }

    /// Appends the states to `out`: number of updates, then tensor by tensor, little-endian.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.updates.to_le_bytes());
        for (_, states) in &self.tensors {
            match states {
                States::F32 { m, v } => {
                    out.extend(m.iter().chain(v).flat_map(|x| x.to_le_bytes()));
                }
                States::Blocks(blocks) => blocks.write(out),
            }
        }
    }

    /// Takes back what [`Optimizer::write`] wrote; `None` where it does not fit.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Option<()> {
        let (updates, mut rest) = bytes.split_first_chunk::<8>()?;
        for (_, states) in &mut self.tensors {
            match states {
                States::F32 { m, v } => {
                    for values in [m, v] {
                        read_f32(values, &mut rest)?;
                    }
                }
                States::Blocks(blocks) => blocks.read(&mut rest)?,
            }
        }
        self.updates = u64::from_le_bytes(*updates);
        rest.is_empty().then_some(())
    }
}

/// bitsandbytes' dynamic maps: 256 signed values, then 256 unsigned.
#[cfg(feature = "cuda")]
pub(crate) fn dynamic_maps() -> Vec<f32> {
    dynamic_map::SIGNED.iter().chain(&*dynamic_map::UNSIGNED).copied().collect()
}

/// Fills `values` from the front of `bytes`.
pub(crate) fn read_f32(values: &mut [f32], bytes: &mut &[u8]) -> Option<()> {
    let (own, rest) = bytes.split_at_checked(values.len() * 4)?;
    for (value, raw) in values.iter_mut().zip(own.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*raw);
    }
    *bytes = rest;
    Some(())
}

/// The order of operations of `torch.optim.AdamW`, one tensor at a time.
fn update_torch(s: Scalars, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *p *= s.decay;
        *m += (*g - *m) * s.one_minus_beta1;
        *v = *v * s.beta2 + s.one_minus_beta2 * *g * *g;
        let denominator = v.sqrt() / s.root + s.eps;
        *p -= s.step * (*m / denominator);
    }
}

/// The order of operations of bitsandbytes' 32-bit optimiser, which its 8-bit one falls back to.
fn update_bitsandbytes(s: Scalars, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *m = *m * s.beta1 + s.one_minus_beta1 * *g;
        *v = *v * s.beta2 + s.one_minus_beta2 * *g * *g;
        *p = bitsandbytes_step(s, *p, *m, *v);
    }
}

/// The element update that both variants of bitsandbytes share.
#[inline]
pub(super) fn bitsandbytes_step(s: Scalars, p: f32, m: f32, v: f32) -> f32 {
    (p - s.step * s.root * (m / (v.sqrt() + s.root * s.eps))) * s.decay
}

/// Global L2 norm of a gradient, summed in f64 in one order.
pub(crate) fn global_norm(grad: &[f32]) -> f64 {
    let partial: Vec<f64> = grad
        .par_chunks(CHUNK)
        .map(|chunk| chunk.iter().map(|g| f64::from(*g) * f64::from(*g)).sum())
        .collect();
    partial.iter().sum::<f64>().sqrt()
}

/// Scales `grad` so that its norm is at most `limit`, as `clip_grad_norm_`; 0 is no limit.
pub(crate) fn clip(grad: &mut [f32], norm: f64, limit: f64) {
    let factor = (limit / (norm + 1e-6)).min(1.0) as f32;
    if limit > 0.0 && factor < 1.0 {
        grad.par_iter_mut().for_each(|g| *g *= factor);
    }
}

#[cfg(test)]
mod tests;
