//! One forward and backward pass over packed token rows.

use kernels::cross_entropy::linear_cross_entropy;
use kernels::{elementwise, norm};

use crate::adapter::{Adapter, DropoutKey};
use crate::decoder::{Model, Pinned};
use crate::dora::Gain;
use crate::error::ModelError;
use crate::forward::{LayerState, Pass, embed};

/// Token rows of one forward and backward pass.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// Token ids `[n]`, all rows one after another.
    pub tokens: &'a [i32],
    /// Segment bounds inside `tokens`, from 0 to n: attention and positions restart at each.
    pub cu_seqlens: &'a [i32],
    /// Target of each position `[n]` (the next token of the same segment), or -100 for none.
    pub targets: &'a [i32],
}

/// Sum of token losses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Sum of cross-entropy over targets, in nats.
    pub sum: f64,
    /// Number of targets.
    pub targets: u64,
}

/// Positions that have a target, and the targets.
struct Targets {
    positions: Vec<usize>,
    ids: Vec<u32>,
}

impl Model {
    /// Adds the gradient of `scale * sum of token losses` with respect to the adapter's values to
    /// `grad` (as long as `adapter.values`).
    ///
    /// # Errors
    /// [`ModelError::Input`] for token ids or bounds that do not fit.
    pub fn loss_and_grad(
        &self,
        adapter: &Adapter,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: Option<DropoutKey>,
        grad: &mut [f32],
    ) -> Result<Loss, ModelError> {
        let targets = self.check(batch)?;
        if grad.len() != adapter.values.len() {
            return Err(ModelError::Input("gradient and adapter differ in length".to_owned()));
        }
        let pinned = self.pin();
        let pass = self.pass(Some(adapter), dropout, batch.cu_seqlens);
        let mut states: Vec<LayerState> = Vec::with_capacity(self.layers.len());
        let out = self.trunk(&pass, &pinned, batch.tokens, |state| states.push(state));
        let mut dx = vec![0.0; out.len()];
        let loss = self.head_loss(&pinned, &out, &targets, Some((scale, &mut dx)));
        drop(out);
        for (index, weights) in pinned.layers.iter().enumerate().rev() {
            let state = states.pop().expect("invariant: one state a layer");
            pass.layer_backward(weights, index, state, &mut dx, grad);
        }
        Ok(loss)
    }

    /// Sum of token losses, forward only.
    ///
    /// # Errors
    /// As [`Model::loss_and_grad`].
    pub fn loss(
        &self,
        adapter: Option<&Adapter>,
        batch: MicroBatch<'_>,
    ) -> Result<Loss, ModelError> {
        let targets = self.check(batch)?;
        let pinned = self.pin();
        let pass = self.pass(adapter, None, batch.cu_seqlens);
        let out = self.trunk(&pass, &pinned, batch.tokens, drop);
        Ok(self.head_loss(&pinned, &out, &targets, None))
    }

    /// Logits `[n, vocabulary]` of every position: for tests and small inputs.
    ///
    /// # Errors
    /// As [`Model::loss_and_grad`].
    pub fn logits(
        &self,
        adapter: Option<&Adapter>,
        tokens: &[i32],
        cu_seqlens: &[i32],
    ) -> Result<Vec<f32>, ModelError> {
        let none = vec![-100; tokens.len()];
        self.check(MicroBatch { tokens, cu_seqlens, targets: &none })?;
        let pinned = self.pin();
        let pass = self.pass(adapter, None, cu_seqlens);
        let out = self.trunk(&pass, &pinned, tokens, drop);
        Ok(self.head_logits(&pinned, &out))
    }

    pub(crate) fn pass<'a>(
        &'a self,
        adapter: Option<&'a Adapter>,
        dropout: Option<DropoutKey>,
        cu_seqlens: &'a [i32],
    ) -> Pass<'a> {
        let gains = adapter.filter(|a| a.config.use_dora).map(|a| Gain::of(a, &self.pin()));
        Pass {
            gains: gains.unwrap_or_default(),
            config: &self.config,
            rope: self.rope(),
            adapter,
            dropout,
            cu_seqlens,
            positions: Pass::positions_of(cu_seqlens),
        }
    }

    /// Embedding and all layers; hands over each layer's state.
    pub(crate) fn trunk(
        &self,
        pass: &Pass<'_>,
        pinned: &Pinned,
        tokens: &[i32],
        mut keep: impl FnMut(LayerState),
    ) -> Vec<f32> {
        let ids = tokens.iter().map(|t| *t as usize);
        let mut x = self.embed(pinned, ids);
        for (index, weights) in pinned.layers.iter().enumerate() {
            let (out, state) = pass.layer(weights, index, x);
            keep(state);
            x = out;
        }
        x
    }

    /// Embeddings `[n, hidden]` of tokens, scaled where the family scales them.
    pub(crate) fn embed(&self, pinned: &Pinned, ids: impl Iterator<Item = usize>) -> Vec<f32> {
        let mut x = pinned.embed.view().embed(self.config.hidden_size, ids);
        if let Some(factor) = self.config.variations.embedding_scale {
            elementwise::scale(&mut x, factor);
        }
        x
    }

    /// Final norm and head of whole rows.
    pub(crate) fn head_logits(&self, pinned: &Pinned, x: &[f32]) -> Vec<f32> {
        use kernels::gemm::{Into, View, gemm};
        let (hidden, vocabulary) = (self.config.hidden_size, self.config.vocab_size);
        let rows = x.len() / hidden;
        let mut normed = vec![0.0; x.len()];
        norm::rms_norm(x, pinned.norm.slice(), self.config.rms_norm_eps, &mut normed);
        let mut logits = vec![0.0; rows * vocabulary];
        let head = pinned.head.view().values();
        let (h, w) = (View::rows(&normed, hidden), View::transposed(&head, hidden));
        gemm(rows, vocabulary, hidden, h, w, &mut logits, vocabulary, Into::Overwrite);
        if let Some(cap) = self.config.variations.final_logit_softcapping {
            elementwise::softcap(&mut logits, cap);
        }
        logits
    }

    /// Loss of the positions that have a target; only these reach the head. With `gradient =
    /// (scale, dx)` writes the gradient of `scale * loss` with respect to `x` into the zeroed `dx`.
    fn head_loss(
        &self,
        pinned: &Pinned,
        x: &[f32],
        targets: &Targets,
        gradient: Option<(f32, &mut [f32])>,
    ) -> Loss {
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let rows = embed(x, hidden, targets.positions.iter().copied());
        let mut normed = vec![0.0; rows.len()];
        norm::rms_norm(&rows, pinned.norm.slice(), eps, &mut normed);
        let head = pinned.head.view().values();
        let cap = self.config.variations.final_logit_softcapping;
        let count = targets.ids.len() as u64;
        let Some((scale, dx)) = gradient else {
            let sum = linear_cross_entropy(&normed, &head, hidden, &targets.ids, cap, None);
            return Loss { sum, targets: count };
        };
        let mut dnormed = vec![0.0; rows.len()];
        let gradient = Some((scale, &mut dnormed[..]));
        let sum = linear_cross_entropy(&normed, &head, hidden, &targets.ids, cap, gradient);
        let mut drows = vec![0.0; rows.len()];
        norm::rms_norm_backward(&rows, pinned.norm.slice(), eps, &dnormed, &mut drows);
        for (position, row) in targets.positions.iter().zip(drows.chunks_exact(hidden)) {
            dx[position * hidden..(position + 1) * hidden].copy_from_slice(row);
        }
        Loss { sum, targets: count }
    }

    fn check(&self, batch: MicroBatch<'_>) -> Result<Targets, ModelError> {
        let n = batch.tokens.len();
        let vocabulary = self.config.vocab_size as i64;
        let input = |message: String| Err(ModelError::Input(message));
        if n == 0 || batch.targets.len() != n {
            return input(format!("a batch of {n} tokens and {} targets", batch.targets.len()));
        }
        let cu = batch.cu_seqlens;
        if cu.first() != Some(&0) || cu.last() != Some(&(n as i32)) {
            return input("segment bounds do not span the batch".to_owned());
        }
        for w in cu.windows(2) {
            let length = i64::from(w[1]) - i64::from(w[0]);
            if length < 0 || length > self.max_positions() as i64 {
                return input(format!(
                    "a segment of {length} tokens; the model takes at most {}",
                    self.max_positions()
                ));
            }
        }
        if let Some(token) =
            batch.tokens.iter().find(|t| !(0..vocabulary).contains(&i64::from(**t)))
        {
            return input(format!("token id {token} is outside the vocabulary of {vocabulary}"));
        }
        let mut targets = Targets { positions: Vec::new(), ids: Vec::new() };
        for (position, target) in batch.targets.iter().enumerate() {
            if *target == -100 {
                continue;
            }
            if !(0..vocabulary).contains(&i64::from(*target)) {
                return input(format!("target {target} is outside the vocabulary of {vocabulary}"));
            }
            targets.positions.push(position);
            targets.ids.push(*target as u32);
        }
        Ok(targets)
    }
}
