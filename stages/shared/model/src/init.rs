//! What the factors of a new adapter hold.

use std::borrow::Cow;

use checkpoint::ModelConfig;
use kernels::dropout::mix;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Factor, LoraConfig};
use crate::svd::Singular;
use crate::{Model, ModelError};

/// How a new adapter starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// A uniform, B zero: PEFT's default.
    #[default]
    Kaiming,
    /// A normal, B zero: PEFT's `gaussian`.
    Gaussian,
    /// `scale · B·A` is the best approximation of the weight, from which it is taken away (Meng et
    /// al., 2024, arXiv:2404.02948): PEFT's `pissa`.
    Pissa,
    /// Adapted weights become NF4, and `scale · B·A` is the best approximation of what they lose:
    /// PEFT's `loftq`. See [`Model::start_loftq`].
    Loftq,
}

impl Adapter {
    /// A fresh adapter: A uniform in `±1/sqrt(in)` (PEFT's default, kaiming-uniform with a = √5), B
    /// zero. Numbers are a function of `seed`, the factor's name and the element's index.
    ///
    /// # Errors
    /// As [`Adapter::zeros`].
    pub fn fresh(model: &ModelConfig, config: &LoraConfig, seed: u64) -> Result<Self, ModelError> {
        Self::random(model, config, seed, |factor, key| {
            let bound = 1.0 / (factor.inputs as f64).sqrt();
            (2.0 * unit(key) - 1.0) * bound
        })
    }

    /// As [`Adapter::fresh`], but A is normal with standard deviation `1/r` (PEFT's `gaussian`).
    ///
    /// # Errors
    /// As [`Adapter::zeros`].
    pub fn gaussian(
        model: &ModelConfig,
        config: &LoraConfig,
        seed: u64,
    ) -> Result<Self, ModelError> {
        let deviation = 1.0 / config.r as f64;
        Self::random(model, config, seed, |_, key| normal(key) * deviation)
    }

    /// The singular vectors of the `r` greatest singular values of each weight: `scale · B·A` is the
    /// weight's best approximation of that rank. What is trained on is the rest: see
    /// [`Model::subtract`].
    ///
    /// # Errors
    /// As [`Adapter::zeros`].
    pub fn pissa(model: &Model, config: &LoraConfig) -> Result<Self, ModelError> {
        let mut adapter = Self::zeros(model.config(), config)?;
        let pinned = model.pin();
        adapter.approximate(1.0 / f64::from(config.scale()), |_, factor| {
            pinned.layers[factor.layer].projection(factor.projection).weight.values()
        });
        Ok(adapter)
    }

    /// Sets every `B·A` to `part` times the best approximation of `target [out, in]`, which is given
    /// the factor and its index.
    pub(crate) fn approximate<'a>(
        &mut self,
        part: f64,
        target: impl Fn(usize, &Factor) -> Cow<'a, [f32]> + Sync,
    ) {
        let r = self.config.r;
        let best = |(index, factor): (usize, &Factor)| {
            Singular::top(&target(index, factor), factor.inputs, r).factors(r, part)
        };
        let pairs: Vec<[Vec<f32>; 2]> = self.factors.par_iter().enumerate().map(best).collect();
        for (factor, [a, b]) in self.factors.iter().zip(pairs) {
            self.values[factor.a.clone()].copy_from_slice(&a);
            self.values[factor.b.clone()].copy_from_slice(&b);
        }
    }

    /// B zero and every element of A as `value` gives it for the factor and the element's key.
    fn random(
        model: &ModelConfig,
        config: &LoraConfig,
        seed: u64,
        value: impl Fn(&Factor, u64) -> f64,
    ) -> Result<Self, ModelError> {
        let mut adapter = Self::zeros(model, config)?;
        for factor in &adapter.factors {
            let name = factor.name.bytes().fold(mix(seed), |key, b| mix(key ^ u64::from(b)));
            for (i, element) in adapter.values[factor.a.clone()].iter_mut().enumerate() {
                *element = value(factor, name ^ mix(i as u64)) as f32;
            }
        }
        Ok(adapter)
    }
}

/// Uniform in `[0, 1)`.
fn unit(key: u64) -> f64 {
    (mix(key) >> 11) as f64 / 2f64.powi(53)
}

/// Standard normal (Box and Muller, 1958).
fn normal(key: u64) -> f64 {
    let (radius, angle) = (1.0 - unit(key), unit(mix(key)));
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_a_normal() {
        let numbers: Vec<f64> = (0..200_000).map(|i| normal(mix(i))).collect();
        let moment =
            |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / numbers.len() as f64;
        for (power, expected, tolerance) in [(1, 0.0, 0.01), (2, 1.0, 0.02), (4, 3.0, 0.1)] {
            assert!((moment(power) - expected).abs() < tolerance, "{power}: {}", moment(power));
        }
        let beyond = numbers.iter().filter(|x| x.abs() > 1.959_964).count() as f64;
        assert!((beyond / numbers.len() as f64 - 0.05).abs() < 0.003, "{beyond}");
    }
}
