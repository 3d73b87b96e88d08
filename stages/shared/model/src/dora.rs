//! DoRA (Liu et al., 2024, arXiv:2402.09353): every output feature has a magnitude of its own.
//!
//! `y = g ⊙ (x·Wᵀ + u·Bᵀ) + bias` with `g = m / ‖W + scale·B·A‖`, the norm being that of a row. As
//! in PEFT the norm is a constant of the backward pass.

use rayon::prelude::*;

use crate::adapter::{Adapter, Factor};
use crate::decoder::Pinned;
use crate::linear::Frozen;
use crate::{Model, ModelError};

/// Rows of a weight whose sum with the adapter exists at once.
const ROWS: usize = 64;

/// What one adapted projection multiplies its outputs by.
pub(crate) struct Gain {
    /// `‖W + scale·B·A‖` of each row `[out]`.
    pub(crate) norms: Vec<f32>,
    /// `m / norms [out]`; 0 where the norm is.
    pub(crate) gains: Vec<f32>,
}

impl Gain {
    /// The gain of every factor in order; none without DoRA.
    pub(crate) fn of(adapter: &Adapter, pinned: &Pinned) -> Vec<Self> {
        if !adapter.config.use_dora {
            return Vec::new();
        }
        let gain = |factor: &Factor| {
            let norms = norms(adapter, factor, frozen(pinned, factor));
            let magnitudes = &adapter.values[factor.magnitude.clone()];
            let gains = magnitudes.iter().zip(&norms);
            let gains = gains.map(|(m, norm)| if *norm > 0.0 { m / norm } else { 0.0 });
            Self { gains: gains.collect(), norms }
        };
        adapter.factors.iter().map(gain).collect()
    }

    /// `y *= g`, row by row.
    pub(crate) fn apply(&self, y: &mut [f32]) {
        for row in y.chunks_exact_mut(self.gains.len()) {
            row.iter_mut().zip(&self.gains).for_each(|(y, g)| *y *= g);
        }
    }

    /// Adds to `dm [out]` the gradient of the magnitudes, for the outputs `z` before the gain.
    pub(crate) fn magnitude_gradient(&self, z: &[f32], dy: &[f32], dm: &mut [f32]) {
        let outputs = self.norms.len();
        let mut sums = vec![0.0f64; outputs];
        for (z, dy) in z.chunks_exact(outputs).zip(dy.chunks_exact(outputs)) {
            for ((sum, z), dy) in sums.iter_mut().zip(z).zip(dy) {
                *sum += f64::from(z * dy);
            }
        }
        for ((dm, sum), norm) in dm.iter_mut().zip(sums).zip(&self.norms) {
            if *norm > 0.0 {
                *dm += (sum / f64::from(*norm)) as f32;
            }
        }
    }
}

impl Adapter {
    /// Sets the magnitudes to the norms that the rows of `W + scale·B·A` have, so that DoRA changes
    /// nothing yet.
    ///
    /// # Errors
    /// [`ModelError::Input`] where the adapter has none.
    pub fn set_magnitudes(&mut self, model: &Model) -> Result<(), ModelError> {
        if !self.config.use_dora {
            return Err(ModelError::Input("an adapter without DoRA has no magnitudes".to_owned()));
        }
        let pinned = model.pin();
        for index in 0..self.factors.len() {
            let factor = &self.factors[index];
            let norms = norms(self, factor, frozen(&pinned, factor));
            self.values[factor.magnitude.clone()].copy_from_slice(&norms);
        }
        Ok(())
    }
}

fn frozen<'a>(pinned: &'a Pinned, factor: &Factor) -> Frozen<'a> {
    pinned.layers[factor.layer].projection(factor.projection)
}

/// `‖W + scale·B·A‖` of each row.
fn norms(adapter: &Adapter, factor: &Factor, frozen: Frozen<'_>) -> Vec<f32> {
    let inputs = factor.inputs;
    let mut norms = vec![0.0; factor.outputs];
    norms.par_chunks_mut(ROWS).enumerate().for_each(|(block, norms)| {
        let rows = block * ROWS..block * ROWS + norms.len();
        let mut sum = frozen.weight.rows(rows.clone(), inputs);
        adapter.add_product(factor, rows, adapter.scale(), &mut sum);
        for (norm, row) in norms.iter_mut().zip(sum.chunks_exact(inputs)) {
            let square: f64 = row.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
            *norm = square.sqrt() as f32;
        }
    });
    norms
}
