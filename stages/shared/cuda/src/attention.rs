//! Causal attention inside segments, with grouped queries.

use crate::CudaError;
use crate::device::{Device, Dtype, args};

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
}

const FILE: &str = "attention_reference.cu";
const FORWARD: &str = "attention_forward.cu";
const BACKWARD: &str = "attention_backward.cu";

impl Attention {
    fn parts(&self, base: u64, size: u64) -> [u64; 3] {
        let (q, kv) = ((self.heads * self.d) as u64, (self.kv_heads * self.d) as u64);
        [base, base + q * size, base + (q + kv) * size]
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
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
        let (scale, softcap, window) = (self.scale(), 0.0f32, 0i32);
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
        let (scale, softcap, window) = (self.scale(), 0.0f32, 0i32);
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
        let (out, lse, start, scale) = (self.out, self.lse, self.start, self.scale());
        // SAFETY: the caller's buffers.
        unsafe {
            device.launch(
                (FILE, "attention_reference"),
                [self.n, self.heads],
                128,
                self.longest * 4,
                args![q, k, v, ld, out, ldo, lse, start, heads, kv_heads, d, scale, n],
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
        let scale = self.scale();
        let all = [self.n, self.heads];
        // SAFETY: the caller's buffers.
        unsafe {
            let delta_args = args![out, ldo, dout, lddo, delta, d, n];
            device.launch((FILE, "attention_delta"), all, 128, 0, delta_args)?;
            device.launch(
                (FILE, "attention_reference_dq"),
                all,
                128,
                self.longest * 4,
                args![
                    q, k, v, ld, dout, lddo, lse, delta, dq, ldd, start, heads, kv_heads, d, scale,
                    n
                ],
            )?;
            device.launch(
                (FILE, "attention_reference_dkv"),
                [self.n, self.kv_heads],
                256,
                self.longest * 8,
                args![
                    q, k, v, ld, dout, lddo, lse, delta, dk, dv, ldd, stop, heads, kv_heads, d,
                    scale, n
                ],
            )
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]
mod tests {
    use super::*;
    use crate::device::Buffer;

    /// The GPU, or nothing and a word about it.
    fn gpu(dtype: Dtype, head_dim: usize) -> Option<Device> {
        let device = Device::open(0, dtype).map_err(|e| eprintln!("skipped: {e}")).ok()?;
        device.head_dim.set(head_dim);
        Some(device)
    }

    fn random(device: &Device, count: usize, seed: u64) -> Buffer {
        let buffer = device.elements(count).unwrap();
        let (ptr, number, scale, seed) = (buffer.ptr(), count as u64, 1.0f32, seed << 40);
        // SAFETY: as many elements as were allocated.
        unsafe {
            let args = args![ptr, seed, scale, number];
            let grid = [count.div_ceil(256), 1];
            device.launch(("nf4.cu", "random_normal"), grid, 256, 0, args).unwrap();
        }
        buffer
    }

    fn floats(device: &Device, buffer: &Buffer, count: usize) -> Vec<f32> {
        let size = device.dtype.size() as usize;
        let bytes = device.read(buffer, count * size).unwrap();
        let decode = |b: &[u8]| match device.dtype {
            Dtype::F32 => f32::from_le_bytes(b.try_into().unwrap()),
            Dtype::Bf16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32(),
            Dtype::F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_f32(),
        };
        bytes.chunks_exact(size).map(decode).collect()
    }

    fn off(a: &[f32], b: &[f32]) -> f64 {
        let norm = |x: f64| x * x;
        let difference: f64 = a.iter().zip(b).map(|(a, b)| norm(f64::from(a - b))).sum();
        (difference / b.iter().map(|b| norm(f64::from(*b))).sum::<f64>()).sqrt()
    }

    /// Segments as `(start, stop)` of every row.
    struct Bounds {
        start: Buffer,
        stop: Buffer,
        pairs: Buffer,
        orders: [Buffer; 3],
        n: usize,
    }

    fn bounds(device: &Device, plan: &Plan, lengths: &[usize]) -> Bounds {
        let (mut start, mut stop, mut n) = (Vec::new(), Vec::new(), 0usize);
        for length in lengths {
            for _ in 0..*length {
                start.push(n as i32);
                stop.push((n + length) as i32);
            }
            n += length;
        }
        let upload = |values: &[i32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            device.upload(&bytes).unwrap()
        };
        let orders = plan.orders(&start, &stop).map(|order| upload(&order));
        let pairs: Vec<i32> = start.iter().zip(&stop).flat_map(|(a, b)| [*a, *b]).collect();
        Bounds { start: upload(&start), stop: upload(&stop), pairs: upload(&pairs), orders, n }
    }

    #[test]
    fn fast_attention_equals_its_slow_twin() {
        let cases: [(&[usize], usize, usize, usize, Dtype); 6] = [
            (&[1], 2, 1, 64, Dtype::Bf16),
            (&[200], 4, 2, 128, Dtype::Bf16),
            (&[1, 63, 64, 65, 300, 7, 129], 9, 3, 64, Dtype::Bf16),
            (&[5, 500, 31, 128, 256, 3], 16, 2, 128, Dtype::Bf16),
            (&[130, 127], 8, 8, 128, Dtype::F16),
            (&[1000, 24], 3, 1, 64, Dtype::F16),
        ];
        for (lengths, heads, kv_heads, d, dtype) in cases {
            let Some(device) = gpu(dtype, d) else { return };
            let n: usize = lengths.iter().sum();
            let Some(plan) = Plan::new(&device, (heads, kv_heads, d), n).unwrap() else { continue };
            let bounds = bounds(&device, &plan, lengths);
            assert_eq!(bounds.n, n);
            let (ld, ldo) = ((heads + 2 * kv_heads) * d, heads * d + 16);
            let (qkv, dout) = (random(&device, n * ld, 1), random(&device, n * ldo, 2));
            let mut results: Vec<[Vec<f32>; 3]> = Vec::new();
            for kind in ["fast", "again", "slow"] {
                // Poison: whatever is not written shows.
                let (out, dqkv) = (random(&device, n * ldo, 9), random(&device, n * ld, 10));
                let [lse, delta] = [(); 2].map(|()| device.alloc((n * heads * 4) as u64).unwrap());
                let bytes = plan.scratch_bytes(kv_heads, d, n);
                let parts = device.alloc(bytes).unwrap();
                let longest = lengths.iter().copied().max().unwrap();
                let (out_ptr, lse_ptr) = (out.ptr(), lse.ptr());
                let attention = Attention {
                    plan: Some(plan),
                    bounds: bounds.pairs.ptr(),
                    qkv: qkv.ptr(),
                    ld,
                    out: out_ptr,
                    ldo,
                    lse: lse_ptr,
                    start: bounds.start.ptr(),
                    stop: bounds.stop.ptr(),
                    orders: bounds.orders.each_ref().map(Buffer::ptr),
                    heads,
                    kv_heads,
                    d,
                    n,
                    longest,
                };
                let (to, from) = ((dqkv.ptr(), ld), (dout.ptr(), ldo));
                if kind == "slow" {
                    attention.forward_reference(&device).unwrap();
                    attention.backward_reference(&device, from, to, delta.ptr()).unwrap();
                } else {
                    attention.forward(&device).unwrap();
                    let scratch = (delta.ptr(), parts.ptr());
                    attention.backward(&device, from, to, scratch).unwrap();
                }
                let mut out = floats(&device, &out, n * ldo);
                out.chunks_exact_mut(ldo).for_each(|row| row[heads * d..].fill(0.0));
                let lse = device.read_f32(&lse, n * heads).unwrap();
                results.push([out, lse, floats(&device, &dqkv, n * ld)]);
            }
            assert_eq!(results[0], results[1], "two runs differ");
            let limit = if dtype == Dtype::Bf16 { 8e-3 } else { 2e-3 };
            for (name, (fast, slow)) in
                ["out", "lse", "dqkv"].iter().zip(results[0].iter().zip(&results[2]))
            {
                let off = off(fast, slow);
                eprintln!("{lengths:?} {heads}/{kv_heads} d{d} {dtype:?} {name}: {off:.1e}");
                assert!(off < limit, "{name}: {off}");
            }
        }
    }

    /// Times of one shape, for the eye: `cargo test -p cuda attention_times -- --ignored`.
    #[test]
    #[ignore = "prints times; needs a GPU"]
    fn attention_times() {
        for (heads, kv_heads, d, lengths) in [
            (16, 16, 128, vec![2048; 2]),
            (16, 2, 128, vec![2048; 2]),
            (16, 2, 128, vec![512; 8]),
            (9, 3, 64, vec![2048; 2]),
        ] {
            let Some(device) = gpu(Dtype::Bf16, d) else { return };
            let n: usize = lengths.iter().sum();
            let plan = Plan::new(&device, (heads, kv_heads, d), n).unwrap().unwrap();
            let bounds = bounds(&device, &plan, &lengths);
            assert_eq!(bounds.n, n);
            let (ld, ldo) = ((heads + 2 * kv_heads) * d, heads * d);
            let (qkv, dout) = (random(&device, n * ld, 1), random(&device, n * ldo, 2));
            let (out, dqkv) = (random(&device, n * ldo, 9), random(&device, n * ld, 10));
            let [lse, delta] = [(); 2].map(|()| device.alloc((n * heads * 4) as u64).unwrap());
            let parts = device.alloc(plan.scratch_bytes(kv_heads, d, n)).unwrap();
            let attention = Attention {
                plan: Some(plan),
                bounds: bounds.pairs.ptr(),
                qkv: qkv.ptr(),
                ld,
                out: out.ptr(),
                ldo,
                lse: lse.ptr(),
                start: bounds.start.ptr(),
                stop: bounds.stop.ptr(),
                orders: bounds.orders.each_ref().map(Buffer::ptr),
                heads,
                kv_heads,
                d,
                n,
                longest: lengths[0],
            };
            for round in 0..40 {
                if round == 10 {
                    device.start_profile();
                }
                attention.forward(&device).unwrap();
                let scratch = (delta.ptr(), parts.ptr());
                attention.backward(&device, (dout.ptr(), ldo), (dqkv.ptr(), ld), scratch).unwrap();
            }
            eprintln!("heads {heads}/{kv_heads} d{d} segments {}x{}", lengths.len(), lengths[0]);
            for (class, (time, count)) in device.finish_profile().unwrap() {
                eprintln!("  {class:16} {:.4} ms", time / count as f64);
            }
        }
    }
}
