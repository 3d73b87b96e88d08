//! One decoder layer on the CPU kernels, forward and backward, over packed segments.

use std::borrow::Cow;

use checkpoint::{Activation, ModelConfig};
use kernels::attention::{self, Saved, Shape};
use kernels::gemm::{Into, Term, gemm_chain};
use kernels::rope::RopeTable;
use kernels::{elementwise, norm};

use crate::adapter::{Adapter, DropoutKey, GROUPS};
use crate::decoder::{Memory, PinnedLayer};
use crate::dora::Gain;
use crate::linear::{Branch, Frozen};

/// What all layers of one pass share.
pub(crate) struct Pass<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) rope: &'a RopeTable,
    pub(crate) adapter: Option<&'a Adapter>,
    /// Of every factor with DoRA, else empty.
    pub(crate) gains: Vec<Gain>,
    pub(crate) dropout: Option<DropoutKey>,
    pub(crate) cu_seqlens: &'a [i32],
    pub(crate) positions: Vec<u32>,
}

/// What the backward pass needs of one layer; norms and the activation are computed again.
pub(crate) struct LayerState {
    /// Residual stream before the layer `[n, hidden]`.
    input: Vec<f32>,
    pub(crate) q: Vec<f32>,
    /// Rotated keys `[n, kv_heads * d]`.
    pub(crate) k: Vec<f32>,
    /// Values `[n, kv_heads * d]`.
    pub(crate) v: Vec<f32>,
    attended: Vec<f32>,
    lse: Vec<f32>,
    /// Outputs of attention and of the feed-forward block before their norms, where they have one.
    outputs: [Vec<f32>; 2],
    /// Residual stream between the two blocks.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Low-rank activations of the four groups.
    low_rank: [Vec<f32>; 4],
}

impl Pass<'_> {
    /// Positions restart at every segment.
    pub(crate) fn positions_of(cu_seqlens: &[i32]) -> Vec<u32> {
        cu_seqlens.windows(2).flat_map(|w| 0..(w[1] - w[0]) as u32).collect()
    }

    fn branch(&self, layer: usize, group: usize) -> Option<Branch<'_>> {
        let key = self.dropout.map(|key| key.of(layer, group));
        self.adapter.map(|adapter| Branch::new(adapter, &self.gains, layer, group, key))
    }

    /// Runs the projections of one group on `x`; returns their outputs and the low-rank activation.
    fn project(
        &self,
        weights: &PinnedLayer,
        layer: usize,
        group: usize,
        x: &[f32],
    ) -> (Vec<Vec<f32>>, Vec<f32>) {
        let branch = self.branch(layer, group);
        let low_rank = branch.as_ref().map(|b| b.down(x)).unwrap_or_default();
        let outputs = GROUPS[group]
            .iter()
            .map(|&projection| {
                let frozen = weights.projection(projection);
                let mut y = vec![0.0; x.len() / frozen.inputs * frozen.outputs];
                match &branch {
                    Some(branch) => branch.forward(projection, frozen, x, &low_rank, &mut y),
                    None => frozen.forward(x, None, &mut y),
                }
                y
            })
            .collect();
        (outputs, low_rank)
    }

    /// Gradient of [`Pass::project`]: adds to `grad`, and overwrites `dx` where it is wanted.
    fn project_backward(
        &self,
        weights: &PinnedLayer,
        (layer, group): (usize, usize),
        (x, low_rank): (&[f32], &[f32]),
        dy: &[&[f32]],
        dx: Option<&mut [f32]>,
        grad: &mut [f32],
    ) {
        let branch = self.branch(layer, group);
        let behind_gains: Vec<Option<Vec<f32>>> = GROUPS[group]
            .iter()
            .zip(dy)
            .map(|(&projection, dy)| {
                let frozen = weights.projection(projection);
                branch.as_ref()?.gain_backward(projection, frozen, (x, low_rank), dy, grad)
            })
            .collect();
        let dy: Vec<&[f32]> =
            behind_gains.iter().zip(dy).map(|(dz, dy)| dz.as_deref().unwrap_or(dy)).collect();
        let mut du = vec![0.0; low_rank.len()];
        if let Some(branch) = &branch {
            for (&projection, dy) in GROUPS[group].iter().zip(&dy) {
                branch.up_backward(projection, low_rank, dy, &mut du, grad);
            }
            branch.down_backward(x, &mut du, grad);
        }
        let Some(dx) = dx else { return };
        let frozen: Vec<Frozen<'_>> =
            GROUPS[group].iter().map(|&projection| weights.projection(projection)).collect();
        let inputs = frozen[0].inputs;
        let values: Vec<Cow<'_, [f32]>> = frozen.iter().map(|f| f.weight.values()).collect();
        let weights = frozen.iter().zip(&values).zip(&dy);
        let mut terms: Vec<Term<'_>> =
            weights.map(|((frozen, weight), dy)| frozen.backward(weight, dy)).collect();
        terms.extend(branch.as_ref().and_then(|b| b.down_gradient(&du)));
        gemm_chain(dx.len() / inputs, inputs, &terms, dx, inputs, Into::Overwrite);
        if let Some(branch) = &branch {
            branch.add_dropped_gradient(&du, dx);
        }
    }

    /// Runs layer `index` on the residual stream `x [n, hidden]`.
    pub(crate) fn layer(
        &self,
        weights: &PinnedLayer,
        index: usize,
        x: Vec<f32>,
    ) -> (Vec<f32>, LayerState) {
        let eps = self.config.rms_norm_eps;
        let n = self.positions.len();
        let mut normed = vec![0.0; x.len()];
        norm::rms_norm(&x, weights.input_norm.slice(), eps, &mut normed);
        let (mut qkv, low_qkv) = self.project(weights, index, 0, &normed);
        let (v, mut k, mut q) = (pop(&mut qkv), pop(&mut qkv), pop(&mut qkv));
        self.rope.rotate(&mut q, &self.positions, false);
        self.rope.rotate(&mut k, &self.positions, false);
        let mut attended = vec![0.0; q.len()];
        let mut lse = vec![0.0; n * self.config.num_attention_heads];
        let shape = attention_shape(self.config, index);
        attention::forward(shape, &q, &k, &v, self.cu_seqlens, &mut attended, &mut lse);
        let (mut o, low_o) = self.project(weights, index, 1, &attended);
        let (mut middle, attention_output) =
            normalise_output(pop(&mut o), weights.attention_output_norm.as_ref(), eps);
        elementwise::add_assign(&mut middle, &x);
        norm::rms_norm(&middle, weights.feed_forward_norm.slice(), eps, &mut normed);
        let (mut gate_up, low_gate) = self.project(weights, index, 2, &normed);
        let (up, gate) = (pop(&mut gate_up), pop(&mut gate_up));
        let mut activated = vec![0.0; gate.len()];
        activate(self.config, &gate, &up, &mut activated);
        let (mut down, low_down) = self.project(weights, index, 3, &activated);
        let (mut out, feed_forward_output) =
            normalise_output(pop(&mut down), weights.feed_forward_output_norm.as_ref(), eps);
        elementwise::add_assign(&mut out, &middle);
        let low_rank = [low_qkv, low_o, low_gate, low_down];
        let outputs = [attention_output, feed_forward_output];
        let state =
            LayerState { input: x, q, k, v, attended, lse, outputs, middle, gate, up, low_rank };
        (out, state)
    }

    /// Turns `dx`, the gradient of the layer's output, into that of its input (left alone for layer
    /// 0, where nothing needs it) and adds the adapter's gradients to `grad`.
    pub(crate) fn layer_backward(
        &self,
        weights: &PinnedLayer,
        index: usize,
        state: LayerState,
        dx: &mut [f32],
        grad: &mut [f32],
    ) {
        self.feed_forward_backward(weights, index, &state, dx, grad);
        let eps = self.config.rms_norm_eps;
        let mut dattended = vec![0.0; state.attended.len()];
        let low = (&state.attended[..], &state.low_rank[1][..]);
        let output_norm = weights.attention_output_norm.as_ref();
        let doutput = output_gradient(&state.outputs[0], output_norm, eps, dx);
        self.project_backward(weights, (index, 1), low, &[&doutput], Some(&mut dattended), grad);
        drop(doutput);
        let (mut dq, mut dk) = (vec![0.0; state.q.len()], vec![0.0; state.k.len()]);
        let mut dv = vec![0.0; state.v.len()];
        let LayerState { q, k, v, attended: out, lse, .. } = &state;
        let saved = Saved { q, k, v, out, lse };
        let shape = attention_shape(self.config, index);
        attention::backward(shape, saved, self.cu_seqlens, &dattended, &mut dq, &mut dk, &mut dv);
        self.rope.rotate(&mut dq, &self.positions, true);
        self.rope.rotate(&mut dk, &self.positions, true);
        let weight = weights.input_norm.slice();
        let mut normed = vec![0.0; state.input.len()];
        norm::rms_norm(&state.input, weight, eps, &mut normed);
        let low = (&normed[..], &state.low_rank[0][..]);
        let dy: [&[f32]; 3] = [&dq, &dk, &dv];
        if index == 0 {
            self.project_backward(weights, (0, 0), low, &dy, None, grad);
            return;
        }
        let mut dnormed = vec![0.0; normed.len()];
        self.project_backward(weights, (index, 0), low, &dy, Some(&mut dnormed), grad);
        norm::rms_norm_backward(&state.input, weight, eps, &dnormed, dx);
    }

    fn feed_forward_backward(
        &self,
        weights: &PinnedLayer,
        index: usize,
        state: &LayerState,
        dx: &mut [f32],
        grad: &mut [f32],
    ) {
        let eps = self.config.rms_norm_eps;
        let mut activated = vec![0.0; state.gate.len()];
        activate(self.config, &state.gate, &state.up, &mut activated);
        let mut dactivated = vec![0.0; activated.len()];
        let low = (&activated[..], &state.low_rank[3][..]);
        let output_norm = weights.feed_forward_output_norm.as_ref();
        let doutput = output_gradient(&state.outputs[1], output_norm, eps, dx);
        self.project_backward(weights, (index, 3), low, &[&doutput], Some(&mut dactivated), grad);
        drop(doutput);
        let (mut dgate, mut dup) = (state.gate.clone(), state.up.clone());
        match self.config.variations.activation {
            Activation::Silu => elementwise::swiglu_backward(&mut dgate, &mut dup, &dactivated),
            Activation::GeluTanh => elementwise::geglu_backward(&mut dgate, &mut dup, &dactivated),
        }
        let weight = weights.feed_forward_norm.slice();
        let mut normed = vec![0.0; state.middle.len()];
        norm::rms_norm(&state.middle, weight, eps, &mut normed);
        let mut dnormed = vec![0.0; normed.len()];
        let low = (&normed[..], &state.low_rank[2][..]);
        let dy: [&[f32]; 2] = [&dgate, &dup];
        self.project_backward(weights, (index, 2), low, &dy, Some(&mut dnormed), grad);
        norm::rms_norm_backward(&state.middle, weight, eps, &dnormed, dx);
    }
}

/// Attention of a layer.
pub(crate) fn attention_shape(config: &ModelConfig, layer: usize) -> Shape {
    Shape {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        scale: config.attention_scale(),
        softcap: config.variations.attn_logit_softcapping,
        window: config.sliding_window(layer),
    }
}

/// `out = activation(gate) * up`.
pub(crate) fn activate(config: &ModelConfig, gate: &[f32], up: &[f32], out: &mut [f32]) {
    match config.variations.activation {
        Activation::Silu => elementwise::swiglu(gate, up, out),
        Activation::GeluTanh => elementwise::geglu(gate, up, out),
    }
}

/// A block's output under its norm, where it has one, and what was normalised.
pub(crate) fn normalise_output(
    output: Vec<f32>,
    weight: Option<&Memory>,
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let Some(weight) = weight else { return (output, Vec::new()) };
    let mut normed = vec![0.0; output.len()];
    norm::rms_norm(&output, weight.slice(), eps, &mut normed);
    (normed, output)
}

/// Gradient of a block's `output` given that of its norm's, which is the same where it has none.
fn output_gradient<'a>(
    output: &[f32],
    weight: Option<&Memory>,
    eps: f32,
    dx: &'a [f32],
) -> Cow<'a, [f32]> {
    let Some(weight) = weight else { return Cow::Borrowed(dx) };
    let mut doutput = vec![0.0; output.len()];
    norm::rms_norm_backward(output, weight.slice(), eps, dx, &mut doutput);
    Cow::Owned(doutput)
}

/// Rows of `table [vocabulary, width]` for `tokens`.
pub(crate) fn embed(table: &[f32], width: usize, tokens: impl Iterator<Item = usize>) -> Vec<f32> {
    tokens.flat_map(|t| &table[t * width..(t + 1) * width]).copied().collect()
}

fn pop(parts: &mut Vec<Vec<f32>>) -> Vec<f32> {
    parts.pop().expect("invariant: a group has one output a projection")
}
