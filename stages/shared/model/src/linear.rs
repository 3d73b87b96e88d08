//! One frozen projection with its adapter, forward and backward.
//!
//! With `u = scale · x·Aᵀ`: `y = x·Wᵀ + bias + u·Bᵀ`, `dB += dyᵀ·u`, `du = scale · dy·B`,
//! `dA += duᵀ·x`, `dx += dy·W + du·A`. W is never merged with the adapter.

use std::ops::Range;

use kernels::gemm::{Into, Term, View, gemm, gemm_chain};
use kernels::{dropout::dropout, elementwise};

use crate::adapter::{Adapter, Factor};
use crate::dora::Gain;
use crate::matrix::MatrixView;

/// A frozen weight `[outputs, inputs]` and bias `[outputs]` in memory.
#[derive(Clone, Copy)]
pub(crate) struct Frozen<'a> {
    pub(crate) weight: MatrixView<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

impl Frozen<'_> {
    /// `y = x·Wᵀ + bias + low_rank`, the last being a product of the adapter.
    pub(crate) fn forward(&self, x: &[f32], low_rank: Option<Term<'_>>, y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        let weight = self.weight.values();
        let w = View::transposed(&weight, self.inputs);
        let own = Term { k: self.inputs, a: View::rows(x, self.inputs), b: w };
        let n = self.outputs;
        match (low_rank, self.bias) {
            (Some(low_rank), None) => gemm_chain(rows, n, &[own, low_rank], y, n, Into::Overwrite),
            (low_rank, bias) => {
                gemm_chain(rows, n, &[own], y, n, Into::Overwrite);
                add_bias(bias, y);
                gemm_chain(rows, n, low_rank.as_slice(), y, n, Into::Accumulate);
            }
        }
    }

    /// The same weight without its bias.
    pub(crate) fn without_bias(self) -> Self {
        Self { bias: None, ..self }
    }

    /// The product of `dx = dy·W`, for the values of the weight.
    pub(crate) fn backward<'b>(&self, weight: &'b [f32], dy: &'b [f32]) -> Term<'b> {
        let b = View::rows(weight, self.inputs);
        Term { k: self.outputs, a: View::rows(dy, self.outputs), b }
    }
}

/// Adds a bias to every row of `y`.
pub(crate) fn add_bias(bias: Option<&[f32]>, y: &mut [f32]) {
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}

/// The adapter of the projections that share one input: `u = scale · dropout(x)·A_allᵀ`.
pub(crate) struct Branch<'a> {
    adapter: &'a Adapter,
    factors: &'a [Factor],
    /// Of each factor with DoRA, else empty.
    gains: &'a [Gain],
    /// Key of the dropout mask, where there is dropout.
    key: Option<u64>,
}

impl<'a> Branch<'a> {
    pub(crate) fn new(
        adapter: &'a Adapter,
        gains: &'a [Gain],
        layer: usize,
        group: usize,
        key: Option<u64>,
    ) -> Self {
        let key = key.filter(|_| adapter.config.dropout > 0.0);
        let members = adapter.group(layer, group);
        let gains = gains.get(members.clone()).unwrap_or_default();
        Self { adapter, factors: &adapter.factors[members], gains, key }
    }

    /// Columns of `u`: the rank times the adapted projections of the group.
    pub(crate) fn width(&self) -> usize {
        self.factors.len() * self.adapter.config.r
    }

    /// The A factors of the group, side by side.
    fn a_range(&self) -> Range<usize> {
        match (self.factors.first(), self.factors.last()) {
            (Some(first), Some(last)) => first.a.start..last.a.end,
            _ => 0..0,
        }
    }

    /// `u [rows, width]` for the group's input `x [rows, inputs]`.
    pub(crate) fn down(&self, x: &[f32]) -> Vec<f32> {
        let Some(first) = self.factors.first() else { return Vec::new() };
        let (inputs, width) = (first.inputs, self.width());
        let rows = x.len() / inputs;
        let mut u = vec![0.0; rows * width];
        let a = View::transposed(&self.adapter.values[self.a_range()], inputs);
        let dropped = self.dropped(x);
        let x = View::rows(dropped.as_deref().unwrap_or(x), inputs);
        gemm(rows, width, inputs, x, a, &mut u, width, Into::Overwrite);
        elementwise::scale(&mut u, self.adapter.scale());
        u
    }

    /// `y` of the projection of that index, adapted or not.
    pub(crate) fn forward(
        &self,
        projection: usize,
        frozen: Frozen<'_>,
        x: &[f32],
        u: &[f32],
        y: &mut [f32],
    ) {
        let up = self.up(projection, u);
        let Some(gain) = self.gain(projection) else { return frozen.forward(x, up, y) };
        frozen.without_bias().forward(x, up, y);
        gain.apply(y);
        add_bias(frozen.bias, y);
    }

    /// With DoRA, adds to the gradient of the magnitudes and returns `dy` behind the gain.
    pub(crate) fn gain_backward(
        &self,
        projection: usize,
        frozen: Frozen<'_>,
        (x, u): (&[f32], &[f32]),
        dy: &[f32],
        grad: &mut [f32],
    ) -> Option<Vec<f32>> {
        let (gain, (_, factor)) = (self.gain(projection)?, self.member(projection)?);
        let mut z = vec![0.0; dy.len()];
        frozen.without_bias().forward(x, self.up(projection, u), &mut z);
        gain.magnitude_gradient(&z, dy, &mut grad[factor.magnitude.clone()]);
        let mut dz = dy.to_vec();
        gain.apply(&mut dz);
        Some(dz)
    }

    fn gain(&self, projection: usize) -> Option<&Gain> {
        self.gains.get(self.member(projection)?.0)
    }

    /// The product of `y += u·Bᵀ` for the projection of that index, where it is adapted.
    fn up<'b>(&'b self, projection: usize, u: &'b [f32]) -> Option<Term<'b>> {
        let (member, factor) = self.member(projection)?;
        let (r, width) = (self.adapter.config.r, self.width());
        let b = View::transposed(&self.adapter.values[factor.b.clone()], r);
        Some(Term { k: r, a: View::rows(&u[member * r..], width), b })
    }

    /// Adds `dyᵀ·u` to the gradient of B and writes `scale · dy·B` into the projection's columns of
    /// `du`.
    pub(crate) fn up_backward(
        &self,
        projection: usize,
        u: &[f32],
        dy: &[f32],
        du: &mut [f32],
        grad: &mut [f32],
    ) {
        let Some((member, factor)) = self.member(projection) else { return };
        let (r, width, outputs) = (self.adapter.config.r, self.width(), factor.outputs);
        let rows = u.len() / width;
        let u = View::rows(&u[member * r..], width);
        let db = &mut grad[factor.b.clone()];
        gemm(outputs, r, rows, View::transposed(dy, outputs), u, db, r, Into::Accumulate);
        let b = View::rows(&self.adapter.values[factor.b.clone()], r);
        let columns = &mut du[member * r..];
        gemm(rows, r, outputs, View::rows(dy, outputs), b, columns, width, Into::Overwrite);
    }

    /// Scales `du` and adds `duᵀ·x` to the gradient of the A factors.
    pub(crate) fn down_backward(&self, x: &[f32], du: &mut [f32], grad: &mut [f32]) {
        let Some(first) = self.factors.first() else { return };
        let (inputs, width) = (first.inputs, self.width());
        let rows = x.len() / inputs;
        elementwise::scale(du, self.adapter.scale());
        let dropped = self.dropped(x);
        let source = View::rows(dropped.as_deref().unwrap_or(x), inputs);
        let da = &mut grad[self.a_range()];
        gemm(
            width,
            inputs,
            rows,
            View::transposed(du, width),
            source,
            da,
            inputs,
            Into::Accumulate,
        );
    }

    /// The product of `dx += du·A`, `du` being scaled; none where dropout comes between.
    pub(crate) fn down_gradient<'b>(&'b self, du: &'b [f32]) -> Option<Term<'b>> {
        let first = self.factors.first().filter(|_| self.key.is_none())?;
        let a = View::rows(&self.adapter.values[self.a_range()], first.inputs);
        Some(Term { k: self.width(), a: View::rows(du, self.width()), b: a })
    }

    /// Adds `dropout(du·A)` to `dx` where there is dropout.
    pub(crate) fn add_dropped_gradient(&self, du: &[f32], dx: &mut [f32]) {
        let (Some(first), Some(key)) = (self.factors.first(), self.key) else { return };
        let (inputs, width) = (first.inputs, self.width());
        let a = View::rows(&self.adapter.values[self.a_range()], inputs);
        let (du, mut part) = (View::rows(du, width), vec![0.0; dx.len()]);
        gemm(dx.len() / inputs, inputs, width, du, a, &mut part, inputs, Into::Overwrite);
        dropout(&mut part, self.adapter.config.dropout, key);
        elementwise::add_assign(dx, &part);
    }

    fn dropped(&self, x: &[f32]) -> Option<Vec<f32>> {
        let key = self.key?;
        let mut x = x.to_vec();
        dropout(&mut x, self.adapter.config.dropout, key);
        Some(x)
    }

    fn member(&self, projection: usize) -> Option<(usize, &Factor)> {
        self.factors.iter().enumerate().find(|(_, f)| f.projection == projection)
    }
}
