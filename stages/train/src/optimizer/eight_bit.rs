//! Moments in one byte each, with one scale for every block of 256 (bitsandbytes' `AdamW8bit`).

use rayon::prelude::*;

use super::dynamic_map::{SIGNED, UNSIGNED, encode};
use super::{Scalars, bitsandbytes_step, read_f32};

/// Elements that share a scale.
const BLOCK: usize = 256;
/// Blocks a task takes.
const BLOCKS: usize = 32;

/// Quantised first and second moment of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BlockStates {
    pub(super) m: Vec<u8>,
    pub(super) v: Vec<u8>,
    /// Greatest magnitude of each block.
    pub(super) m_scale: Vec<f32>,
    pub(super) v_scale: Vec<f32>,
}

impl BlockStates {
    /// All moments zero.
    pub(super) fn new(len: usize) -> Self {
        let blocks = len.div_ceil(BLOCK);
        let (codes, scales) = (vec![0; len], vec![0.0; blocks]);
        Self { m: codes.clone(), v: codes, m_scale: scales.clone(), v_scale: scales }
    }

    /// One update. The parameters move by the moments before these are rounded to their codes.
    pub(super) fn update(&mut self, s: Scalars, p: &mut [f32], g: &[f32]) {
        let step = BLOCK * BLOCKS;
        let codes = self.m.par_chunks_mut(step).zip(self.v.par_chunks_mut(step));
        let scales = self.m_scale.par_chunks_mut(BLOCKS).zip(self.v_scale.par_chunks_mut(BLOCKS));
        p.par_chunks_mut(step).zip(g.par_chunks(step)).zip(codes.zip(scales)).for_each(
            |((p, g), ((m, v), (m_scale, v_scale)))| {
                let codes = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
                let scales = m_scale.iter_mut().zip(v_scale);
                let values = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
                for (((p, g), (m, v)), scales) in values.zip(codes).zip(scales) {
                    update_block(s, p, g, (m, v), scales);
                }
            },
        );
    }

    /// Appends codes and scales to `out`.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.m);
        out.extend_from_slice(&self.v);
        out.extend(self.m_scale.iter().chain(&self.v_scale).flat_map(|x| x.to_le_bytes()));
    }

    /// Takes codes and scales from the front of `bytes`.
    pub(super) fn read(&mut self, bytes: &mut &[u8]) -> Option<()> {
        for codes in [&mut self.m, &mut self.v] {
            let (own, rest) = bytes.split_at_checked(codes.len())?;
            codes.copy_from_slice(own);
            *bytes = rest;
        }
        read_f32(&mut self.m_scale, bytes)?;
        read_f32(&mut self.v_scale, bytes)
    }
}

fn update_block(
    s: Scalars,
    p: &mut [f32],
    g: &[f32],
    (m_codes, v_codes): (&mut [u8], &mut [u8]),
    (m_scale, v_scale): (&mut f32, &mut f32),
) {
    let (signed, unsigned) = (&*SIGNED, &*UNSIGNED);
    let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    let (mut m_max, mut v_max) = (0.0f32, 0.0f32);
    for i in 0..p.len() {
        m[i] = signed[m_codes[i] as usize] * *m_scale * s.beta1 + s.one_minus_beta1 * g[i];
        v[i] = unsigned[v_codes[i] as usize] * *v_scale * s.beta2 + s.one_minus_beta2 * g[i] * g[i];
        m_max = m_max.max(m[i].abs());
        v_max = v_max.max(v[i].abs());
        p[i] = bitsandbytes_step(s, p[i], m[i], v[i]);
    }
    // A block of zeros keeps a scale of zero; dividing by one gives the code of zero.
    let divisor = |max: f32| if max > 0.0 { max } else { 1.0 };
    for i in 0..p.len() {
        m_codes[i] = encode_signed(signed, m[i] / divisor(m_max), m[i]);
        v_codes[i] = encode(unsigned, v[i] / divisor(v_max));
    }
    (*m_scale, *v_scale) = (m_max, v_max);
}

/// Code of `x`, moved by one where rounding lost the sign of `m`.
fn encode_signed(map: &[f32; 256], x: f32, m: f32) -> u8 {
    let code = encode(map, x);
    if map[code as usize].is_sign_negative() == m.is_sign_negative() {
        code
    } else if m > 0.0 {
        code + 1
    } else {
        code - 1
    }
}
