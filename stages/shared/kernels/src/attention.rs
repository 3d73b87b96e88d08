//! Causal attention over segments of packed rows, with grouped key and value heads.
//!
//! Query row i of a segment sees the keys 0..=i of the same segment, or the last `window` of them.
//! Softmax is over `scale * q·k` in f32, where `softcap` is given over `c * tanh(scale * q·k / c)`. A row's result depends on its segment alone, and decoding one token at a time
//! ([`decode`]) gives the same bits as the whole segment at once ([`forward`]).

use rayon::prelude::*;

use crate::gemm::{Into, View, gemm_serial};
use crate::simd::{exp, max_of, multiversion, sum_by, tanh};

/// Query rows handled at once: bounds the scores kept, and skips most keys after the diagonal.
const QUERY_BLOCK: usize = 128;

/// Shape of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores, usually `head_dim^-0.5`.
    pub scale: f32,
    /// Bound on the scaled scores, where there is one.
    pub softcap: Option<f32>,
    /// Keys that a query sees, its own position among them (at least 1), where that is limited.
    pub window: Option<usize>,
}

impl Shape {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// First key that any query from row `first` on sees.
    fn first_key(&self, first: usize) -> usize {
        self.window.map_or(0, |window| (first + 1).saturating_sub(window))
    }

    /// Caps the scores where the shape asks for it and leaves the derivatives in `slopes`, where
    /// that is not empty; returns the factor that is left to apply.
    fn cap(&self, scores: &mut [f32], slopes: &mut [f32]) -> f32 {
        let Some(cap) = self.softcap else { return self.scale };
        cap_scores(scores, self.scale / cap, cap, slopes);
        1.0
    }

    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// `out [n, heads * d]` and log-sum-exp `[heads, n]` of `q [n, heads * d]`, `k` and `v
/// [n, kv_heads * d]` (rotated already), for segments bounded by `cu_seqlens`.
pub fn forward(
    shape: Shape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    cu_seqlens: &[i32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let n = q.len() / shape.q_width();
    let d = shape.head_dim;
    let done: Vec<_> = tasks(cu_seqlens, shape.heads)
        .into_par_iter()
        .map(|(start, len, head)| {
            let kv = head / shape.group();
            let keys = &k[start * shape.kv_width() + kv * d..];
            let values = &v[start * shape.kv_width() + kv * d..];
            let mut o = vec![0.0f32; len * d];
            let mut l = vec![0.0f32; len];
            let mut p = vec![0.0f32; QUERY_BLOCK.min(len) * len];
            for first in (0..len).step_by(QUERY_BLOCK) {
                let rows = QUERY_BLOCK.min(len - first);
                let from = shape.first_key(first);
                let (width, seen) = (first + rows - from, Seen::of(shape, first - from));
                let queries = &q[(start + first) * shape.q_width() + head * d..];
                scores(shape, rows, width, queries, &keys[from * shape.kv_width()..], &mut p);
                let scale = shape.cap(&mut p[..rows * width], &mut []);
                softmax(&mut p[..rows * width], width, seen, scale, &mut l[first..]);
                let o = &mut o[first * d..];
                let values = View::rows(&values[from * shape.kv_width()..], shape.kv_width());
                gemm_serial(rows, d, width, View::rows(&p, width), values, o, d, Into::Overwrite);
                normalise(&mut o[..rows * d], &mut l[first..first + rows], &p, width, seen);
            }
            (start, head, o, l)
        })
        .collect();
    for (start, head, o, l) in done {
        for (i, row) in o.chunks_exact(d).enumerate() {
            out[(start + i) * shape.q_width() + head * d..][..d].copy_from_slice(row);
        }
        lse[head * n + start..][..l.len()].copy_from_slice(&l);
    }
}

/// Gradients of [`forward`]: overwrites `dq`, `dk`, `dv` given `dout`, with `p` recomputed from the
/// log-sum-exp: `dv = pᵀ·dout`, `ds = p * (dout·vᵀ - rowsum(dout * out)) * scale`, `dq = ds·k`,
/// `dk = dsᵀ·q` (Dao et al., 2022, appendix B).
pub fn backward(
    shape: Shape,
    saved: Saved<'_>,
    cu_seqlens: &[i32],
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let d = shape.head_dim;
    let done: Vec<_> = tasks(cu_seqlens, shape.kv_heads)
        .into_par_iter()
        .map(|task| (task, backward_task(shape, saved, dout, task)))
        .collect();
    for ((start, len, kv), (gq, gk, gv)) in done {
        for i in 0..len {
            for (member, rows) in gq.chunks_exact(len * d).enumerate() {
                let head = kv * shape.group() + member;
                dq[(start + i) * shape.q_width() + head * d..][..d]
                    .copy_from_slice(&rows[i * d..][..d]);
            }
            let at = (start + i) * shape.kv_width() + kv * d;
            dk[at..at + d].copy_from_slice(&gk[i * d..][..d]);
            dv[at..at + d].copy_from_slice(&gv[i * d..][..d]);
        }
    }
}

/// What [`backward`] needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Rotated queries.
    pub q: &'a [f32],
    /// Rotated keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Output.
    pub out: &'a [f32],
    /// Log-sum-exp.
    pub lse: &'a [f32],
}

/// Gradients of one segment and one key/value head: of all query heads of the group, keys, values.
fn backward_task(
    shape: Shape,
    saved: Saved<'_>,
    dout: &[f32],
    (start, len, kv): (usize, usize, usize),
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (d, qw, kw) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let n = saved.q.len() / qw;
    let keys = &saved.k[start * kw + kv * d..];
    let values = &saved.v[start * kw + kv * d..];
    let (mut gk, mut gv) = (vec![0.0f32; len * d], vec![0.0f32; len * d]);
    let mut gq = vec![0.0f32; shape.group() * len * d];
    let block = QUERY_BLOCK.min(len) * len;
    let (mut p, mut ds) = (vec![0.0f32; block], vec![0.0f32; block]);
    let mut slopes = vec![0.0f32; if shape.softcap.is_some() { block } else { 0 }];
    for member in 0..shape.group() {
        let head = kv * shape.group() + member;
        for first in (0..len).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(len - first);
            let from = shape.first_key(first);
            let (width, seen) = (first + rows - from, Seen::of(shape, first - from));
            let (keys, values) = (&keys[from * kw..], &values[from * kw..]);
            let (gk, gv) = (&mut gk[from * d..], &mut gv[from * d..]);
            let at = (start + first) * qw + head * d;
            let (queries, dout) = (&saved.q[at..], &dout[at..]);
            scores(shape, rows, width, queries, keys, &mut p);
            let (p, ds) = (&mut p[..rows * width], &mut ds[..rows * width]);
            let lse = &saved.lse[head * n + start + first..][..rows];
            let scale = shape.cap(p, &mut slopes);
            probabilities(p, width, seen, scale, lse);
            let (dv_in, dout_rows) = (View::transposed(p, width), View::rows(dout, qw));
            gemm_serial(width, d, rows, dv_in, dout_rows, gv, d, Into::Accumulate);
            let v_t = View::transposed(values, kw);
            gemm_serial(rows, width, d, dout_rows, v_t, ds, width, Into::Overwrite);
            score_gradients(p, ds, width, shape.scale, dout, &saved.out[at..], qw, d);
            for (x, slope) in ds.iter_mut().zip(&slopes) {
                *x *= slope;
            }
            let gq = &mut gq[(member * len + first) * d..];
            let (ds_rows, key_rows) = (View::rows(ds, width), View::rows(keys, kw));
            gemm_serial(rows, d, width, ds_rows, key_rows, gq, d, Into::Overwrite);
            let (ds_t, q_rows) = (View::transposed(ds, width), View::rows(queries, qw));
            gemm_serial(width, d, rows, ds_t, q_rows, gk, d, Into::Accumulate);
        }
    }
    (gq, gk, gv)
}

/// `(start, length, head)` for every segment and head.
fn tasks(cu_seqlens: &[i32], heads: usize) -> Vec<(usize, usize, usize)> {
    cu_seqlens
        .windows(2)
        .filter(|w| w[1] > w[0])
        .flat_map(|w| (0..heads).map(|h| (w[0] as usize, (w[1] - w[0]) as usize, h)))
        .collect()
}

/// Unscaled scores of `rows` queries against `width` keys.
fn scores(shape: Shape, rows: usize, width: usize, queries: &[f32], keys: &[f32], out: &mut [f32]) {
    let q = View::rows(queries, shape.q_width());
    let k = View::transposed(keys, shape.kv_width());
    gemm_serial(rows, width, shape.head_dim, q, k, out, width, Into::Overwrite);
}

/// Which columns of a block of scores its rows see.
#[derive(Clone, Copy)]
struct Seen {
    /// Column of the first row's own position.
    diagonal: usize,
    window: usize,
}

impl Seen {
    fn of(shape: Shape, diagonal: usize) -> Self {
        Self { diagonal, window: shape.window.unwrap_or(usize::MAX) }
    }

    #[inline(always)]
    fn columns(self, row: usize) -> std::ops::Range<usize> {
        let end = self.diagonal + row + 1;
        end.saturating_sub(self.window)..end
    }
}

multiversion! {
/// `x = cap * tanh(factor * x)`, and `1 - tanh²` into `slopes`, where that is not empty.
fn cap_scores(x: &mut [f32], factor: f32, cap: f32, slopes: &mut [f32]) {
    for x in x.iter_mut() {
        *x = tanh(*x * factor);
    }
    for (slope, t) in slopes.iter_mut().zip(x.iter()) {
        *slope = 1.0 - *t * *t;
    }
    for x in x {
        *x *= cap;
    }
}
}

multiversion! {
/// Turns scores into unnormalised probabilities; leaves each row's maximum in `lse`.
fn softmax(p: &mut [f32], width: usize, seen: Seen, scale: f32, lse: &mut [f32]) {
    for (i, row) in p.chunks_exact_mut(width).enumerate() {
        let columns = seen.columns(i);
        lse[i] = exponentiate(&mut row[columns.clone()], scale);
        row[..columns.start].fill(0.0);
        row[columns.end..].fill(0.0);
    }
}
}

/// `x = e^(scale * x - max)`; returns the maximum.
#[inline(always)]
fn exponentiate(x: &mut [f32], scale: f32) -> f32 {
    for x in x.iter_mut() {
        *x *= scale;
    }
    let max = max_of(x);
    for x in x.iter_mut() {
        *x = exp(*x - max);
    }
    max
}

multiversion! {
/// Divides rows of `o` by the sums of their probabilities and completes the log-sum-exp.
fn normalise(o: &mut [f32], lse: &mut [f32], p: &[f32], width: usize, seen: Seen) {
    let d = o.len() / lse.len();
    for (i, row) in o.chunks_exact_mut(d).enumerate() {
        let seen = &p[i * width..][seen.columns(i)];
        let sum = sum_by(seen, seen, |a, _, acc| acc + a);
        let inverse = 1.0 / sum;
        for x in row {
            *x *= inverse;
        }
        lse[i] += sum.ln();
    }
}
}

multiversion! {
/// Turns scores into probabilities with a known log-sum-exp.
fn probabilities(p: &mut [f32], width: usize, seen: Seen, scale: f32, lse: &[f32]) {
    for (i, row) in p.chunks_exact_mut(width).enumerate() {
        let columns = seen.columns(i);
        for x in &mut row[columns.clone()] {
            *x = exp(*x * scale - lse[i]);
        }
        row[..columns.start].fill(0.0);
        row[columns.end..].fill(0.0);
    }
}
}

multiversion! {
/// `ds = p * (ds - rowsum(dout * out)) * scale`, in place.
fn score_gradients(
    p: &[f32], ds: &mut [f32], width: usize, scale: f32,
    dout: &[f32], out: &[f32], stride: usize, d: usize,
) {
    for (i, (row, p)) in ds.chunks_exact_mut(width).zip(p.chunks_exact(width)).enumerate() {
        let delta = sum_by(&dout[i * stride..][..d], &out[i * stride..][..d], f32::mul_add);
        for (x, p) in row.iter_mut().zip(p) {
            *x = *p * (*x - delta) * scale;
        }
    }
}
}

/// Keys and values of one row of a batch in one layer: keys `[kv_heads, d, capacity]`, so that a
/// query meets all positions at once; values `[kv_heads, capacity, d]`.
#[derive(Clone, Debug)]
pub struct KvCache {
    capacity: usize,
    len: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `capacity` positions.
    pub fn new(shape: Shape, capacity: usize) -> Self {
        let size = shape.kv_width() * capacity;
        Self { capacity, len: 0, keys: vec![0.0; size], values: vec![0.0; size] }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing held yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends rotated keys and values `[rows, kv_heads * d]`.
    ///
    /// # Panics
    /// Where the capacity is exceeded.
    pub fn append(&mut self, shape: Shape, k: &[f32], v: &[f32]) {
        let (d, width) = (shape.head_dim, shape.kv_width());
        let rows = k.len() / width;
        assert!(self.len + rows <= self.capacity, "cache of {} positions is full", self.capacity);
        for i in 0..rows {
            let at = self.len + i;
            for head in 0..shape.kv_heads {
                let (k, v) = (&k[i * width + head * d..][..d], &v[i * width + head * d..][..d]);
                for (j, x) in k.iter().enumerate() {
                    self.keys[(head * d + j) * self.capacity + at] = *x;
                }
                self.values[(head * self.capacity + at) * d..][..d].copy_from_slice(v);
            }
        }
        self.len += rows;
    }
}

/// Attention of one new query row `q [heads * d]` over everything in `cache` into `out`.
pub fn decode(shape: Shape, q: &[f32], cache: &KvCache, out: &mut [f32]) {
    let d = shape.head_dim;
    let from = cache.len.checked_sub(1).map_or(0, |last| shape.first_key(last));
    let mut p = vec![0.0f32; cache.len - from];
    for head in 0..shape.heads {
        let kv = head / shape.group();
        let keys = &cache.keys[kv * d * cache.capacity..][..d * cache.capacity];
        let values = &cache.values[kv * d * cache.capacity..][from * d..cache.len * d];
        let (q, out) = (&q[head * d..][..d], &mut out[head * d..][..d]);
        decode_scores(q, keys, from, &mut p);
        let scale = shape.cap(&mut p, &mut []);
        decode_values(values, scale, &mut p, out);
    }
}

multiversion! {
/// Scores of a query against the cached keys from position `from` on.
fn decode_scores(q: &[f32], keys: &[f32], from: usize, p: &mut [f32]) {
    let capacity = keys.len() / q.len();
    p.fill(0.0);
    for (q, keys) in q.iter().zip(keys.chunks_exact(capacity)) {
        for (p, k) in p.iter_mut().zip(&keys[from..]) {
            *p = q.mul_add(*k, *p);
        }
    }
}
}

multiversion! {
/// Turns scores into probabilities and sums the values by them.
fn decode_values(values: &[f32], scale: f32, p: &mut [f32], out: &mut [f32]) {
    exponentiate(p, scale);
    out.fill(0.0);
    for (p, value) in p.iter().zip(values.chunks_exact(out.len())) {
        for (o, v) in out.iter_mut().zip(value) {
            *o = p.mul_add(*v, *o);
        }
    }
    let inverse = 1.0 / sum_by(p, p, |a, _, acc| acc + a);
    for o in out {
        *o *= inverse;
    }
}
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
