//! Adds an adapter to the weights that it was trained on.

use rayon::prelude::*;

use crate::adapter::{Adapter, Factor};

impl Adapter {
    /// The factors of the linear layer `module`, such as `model.layers.0.self_attn.q_proj`, where
    /// it is adapted.
    pub fn factor(&self, module: &str) -> Option<&Factor> {
        self.factors.iter().find(|f| f.name == module)
    }

    /// Adds `scale · B·A` to `weight [out, in]`, row-major, as PEFT's `merge_and_unload` does: the
    /// products of a row in the order of the ranks, in f32.
    ///
    /// # Panics
    /// Where `weight` is not of the factor's shape.
    pub fn merge(&self, factor: &Factor, weight: &mut [f32]) {
        assert_eq!(weight.len(), factor.outputs * factor.inputs, "length of the weight");
        let (r, scale) = (self.config.r, self.scale());
        let (a, b) = (&self.values[factor.a.clone()], &self.values[factor.b.clone()]);
        weight.par_chunks_mut(factor.inputs).zip(b.par_chunks(r)).for_each(|(row, b)| {
            let mut delta = vec![0.0_f32; row.len()];
            for (b, a) in b.iter().zip(a.chunks_exact(factor.inputs)) {
                delta.iter_mut().zip(a).for_each(|(d, a)| *d += b * a);
            }
            row.iter_mut().zip(delta).for_each(|(w, d)| *w += scale * d);
        });
    }
}
