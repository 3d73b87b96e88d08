//! Causal attention inside segments, with grouped queries.

use crate::CudaError;
use crate::device::{Device, Dtype, args};

/// Where an attention reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Attention {
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
    /// Tiles of 128 queries and of 128 keys, longest work first; see [`tile_orders`].
    pub(crate) orders: [u64; 2],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d: usize,
    pub(crate) n: usize,
    /// Rows of the longest segment.
    pub(crate) longest: usize,
}

const FILE: &str = "attention_reference.cu";
const FLASH: &str = "flash.cu";
/// Queries or keys of a block.
const TILE: usize = 128;

/// The orders in which blocks take tiles of queries and of keys: longest work first, so that the
/// last blocks to start are short. `start` and `stop` bound each row's segment.
pub(crate) fn tile_orders(start: &[i32], stop: &[i32]) -> [Vec<i32>; 2] {
    let n = start.len();
    let sorted = |work: &dyn Fn(usize, usize) -> i32| {
        let mut tiles: Vec<i32> = (0..n.div_ceil(TILE) as i32).collect();
        tiles.sort_by_key(|tile| {
            let first = *tile as usize * TILE;
            -work(first, (first + TILE).min(n) - 1)
        });
        tiles
    };
    [
        sorted(&|first, last| last as i32 - start[first]),
        sorted(&|first, last| stop[last] - first as i32),
    ]
}

impl Attention {
    fn parts(&self, base: u64, size: u64) -> [u64; 3] {
        let (q, kv) = ((self.heads * self.d) as u64, (self.kv_heads * self.d) as u64);
        [base, base + q * size, base + (q + kv) * size]
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// Whether the fast kernels serve this shape on this device.
    fn is_fast(&self, device: &Device) -> bool {
        device.dtype != Dtype::F32 && matches!(self.d, 64 | 128) && device.has_async_copies()
    }

    /// Bytes of scratch that [`Attention::backward`] needs.
    pub(crate) fn scratch_bytes(heads: usize, d: usize, n: usize) -> u64 {
        (n * heads * d) as u64 * 8
    }

    /// Writes `out` and `lse`.
    pub(crate) fn forward(&self, device: &Device) -> Result<(), CudaError> {
        if !self.is_fast(device) {
            return self.forward_reference(device);
        }
        let [q, k, v] = self.parts(self.qkv, device.dtype.size());
        let [ld, ldo, heads, kv_heads, n] =
            [self.ld, self.ldo, self.heads, self.kv_heads, self.n].map(|v| v as i32);
        let (out, lse, start, scale) = (self.out, self.lse, self.start, self.scale());
        let order = self.orders[0];
        let shared = (128 + 4 * 64) * self.d * 2;
        // SAFETY: the caller's buffers.
        unsafe {
            device.launch(
                (FLASH, "flash_forward"),
                [self.heads, self.n.div_ceil(TILE)],
                128,
                shared,
                args![q, k, v, ld, out, ldo, lse, start, order, heads, kv_heads, scale, n],
            )
        }
    }

    /// Writes the gradients of q, k and v, side by side in rows of stride `ldd`, from that of `out`.
    /// `delta` has the shape of `lse`; `parts` has [`Attention::scratch_bytes`].
    pub(crate) fn backward(
        &self,
        device: &Device,
        (dout, lddo): (u64, usize),
        (dqkv, ldd): (u64, usize),
        (delta, parts): (u64, u64),
    ) -> Result<(), CudaError> {
        if !self.is_fast(device) {
            return self.backward_reference(device, (dout, lddo), (dqkv, ldd), delta);
        }
        let size = device.dtype.size();
        let [q, k, v] = self.parts(self.qkv, size);
        let [dq, dk, dv] = self.parts(dqkv, size);
        let [ld, ldo, lddo, ldd, heads, kv_heads, n] =
            [self.ld, self.ldo, lddo, ldd, self.heads, self.kv_heads, self.n].map(|v| v as i32);
        let Self { out, lse, start, stop, .. } = *self;
        let scale = self.scale();
        let (tiles, [rows, keys]) = ([self.heads, self.n.div_ceil(TILE)], self.orders);
        let (dq_shared, dkv_shared) =
            ((2 * 128 + 4 * 32) * self.d * 2, (2 * 128 + 4 * 64) * self.d * 2 + 4 * 64 * 4);
        // SAFETY: the caller's buffers.
        unsafe {
            let delta_args = args![out, ldo, dout, lddo, delta, heads, n];
            let grid = [(self.n * self.heads).div_ceil(8), 1];
            device.launch((FLASH, "flash_delta"), grid, 256, 0, delta_args)?;
            device.launch(
                (FLASH, "flash_dq"),
                tiles,
                128,
                dq_shared,
                args![
                    q, k, v, ld, dout, lddo, lse, delta, dq, ldd, start, rows, heads, kv_heads,
                    scale, n
                ],
            )?;
            device.launch(
                (FLASH, "flash_dkv"),
                tiles,
                256,
                dkv_shared,
                args![
                    q, k, v, ld, dout, lddo, lse, delta, parts, stop, keys, heads, kv_heads, scale,
                    n
                ],
            )?;
            let grid = [(self.n * self.kv_heads * self.d).div_ceil(256), 2];
            let args = args![parts, dk, dv, ldd, heads, kv_heads, n];
            device.launch((FLASH, "flash_gather"), grid, 256, 0, args)
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
        orders: [Buffer; 2],
        n: usize,
    }

    fn bounds(device: &Device, lengths: &[usize]) -> Bounds {
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
        let orders = tile_orders(&start, &stop).map(|order| upload(&order));
        Bounds { start: upload(&start), stop: upload(&stop), orders, n }
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
            let bounds = bounds(&device, lengths);
            let n = bounds.n;
            let (ld, ldo) = ((heads + 2 * kv_heads) * d, heads * d + 16);
            let (qkv, dout) = (random(&device, n * ld, 1), random(&device, n * ldo, 2));
            let mut results: Vec<[Vec<f32>; 3]> = Vec::new();
            for kind in ["fast", "again", "slow"] {
                // Poison: whatever is not written shows.
                let (out, dqkv) = (random(&device, n * ldo, 9), random(&device, n * ld, 10));
                let [lse, delta] = [(); 2].map(|()| device.alloc((n * heads * 4) as u64).unwrap());
                let bytes = Attention::scratch_bytes(heads, d, n);
                let parts = device.alloc(bytes).unwrap();
                let longest = lengths.iter().copied().max().unwrap();
                let (out_ptr, lse_ptr) = (out.ptr(), lse.ptr());
                let attention = Attention {
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
            let bounds = bounds(&device, &lengths);
            let n = bounds.n;
            let (ld, ldo) = ((heads + 2 * kv_heads) * d, heads * d);
            let (qkv, dout) = (random(&device, n * ld, 1), random(&device, n * ldo, 2));
            let (out, dqkv) = (random(&device, n * ldo, 9), random(&device, n * ld, 10));
            let [lse, delta] = [(); 2].map(|()| device.alloc((n * heads * 4) as u64).unwrap());
            let parts = device.alloc(Attention::scratch_bytes(heads, d, n)).unwrap();
            let attention = Attention {
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
