//! LoftQ (Li et al., 2023, arXiv:2310.08659): an adapter that starts as what four bits lose.
//!
//! The weights that are adapted become NF4, and training starts from the best approximation of the
//! difference. The quantised weights are a function of the whole ones, so that an adapter that says
//! how it started means the same wherever it is loaded onto them: here as in PEFT.

use std::borrow::Cow;

use checkpoint::{FloatType, Nf4, StoredMatrix};
use kernels::elementwise;
use kernels::gemm::{Into, View, gemm};
use rayon::prelude::*;

use crate::adapter::{Adapter, Factor, LoraConfig};
use crate::matrix::Matrix;
use crate::svd::Singular;
use crate::{Model, ModelError};

/// bitsandbytes' default, which PEFT's LoftQ takes.
const BLOCK: usize = 64;

/// The weight `values [out, in]` in NF4, chosen beside a factor of rank `r`: what is quantised is,
/// in every iteration but the first, the weight less the approximation of the last one's rest.
///
/// # Errors
/// [`ModelError::Input`] for values that are not finite.
pub fn loftq_weight(
    values: &[f32],
    [outputs, inputs]: [usize; 2],
    r: usize,
    iterations: u32,
) -> Result<Nf4, ModelError> {
    let nf4 = |values: &[f32]| {
        Nf4::quantise(values, [outputs, inputs], BLOCK, FloatType::F32, None)
            .map_err(|e| ModelError::Input(format!("LoftQ: {e}")))
    };
    let mut quantised = nf4(values)?;
    for _ in 1..iterations {
        let [a, b] = Singular::top(&rest(values, &quantised), inputs, r).factors(r, 1.0);
        let minus: Vec<f32> = b.iter().map(|b| -b).collect();
        let mut target = values.to_vec();
        let (a, b) = (View::rows(&a, inputs), View::rows(&minus, r));
        gemm(outputs, inputs, r, b, a, &mut target, inputs, Into::Accumulate);
        quantised = nf4(&target)?;
    }
    Ok(quantised)
}

/// What is lost.
fn rest(values: &[f32], quantised: &Nf4) -> Vec<f32> {
    let mut rest = quantised.decode();
    elementwise::scale(&mut rest, -1.0);
    elementwise::add_assign(&mut rest, values);
    rest
}

impl Model {
    /// Quantises the weights that `config` adapts, in `iterations` of LoftQ, and returns the adapter
    /// that makes up for it. Its `B·A` is divided by the scale, which PEFT leaves out: there LoftQ
    /// starts where the model is only with an `alpha` of `r`.
    ///
    /// # Errors
    /// As [`Adapter::zeros`]; also for weights that have four bits already.
    pub fn start_loftq(
        &mut self,
        config: &LoraConfig,
        iterations: u32,
    ) -> Result<Adapter, ModelError> {
        let config = LoraConfig { loftq_iter: Some(iterations), ..config.clone() };
        let mut adapter = Adapter::zeros(&self.config, &config)?;
        let quantised = self.loftq_weights(&adapter, iterations)?;
        let pinned = self.pin();
        adapter.approximate(1.0 / f64::from(config.scale()), |index, factor| {
            let weight = pinned.layers[factor.layer].projection(factor.projection).weight;
            Cow::Owned(rest(&weight.values(), &quantised[index]))
        });
        drop(pinned);
        self.replace(&adapter, quantised);
        Ok(adapter)
    }

    /// Quantises the weights that `adapter` was trained beside, where LoftQ quantised them.
    pub(crate) fn follow_loftq(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        if let Some(iterations) = adapter.config.loftq_iter {
            let quantised = self.loftq_weights(adapter, iterations)?;
            self.replace(adapter, quantised);
        }
        Ok(())
    }

    /// The quantised weight of every factor.
    fn loftq_weights(&self, adapter: &Adapter, iterations: u32) -> Result<Vec<Nf4>, ModelError> {
        let has_four_bits = |factor: &&Factor| {
            let matrix = &self.layers[factor.layer].projections[factor.projection];
            matches!(matrix, Matrix::Stored(stored) if stored.is_nf4())
        };
        if let Some(factor) = adapter.factors.iter().find(has_four_bits) {
            let name = &factor.name;
            return Err(ModelError::Input(format!(
                "LoftQ starts from whole weights, and `{name}` has four bits already"
            )));
        }
        let pinned = self.pin();
        let weight = |factor: &Factor| {
            let weight = pinned.layers[factor.layer].projection(factor.projection).weight;
            let shape = [factor.outputs, factor.inputs];
            loftq_weight(&weight.values(), shape, adapter.config.r, iterations)
        };
        adapter.factors.par_iter().map(weight).collect()
    }

    fn replace(&mut self, adapter: &Adapter, quantised: Vec<Nf4>) {
        for (factor, nf4) in adapter.factors.iter().zip(quantised) {
            let matrix = Matrix::stored(StoredMatrix::Nf4(nf4), true);
            self.layers[factor.layer].projections[factor.projection] = matrix;
        }
        self.packed.take();
    }
}
