//! Greedy generation with a key-value cache over a ragged, continuously refilled batch.
//!
//! A row's tokens are the same alone, in any batch and after any other row: every kernel computes a
//! row from that row alone, and decoding gives the bits of the full forward pass.

use kernels::attention::{self, KvCache};
use kernels::gemm::{Into, PackedMatrix, View, gemm_packed};
use kernels::{elementwise, norm};
use rayon::prelude::*;

use crate::adapter::{Adapter, GROUPS};
use crate::decoder::{Model, Pinned, PinnedLayer};
use crate::dora::Gain;
use crate::error::ModelError;
use crate::forward::{activate, attention_shape, embed, normalise_output};
use crate::linear::add_bias;
use crate::matrix::MatrixView;

/// Prompt tokens whose activations exist at once while prefilling.
const PREFILL_TOKENS: usize = 2048;

/// Greedy generation.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens generated for a prompt.
    pub max_new_tokens: usize,
    /// Token ids that end a row.
    pub end_tokens: Vec<u32>,
    /// Rows decoded together; changes speed and memory, never a token.
    pub batch_size: usize,
}

/// A finished row of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Index of the prompt.
    pub prompt: usize,
    /// New tokens without the end token.
    pub tokens: Vec<u32>,
    /// An end token was produced within the limit.
    pub ended: bool,
}

/// Weights in the order in which small batches read them, in f32.
pub(crate) struct PackedWeights {
    /// None where the weights are stored in fewer bits and there is no room for them in f32: then
    /// each is decoded in every step. That changes the speed, never a token.
    layers: Vec<Vec<PackedMatrix>>,
    head: PackedMatrix,
}

/// An adapter, packed likewise: per layer and group the A factors side by side and every B.
struct PackedAdapter {
    scale: f32,
    r: usize,
    groups: Vec<PackedGroup>,
}

struct PackedGroup {
    a: Option<PackedMatrix>,
    /// `(projection, B)` in the order of the columns of A.
    b: Vec<(usize, PackedMatrix)>,
    /// Of each of them with DoRA, else empty.
    gains: Vec<Gain>,
}

/// A row being decoded.
struct Row {
    prompt: usize,
    caches: Vec<KvCache>,
    tokens: Vec<u32>,
    /// Position of the newest token, which is not in the cache yet.
    position: u32,
}

impl Model {
    /// Generates greedily for every prompt, calling `done` as rows finish, in any order; `done`
    /// returns false to stop early.
    ///
    /// # Errors
    /// [`ModelError::Input`] for an empty prompt, one beyond the context, or an unknown token id.
    pub fn generate(
        &self,
        adapter: Option<&Adapter>,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), ModelError> {
        self.check_prompts(prompts, options)?;
        let pinned = self.pin();
        let packed = self.packed.get_or_init(|| PackedWeights::new(self, &pinned));
        let packed_adapter = adapter.map(|a| PackedAdapter::new(self, a));
        let decoder =
            Decoder { model: self, pinned: &pinned, packed, adapter: packed_adapter.as_ref() };
        let mut waiting = (0..prompts.len()).collect::<std::collections::VecDeque<_>>();
        let mut rows: Vec<Row> = Vec::new();
        loop {
            while rows.len() < options.batch_size.max(1) && !waiting.is_empty() {
                let free = options.batch_size.max(1) - rows.len();
                let batch = take_prefill(&mut waiting, prompts, free);
                rows.extend(self.prefill(adapter, &pinned, prompts, &batch, options));
                if !retire(&mut rows, options, done) {
                    return Ok(());
                }
            }
            if rows.is_empty() {
                return Ok(());
            }
            decoder.step(&mut rows);
            if !retire(&mut rows, options, done) {
                return Ok(());
            }
        }
    }

    fn check_prompts(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
    ) -> Result<(), ModelError> {
        for (index, prompt) in prompts.iter().enumerate() {
            let limit = self.max_positions().saturating_sub(options.max_new_tokens);
            if prompt.is_empty() || prompt.len() > limit {
                return Err(ModelError::Input(format!(
                    "prompt {index} has {} tokens; between 1 and {limit} fit beside {} new ones",
                    prompt.len(),
                    options.max_new_tokens
                )));
            }
            if let Some(token) = prompt.iter().find(|t| **t as usize >= self.config.vocab_size) {
                return Err(ModelError::Input(format!(
                    "prompt {index} has token id {token}, outside the vocabulary of {}",
                    self.config.vocab_size
                )));
            }
        }
        Ok(())
    }

    /// Runs whole prompts and picks the first token of each.
    fn prefill(
        &self,
        adapter: Option<&Adapter>,
        pinned: &Pinned,
        prompts: &[Vec<u32>],
        batch: &[usize],
        options: &GenerateOptions,
    ) -> Vec<Row> {
        let mut tokens: Vec<i32> = Vec::new();
        let mut cu = vec![0i32];
        for &prompt in batch {
            tokens.extend(prompts[prompt].iter().map(|t| *t as i32));
            cu.push(tokens.len() as i32);
        }
        let shape = attention_shape(&self.config, 0);
        let width = self.config.num_key_value_heads * self.config.head_dim;
        let mut caches: Vec<Vec<KvCache>> = vec![Vec::new(); batch.len()];
        let pass = self.pass(adapter, None, &cu);
        let out = self.trunk(&pass, pinned, &tokens, |state| {
            caches.par_iter_mut().enumerate().for_each(|(i, caches)| {
                let span = cu[i] as usize * width..cu[i + 1] as usize * width;
                let capacity = prompts[batch[i]].len() + options.max_new_tokens;
                let mut cache = KvCache::new(shape, capacity);
                cache.append(shape, &state.k[span.clone()], &state.v[span]);
                caches.push(cache);
            });
        });
        let hidden = self.config.hidden_size;
        let last = embed(&out, hidden, cu[1..].iter().map(|end| *end as usize - 1));
        let logits = self.head_logits(pinned, &last);
        let rows = batch.iter().zip(caches).zip(logits.chunks_exact(self.config.vocab_size));
        rows.map(|((&prompt, caches), logits)| Row {
            prompt,
            caches,
            tokens: vec![elementwise::argmax(logits) as u32],
            position: prompts[prompt].len() as u32,
        })
        .collect()
    }
}

/// Takes at most `free` prompts, in order, that fit [`PREFILL_TOKENS`] together.
fn take_prefill(
    waiting: &mut std::collections::VecDeque<usize>,
    prompts: &[Vec<u32>],
    free: usize,
) -> Vec<usize> {
    let (mut batch, mut tokens) = (Vec::new(), 0);
    while let Some(&prompt) = waiting.front() {
        tokens += prompts[prompt].len();
        if batch.len() == free || (!batch.is_empty() && tokens > PREFILL_TOKENS) {
            break;
        }
        batch.push(prompt);
        waiting.pop_front();
    }
    batch
}

/// Hands over finished rows; false where the caller wants no more.
fn retire(
    rows: &mut Vec<Row>,
    options: &GenerateOptions,
    done: &mut dyn FnMut(Generated) -> bool,
) -> bool {
    let mut index = 0;
    while index < rows.len() {
        let tokens = &rows[index].tokens;
        let ended = tokens.last().is_some_and(|t| options.end_tokens.contains(t));
        if !ended && tokens.len() < options.max_new_tokens {
            index += 1;
            continue;
        }
        let Row { prompt, mut tokens, .. } = rows.swap_remove(index);
        if ended {
            tokens.pop();
        }
        if !done(Generated { prompt, tokens, ended }) {
            return false;
        }
    }
    true
}

/// One decode step of all rows.
struct Decoder<'a> {
    model: &'a Model,
    pinned: &'a Pinned,
    packed: &'a PackedWeights,
    adapter: Option<&'a PackedAdapter>,
}

impl Decoder<'_> {
    /// Appends one token to every row.
    fn step(&self, rows: &mut [Row]) {
        let logits = self.logits(rows);
        let vocabulary = self.model.config.vocab_size;
        rows.par_iter_mut().zip(logits.par_chunks(vocabulary)).for_each(|(row, logits)| {
            row.tokens.push(elementwise::argmax(logits) as u32);
            row.position += 1;
        });
    }

    /// Takes every row's newest token into its caches; logits `[rows, vocabulary]` of the next.
    fn logits(&self, rows: &mut [Row]) -> Vec<f32> {
        let config = &self.model.config;
        let ids = rows.iter().map(|r| r.tokens[r.tokens.len() - 1] as usize);
        let mut x = self.model.embed(self.pinned, ids);
        let positions: Vec<u32> = rows.iter().map(|r| r.position).collect();
        for (index, weights) in self.pinned.layers.iter().enumerate() {
            self.layer(weights, index, &mut x, &positions, rows);
        }
        let mut normed = vec![0.0; x.len()];
        norm::rms_norm(&x, self.pinned.norm.slice(), config.rms_norm_eps, &mut normed);
        let mut logits = vec![0.0; rows.len() * config.vocab_size];
        let h = View::rows(&normed, config.hidden_size);
        let head = &self.packed.head;
        gemm_packed(rows.len(), h, head, &mut logits, config.vocab_size, Into::Overwrite);
        if let Some(cap) = config.variations.final_logit_softcapping {
            elementwise::softcap(&mut logits, cap);
        }
        logits
    }

    fn layer(
        &self,
        weights: &PinnedLayer,
        index: usize,
        x: &mut Vec<f32>,
        positions: &[u32],
        rows: &mut [Row],
    ) {
        let config = &self.model.config;
        let (eps, shape) = (config.rms_norm_eps, attention_shape(config, index));
        let mut normed = vec![0.0; x.len()];
        norm::rms_norm(x, weights.input_norm.slice(), eps, &mut normed);
        let [mut q, mut k, v] = self.project(weights, index, 0, &normed);
        self.model.rope().rotate(&mut q, positions, false);
        self.model.rope().rotate(&mut k, positions, false);
        let (q_width, kv_width) = (q.len() / rows.len(), k.len() / rows.len());
        let mut attended = vec![0.0; q.len()];
        rows.par_iter_mut().zip(attended.par_chunks_mut(q_width)).enumerate().for_each(
            |(i, (row, out))| {
                let new = i * kv_width..(i + 1) * kv_width;
                row.caches[index].append(shape, &k[new.clone()], &v[new]);
                attention::decode(shape, &q[i * q_width..][..q_width], &row.caches[index], out);
            },
        );
        let [output] = self.project(weights, index, 1, &attended);
        let output_norm = weights.attention_output_norm.as_ref();
        let (mut middle, _) = normalise_output(output, output_norm, eps);
        elementwise::add_assign(&mut middle, x);
        norm::rms_norm(&middle, weights.feed_forward_norm.slice(), eps, &mut normed);
        let [gate, up] = self.project(weights, index, 2, &normed);
        let mut activated = vec![0.0; gate.len()];
        activate(config, &gate, &up, &mut activated);
        let [output] = self.project(weights, index, 3, &activated);
        let output_norm = weights.feed_forward_output_norm.as_ref();
        let (mut out, _) = normalise_output(output, output_norm, eps);
        elementwise::add_assign(&mut out, &middle);
        *x = out;
    }

    /// The projections of one group, as [`crate::forward::Pass`] computes them.
    fn project<const N: usize>(
        &self,
        weights: &PinnedLayer,
        layer: usize,
        group: usize,
        x: &[f32],
    ) -> [Vec<f32>; N] {
        let adapter = self.adapter.map(|a| (a, &a.groups[layer * GROUPS.len() + group]));
        let low_rank = adapter.map(|(a, g)| g.down(x, a.scale)).unwrap_or_default();
        std::array::from_fn(|i| {
            let projection = GROUPS[group][i];
            let frozen = weights.projection(projection);
            let rows = x.len() / frozen.inputs;
            let mut y = vec![0.0; rows * frozen.outputs];
            if let Some(matrices) = self.packed.layers.get(layer) {
                let input = View::rows(x, frozen.inputs);
                let matrix = &matrices[projection];
                gemm_packed(rows, input, matrix, &mut y, frozen.outputs, Into::Overwrite);
            } else {
                frozen.without_bias().forward(x, None, &mut y);
            }
            let gain = adapter.and_then(|(_, g)| g.gain(projection));
            if gain.is_none() {
                add_bias(frozen.bias, &mut y);
            }
            if let Some((a, g)) = adapter {
                g.up(projection, &low_rank, a.r, &mut y);
            }
            if let Some(gain) = gain {
                gain.apply(&mut y);
                add_bias(frozen.bias, &mut y);
            }
            y
        })
    }
}

impl PackedWeights {
    fn new(model: &Model, pinned: &Pinned) -> Self {
        let linear = || pinned.layers.iter().flat_map(PinnedLayer::projections);
        let bytes: usize = linear().map(|f| f.inputs * f.outputs * size_of::<f32>()).sum();
        let roomy = available_memory().is_none_or(|free| bytes as u64 <= free / 2);
        Self::with_layers(model, pinned, roomy || linear().all(|f| f.weight.is_full()))
    }

    fn with_layers(model: &Model, pinned: &Pinned, layers: bool) -> Self {
        let pack = |w: MatrixView<'_>, inputs: usize, outputs: usize| {
            PackedMatrix::new(inputs, outputs, View::transposed(&w.values(), inputs))
        };
        let packed = pinned.layers.iter().filter(|_| layers).map(|layer| {
            layer.projections().map(|f| pack(f.weight, f.inputs, f.outputs)).collect()
        });
        let (hidden, vocabulary) = (model.config.hidden_size, model.config.vocab_size);
        Self { layers: packed.collect(), head: pack(pinned.head.view(), hidden, vocabulary) }
    }
}

/// Bytes that the system could give out without swapping, where it says.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

impl PackedAdapter {
    fn new(model: &Model, adapter: &Adapter) -> Self {
        let r = adapter.config.r;
        let mut gains = Gain::of(adapter, &model.pin()).into_iter();
        let groups = (0..model.layers.len() * GROUPS.len()).map(|index| {
            let members = adapter.group(index / GROUPS.len(), index % GROUPS.len());
            let factors = &adapter.factors[members];
            let a = factors.first().zip(factors.last()).map(|(first, last)| {
                let values = &adapter.values[first.a.start..last.a.end];
                let (inputs, columns) = (first.inputs, factors.len() * r);
                PackedMatrix::new(inputs, columns, View::transposed(values, inputs))
            });
            let b = factors.iter().map(|f| {
                let values = View::transposed(&adapter.values[f.b.clone()], r);
                (f.projection, PackedMatrix::new(r, f.outputs, values))
            });
            let gains = gains.by_ref().take(factors.len()).collect();
            PackedGroup { a, b: b.collect(), gains }
        });
        Self { scale: adapter.scale(), r, groups: groups.collect() }
    }
}

impl PackedGroup {
    fn gain(&self, projection: usize) -> Option<&Gain> {
        self.gains.get(self.b.iter().position(|(p, _)| *p == projection)?)
    }

    fn down(&self, x: &[f32], scale: f32) -> Vec<f32> {
        let Some(a) = &self.a else { return Vec::new() };
        let rows = x.len() / a.rows();
        let mut u = vec![0.0; rows * a.columns()];
        gemm_packed(rows, View::rows(x, a.rows()), a, &mut u, a.columns(), Into::Overwrite);
        elementwise::scale(&mut u, scale);
        u
    }

    fn up(&self, projection: usize, u: &[f32], r: usize, y: &mut [f32]) {
        let Some(member) = self.b.iter().position(|(p, _)| *p == projection) else { return };
        let b = &self.b[member].1;
        let width = self.b.len() * r;
        let rows = u.len() / width;
        let u = View::rows(&u[member * r..], width);
        gemm_packed(rows, u, b, y, b.columns(), Into::Accumulate);
    }
}

#[cfg(test)]
#[path = "generate_tests.rs"]
mod tests;
