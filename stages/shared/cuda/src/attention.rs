//! Causal attention inside segments, with grouped queries.

use crate::CudaError;
use crate::device::{Device, args};

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
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d: usize,
    pub(crate) n: usize,
    /// Rows of the longest segment.
    pub(crate) longest: usize,
}

const FILE: &str = "attention_reference.cu";

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

    /// Writes the gradients of q, k and v, side by side in rows of stride `ldd`, from that of `out`.
    pub(crate) fn backward(
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
