//! Adapters that are trained on what is left of the weights (PiSSA).

use std::ops::Range;

use kernels::gemm::{Into, View, gemm};

use crate::adapter::{Adapter, Factor, LoraConfig};
use crate::{Matrix, Model, ModelError};

impl Model {
    /// Takes `scale · B·A` away from every adapted weight.
    pub fn subtract(&mut self, adapter: &Adapter) {
        for factor in &adapter.factors {
            let pinned = self.pin();
            let frozen = pinned.layers[factor.layer].projection(factor.projection);
            let mut rest = frozen.weight.values().into_owned();
            adapter.add_product(factor, 0..factor.outputs, -adapter.scale(), &mut rest);
            let shape = [factor.outputs, factor.inputs];
            self.layers[factor.layer].projections[factor.projection] = Matrix::full(rest, shape);
        }
        self.packed.take();
    }
}

impl Adapter {
    /// Adds the given rows of `scale · B·A` to `sum [rows, in]`.
    pub(crate) fn add_product(
        &self,
        factor: &Factor,
        rows: Range<usize>,
        scale: f32,
        sum: &mut [f32],
    ) {
        let r = self.config.r;
        let (first, count) = (factor.b.start + rows.start * r, rows.len());
        let a = View::rows(&self.values[factor.a.clone()], factor.inputs);
        let b: Vec<f32> = self.values[first..first + count * r].iter().map(|b| scale * b).collect();
        let b = View::rows(&b, r);
        gemm(count, factor.inputs, r, b, a, sum, factor.inputs, Into::Accumulate);
    }

    /// The adapter of twice the rank that does to the whole weights what this one does to them less
    /// `start`: `[A; A₀]` and `[B, -B₀]`, as PEFT's `subtract_mutated_init`.
    ///
    /// # Errors
    /// [`ModelError::Input`] where the two differ in shape.
    pub fn relative_to(&self, start: &Self, model: &Model) -> Result<Self, ModelError> {
        if self.config.use_dora {
            return Err(ModelError::Input("DoRA is no sum of a start and a change".to_owned()));
        }
        if self.config != start.config || self.values.len() != start.values.len() {
            return Err(ModelError::Input("an adapter and its start differ in shape".to_owned()));
        }
        let r = self.config.r;
        // The scale stays what it was.
        let more = if self.config.use_rslora { 2f32.sqrt() } else { 2.0 };
        let alpha = self.config.alpha * more;
        let config = LoraConfig { r: 2 * r, alpha, ..self.config.clone() };
        let mut wide = Self::zeros(model.config(), &config)?;
        for (to, from) in wide.factors.iter().zip(&self.factors) {
            let (own, begun) = wide.values[to.a.clone()].split_at_mut(r * from.inputs);
            own.copy_from_slice(&self.values[from.a.clone()]);
            begun.copy_from_slice(&start.values[from.a.clone()]);
            let rows = wide.values[to.b.clone()].chunks_exact_mut(2 * r);
            let own = self.values[from.b.clone()].chunks_exact(r);
            let begun = start.values[from.b.clone()].chunks_exact(r);
            for ((row, own), begun) in rows.zip(own).zip(begun) {
                row[..r].copy_from_slice(own);
                row[r..].iter_mut().zip(begun).for_each(|(to, from)| *to = -from);
            }
        }
        Ok(wide)
    }
}
