//! Adds an adapter to the weights that it was trained on.

use kernels::elementwise;
use rayon::prelude::*;

use crate::adapter::{Adapter, Factor};
use crate::{ModelError, loftq_weight};

/// Rows that one thread merges at a time.
const ROWS: usize = 64;

impl Adapter {
    /// The factors of the linear layer `module`, such as `model.layers.0.self_attn.q_proj`, where
    /// it is adapted.
    pub fn factor(&self, module: &str) -> Option<&Factor> {
        self.factors.iter().find(|f| f.name == module)
    }

    /// Adds `scale · B·A` to `weight [out, in]`, row-major, and with DoRA brings every row to its
    /// magnitude: what PEFT's `merge_and_unload` does. Where LoftQ started the adapter, `weight` is
    /// the whole one, and is quantised first.
    ///
    /// # Errors
    /// [`ModelError::Input`] for values that LoftQ cannot quantise.
    ///
    /// # Panics
    /// Where `weight` is not of the factor's shape.
    pub fn merge(&self, factor: &Factor, weight: &mut [f32]) -> Result<(), ModelError> {
        let (inputs, outputs) = (factor.inputs, factor.outputs);
        assert_eq!(weight.len(), outputs * inputs, "length of the weight");
        if let Some(iterations) = self.config.loftq_iter {
            let quantised = loftq_weight(weight, [outputs, inputs], self.config.r, iterations)?;
            quantised.decode_rows(0..outputs, weight);
        }
        let magnitudes = &self.values[factor.magnitude.clone()];
        weight.par_chunks_mut(ROWS * inputs).enumerate().for_each(|(block, weight)| {
            let first = block * ROWS;
            let rows = first..first + weight.len() / inputs;
            // Apart first, as PEFT does: every sum onto the weight itself would round it again.
            let mut delta = vec![0.0; weight.len()];
            self.add_product(factor, rows.clone(), self.scale(), &mut delta);
            elementwise::add_assign(weight, &delta);
            if !self.config.use_dora {
                return;
            }
            for (row, magnitude) in weight.chunks_exact_mut(inputs).zip(&magnitudes[rows]) {
                let square: f64 = row.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
                let norm = square.sqrt() as f32;
                let gain = if norm > 0.0 { magnitude / norm } else { 0.0 };
                elementwise::scale(row, gain);
            }
        });
        Ok(())
    }
}
