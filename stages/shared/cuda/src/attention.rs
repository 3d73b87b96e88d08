//! Causal attention inside segments, with grouped queries.

use crate::device::{Device, args};
use crate::{CudaError, Dtype};

/// How the fast kernels are launched for one shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    forward: Facts,
    query: Facts,
    key: Facts,
    /// Parts of a group of query heads that blocks over keys share.
    splits: usize,
}

/// Rows of a block, threads, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
struct Facts {
    rows: usize,
    threads: usize,
    shared: usize,
    /// dk and dv are made by kernels of their own.
    is_split: bool,
}

/// Blocks that fill a large GPU about twice.
const BLOCKS: usize = 500;

impl Plan {
    /// The plan for a shape, `None` where only the slow twin serves it.
    pub(crate) fn new(
        device: &Device,
        (heads, kv_heads, d): (usize, usize, usize),
        softcaps: bool,
        capacity: usize,
    ) -> Result<Option<Self>, CudaError> {
        let least = match device.dtype {
            Dtype::F32 => return Ok(None),
            Dtype::Bf16 => 80,
            Dtype::F16 => 75,
        };
        if !matches!(d, 64 | 128 | 256) || device.capability < least {
            return Ok(None);
        }
        device.head_dim.set(d);
        device.softcaps.set(softcaps);
        let facts = |file, name| -> Result<Facts, CudaError> {
            let [rows, threads, shared, kernels] = device.facts(file, name)?.map(|v| v as usize);
            Ok(Facts { rows, threads, shared, is_split: kernels == 2 })
        };
        let key = facts(BACKWARD, "attention_backward_kv_launch")?;
        let group = heads / kv_heads;
        let blocks = kv_heads * capacity.div_ceil(key.rows);
        let enough = |s: &usize| group.is_multiple_of(*s) && s * blocks >= BLOCKS;
        Ok(Some(Self {
            forward: facts(FORWARD, "attention_forward_launch")?,
            query: facts(BACKWARD, "attention_backward_q_launch")?,
            key,
            splits: (1..=group).find(enough).unwrap_or(group),
        }))
    }

    /// Bytes of scratch that the backward pass needs.
    pub(crate) fn scratch_bytes(&self, kv_heads: usize, d: usize, n: usize) -> u64 {
        if self.splits > 1 { (2 * self.splits * n * kv_heads * d) as u64 * 4 } else { 0 }
    }

    /// The orders in which blocks take tiles: of the forward pass, of the gradient of queries, and of
    /// that of keys and values.
    pub(crate) fn orders(&self, start: &[i32], stop: &[i32]) -> [Vec<i32>; 3] {
        let queries =
            |rows| tile_order(start.len(), rows, &|first, last| last as i32 - start[first]);
        let keys = tile_order(start.len(), self.key.rows, &|first, last| stop[last] - first as i32);
        [queries(self.forward.rows), queries(self.query.rows), keys]
    }
}

/// Tiles of `rows` rows, longest work first, so that the last blocks to start are short.
fn tile_order(n: usize, rows: usize, work: &dyn Fn(usize, usize) -> i32) -> Vec<i32> {
    let mut tiles: Vec<i32> = (0..n.div_ceil(rows) as i32).collect();
    tiles.sort_by_key(|tile| {
        let first = *tile as usize * rows;
        -work(first, (first + rows).min(n) - 1)
    });
    tiles
}

/// Where an attention reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Attention {
    /// How the fast kernels run; `None` for the slow twin.
    pub(crate) plan: Option<Plan>,
    /// q, k and v side by side in rows of stride `ld`.
    pub(crate) qkv: u64,
    pub(crate) ld: usize,
    /// `[n, heads * d]` with row stride `ldo`.
    pub(crate) out: u64,
    pub(crate) ldo: usize,
    /// Log of the sum of exponentials `[heads, n]`, f32.
    pub(crate) lse: u64,
    /// First row of each row's segment, and one past its last, `[n]`.
    pub(crate) start: u64,
    pub(crate) stop: u64,
    /// Both, in pairs.
    pub(crate) bounds: u64,
    /// [`Plan::orders`].
    pub(crate) orders: [u64; 3],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d: usize,
    pub(crate) n: usize,
    /// Rows of the longest segment.
    pub(crate) longest: usize,
    /// Of the products of queries and keys.
    pub(crate) scale: f32,
    /// Scores `s` become `c tanh(s / c)`; 0 for none.
    pub(crate) softcap: f32,
    /// Rows that a row sees, its own among them; `usize::MAX` for all before.
    pub(crate) window: usize,
}

const FILE: &str = "attention_reference.cu";
const FORWARD: &str = "attention_forward.cu";
const BACKWARD: &str = "attention_backward.cu";

/// Bytes of that many floats, in whole units of 16: the compiler reads the last ones together.
fn shared(floats: usize) -> usize {
    (floats * 4).next_multiple_of(16)
}

/// Refuses a sequence of `longest` tokens whose scores do not fit into the `available` bytes of shared
/// memory that a block of the slow kernels can have.
pub(crate) fn check_longest(
    longest: usize,
    available: usize,
    trains: bool,
    dtype: Dtype,
) -> Result<(), CudaError> {
    // Backward, gradients of the scores as well.
    let parts = if trains { 2 } else { 1 };
    if shared(parts * longest) <= available {
        return Ok(());
    }
    let limit = available / 16 * 4 / parts;
    Err(CudaError::Input(format!(
        "a sequence of {longest} tokens where this GPU's attention serves {limit} in {dtype:?} with \
         heads of this size: shorten it, or set another `dtype` or `device: cpu`"
    )))
}

impl Attention {
    fn parts(&self, base: u64, size: u64) -> [u64; 3] {
        let (q, kv) = ((self.heads * self.d) as u64, (self.kv_heads * self.d) as u64);
        [base, base + q * size, base + (q + kv) * size]
    }

    /// Scale, softcap and window as the kernels take them. A window as long as the batch is none; that of
    /// the longest segment would not do, since a recorded launch serves batches of other segments.
    fn scores(&self) -> (f32, f32, i32) {
        let window = if self.window < self.n { self.window as i32 } else { 0 };
        (self.scale, self.softcap, window)
    }

    /// Writes `out` and `lse`.
    pub(crate) fn forward(&self, device: &Device) -> Result<(), CudaError> {
        let Some(Plan { forward: Facts { rows, threads, shared, .. }, .. }) = self.plan else {
            return self.forward_reference(device);
        };
        let [q, k, v] = self.parts(self.qkv, device.dtype.size());
        let [ld, ldo, heads, kv_heads, n] =
            [self.ld, self.ldo, self.heads, self.kv_heads, self.n].map(|v| v as i32);
        let (out, lse, bounds, order) = (self.out, self.lse, self.bounds, self.orders[0]);
        let (scale, softcap, window) = self.scores();
        // SAFETY: the caller's buffers.
        unsafe {
            device.launch(
                (FORWARD, "attention_forward"),
                [self.heads, self.n.div_ceil(rows)],
                threads,
                shared,
                args![
                    q, k, v, out, lse, bounds, order, n, heads, kv_heads, ld, ld, ld, ldo, scale,
                    softcap, window
                ],
            )
        }
    }

    /// Writes the gradients of q, k and v, side by side in rows of stride `ldd`, from that of `out`.
    /// `delta` has the shape of `lse`; `partial` has [`Plan::scratch_bytes`].
    pub(crate) fn backward(
        &self,
        device: &Device,
        (dout, lddo): (u64, usize),
        (dqkv, ldd): (u64, usize),
        (delta, partial): (u64, u64),
    ) -> Result<(), CudaError> {
        let Some(plan) = self.plan else {
            return self.backward_reference(device, (dout, lddo), (dqkv, ldd), delta);
        };
        let size = device.dtype.size();
        let [q, k, v] = self.parts(self.qkv, size);
        let [dq, dk, dv] = self.parts(dqkv, size);
        let [ld, ldo, lddo, ldd, heads, kv_heads, n, splits] =
            [self.ld, self.ldo, lddo, ldd, self.heads, self.kv_heads, self.n, plan.splits]
                .map(|v| v as i32);
        let Self { out, lse, bounds, orders: [_, rows, keys], .. } = *self;
        let (scale, softcap, window) = self.scores();
        // SAFETY: the caller's buffers.
        unsafe {
            device.launch(
                (BACKWARD, "attention_backward_q"),
                [self.heads, self.n.div_ceil(plan.query.rows)],
                plan.query.threads,
                plan.query.shared,
                args![
                    q, k, v, out, dout, lse, delta, dq, bounds, rows, n, heads, kv_heads, ld, ld,
                    ld, ldo, lddo, ldd, scale, softcap, window
                ],
            )?;
            let names: &[&str] = if plan.key.is_split {
                &["attention_backward_k", "attention_backward_v"]
            } else {
                &["attention_backward_kv"]
            };
            for name in names {
                device.launch(
                    (BACKWARD, name),
                    [self.kv_heads * plan.splits, self.n.div_ceil(plan.key.rows)],
                    plan.key.threads,
                    plan.key.shared,
                    args![
                        q, k, v, dout, lse, delta, dk, dv, partial, bounds, keys, n, heads,
                        kv_heads, ld, ld, ld, lddo, ldd, ldd, scale, softcap, window, splits
                    ],
                )?;
            }
            if plan.splits == 1 {
                return Ok(());
            }
            let quads = self.n * self.kv_heads * self.d / 4;
            let args = args![partial, dk, dv, n, kv_heads, ldd, ldd, splits];
            let kernel = (BACKWARD, "attention_backward_reduce");
            device.launch(kernel, [quads.div_ceil(256), 2], 256, 0, args)
        }
    }

    fn forward_reference(&self, device: &Device) -> Result<(), CudaError> {
        let [q, k, v] = self.parts(self.qkv, device.dtype.size());
        let [ld, ldo, heads, kv_heads, d, n] =
            [self.ld, self.ldo, self.heads, self.kv_heads, self.d, self.n].map(|v| v as i32);
        let (out, lse, start) = (self.out, self.lse, self.start);
        let (scale, softcap, window) = self.scores();
        // SAFETY: the caller's buffers.
        unsafe {
            device.launch(
                (FILE, "attention_reference"),
                [self.n, self.heads],
                128,
                shared(self.longest),
                args![
                    q, k, v, ld, out, ldo, lse, start, heads, kv_heads, d, scale, softcap, window,
                    n
                ],
            )
        }
    }

    fn backward_reference(
        &self,
        device: &Device,
        (dout, lddo): (u64, usize),
        (dqkv, ldd): (u64, usize),
        delta: u64,
    ) -> Result<(), CudaError> {
        let size = device.dtype.size();
        let [q, k, v] = self.parts(self.qkv, size);
        let [dq, dk, dv] = self.parts(dqkv, size);
        let [ld, ldo, lddo, ldd, heads, kv_heads, d, n] =
            [self.ld, self.ldo, lddo, ldd, self.heads, self.kv_heads, self.d, self.n]
                .map(|v| v as i32);
        let Self { out, lse, start, stop, .. } = *self;
        let (scale, softcap, window) = self.scores();
        let all = [self.n, self.heads];
        // SAFETY: the caller's buffers.
        unsafe {
            let delta_args = args![out, ldo, dout, lddo, delta, d, n];
            device.launch((FILE, "attention_delta"), all, 128, 0, delta_args)?;
            device.launch(
                (FILE, "attention_reference_dq"),
                all,
                128,
                shared(self.longest),
                args![
                    q, k, v, ld, dout, lddo, lse, delta, dq, ldd, start, heads, kv_heads, d, scale,
                    softcap, window, n
                ],
            )?;
            device.launch(
                (FILE, "attention_reference_dkv"),
                [self.n, self.kv_heads],
                256,
                shared(2 * self.longest),
                args![
                    q, k, v, ld, dout, lddo, lse, delta, dk, dv, ldd, stop, heads, kv_heads, d,
                    scale, softcap, window, n
                ],
            )
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]
mod tests;
