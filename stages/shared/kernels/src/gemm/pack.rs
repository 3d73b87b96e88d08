//! Packing of operands into the order in which the microkernel reads them.

use std::cell::RefCell;

use super::View;
use crate::simd::{Isa, isa};

thread_local! {
    /// Packing buffers of this thread, kept between calls.
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A packing buffer, given back to its thread when dropped.
pub(super) struct Buffer(Vec<f32>);

impl Buffer {
    pub(super) fn take() -> Self {
        Self(BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default())
    }

    /// A slice of exactly `len` elements with arbitrary content.
    pub(super) fn resized(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len {
            self.0.resize(len, 0.0);
        }
        &mut self.0[..len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        BUFFERS.with_borrow_mut(|all| all.push(buffer));
    }
}

/// Packs `mc` rows of A from `ic`, columns `pc..pc + kc`, into panels of `mr` rows: panel by panel,
/// column by column. Missing rows of the last panel are zero.
pub(super) fn pack_a(
    a: &View<'_>,
    ic: usize,
    mc: usize,
    pc: usize,
    kc: usize,
    mr: usize,
    out: &mut [f32],
) {
    for (panel, out) in out.chunks_exact_mut(mr * kc).enumerate() {
        let first = panel * mr;
        pack_a_panel(a, ic + first, mr.min(mc - first), pc, kc, mr, out);
    }
}

/// One panel of [`pack_a`]: `rows` rows from `row`.
pub(super) fn pack_a_panel(
    a: &View<'_>,
    row: usize,
    rows: usize,
    pc: usize,
    kc: usize,
    mr: usize,
    out: &mut [f32],
) {
    let origin = row * a.row_stride + pc * a.col_stride;
    if a.row_stride == 1 {
        copy_rows(a.data, origin, a.col_stride, rows, mr, out);
    } else {
        if rows < mr {
            out.fill(0.0);
        }
        transpose_into(a, origin, rows, kc, mr, out);
    }
}

/// Packs `cols` columns of B from `col`, rows `pc..pc + kc`, into one panel of `nr` columns: row by
/// row. Missing columns are zero.
pub(super) fn pack_b_panel(
    b: &View<'_>,
    pc: usize,
    kc: usize,
    col: usize,
    cols: usize,
    nr: usize,
    out: &mut [f32],
) {
    let flipped = View { data: b.data, row_stride: b.col_stride, col_stride: b.row_stride };
    pack_a_panel(&flipped, col, cols, pc, kc, nr, out);
}

/// `out[p * width..][..count] = data[origin + p * stride..][..count]`, the rest of each run zero.
fn copy_rows(
    data: &[f32],
    origin: usize,
    stride: usize,
    count: usize,
    width: usize,
    out: &mut [f32],
) {
    // A length that the compiler knows is one or two moves; one that it does not know is a call.
    match (width, count) {
        (6, 6) => copy_whole::<6>(data, origin, stride, out),
        (12, 12) => copy_whole::<12>(data, origin, stride, out),
        (16, 16) => copy_whole::<16>(data, origin, stride, out),
        (32, 32) => copy_whole::<32>(data, origin, stride, out),
        _ => {
            for (p, out) in out.chunks_exact_mut(width).enumerate() {
                let start = origin + p * stride;
                out[..count].copy_from_slice(&data[start..start + count]);
                out[count..].fill(0.0);
            }
        }
    }
}

fn copy_whole<const WIDTH: usize>(data: &[f32], origin: usize, stride: usize, out: &mut [f32]) {
    for (p, out) in out.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
        let start = origin + p * stride;
        *out = *data[start..].first_chunk().expect("invariant: views are checked");
    }
}

/// `out[p * width + i] = view[i, p]` from `origin`.
fn transpose_into(
    view: &View<'_>,
    origin: usize,
    rows: usize,
    kc: usize,
    width: usize,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if view.col_stride == 1 && isa() != Isa::Portable {
        assert!(origin + (rows - 1) * view.row_stride + kc <= view.data.len());
        assert!(rows <= width && kc * width <= out.len());
        // SAFETY: both instruction sets have AVX2, and the bounds were checked.
        unsafe { x86::transpose(&view.data[origin..], view.row_stride, rows, kc, width, out) };
        return;
    }
    for p in 0..kc {
        for i in 0..rows {
            out[p * width + i] = view.data[origin + i * view.row_stride + p * view.col_stride];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, _mm_castps_si128, _mm_storel_epi64, _mm_storeu_ps, _mm256_castps256_ps128,
        _mm256_extractf128_ps, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps,
        _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    /// `out[p * width + i] = data[i * stride + p]` for `i < rows` and `p < kc`.
    ///
    /// # Safety
    /// The machine has AVX2, and both slices hold what is read and written.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose(
        data: &[f32],
        stride: usize,
        rows: usize,
        kc: usize,
        width: usize,
        out: &mut [f32],
    ) {
        for first in (0..rows).step_by(8) {
            let (from, lanes) = (&data[first * stride..], 8.min(rows - first));
            let (from, to) = (from.as_ptr(), out[first..].as_mut_ptr());
            let mut done = 0;
            // SAFETY: the caller vouches for the slices; blocks stay below `kc` and `rows`.
            unsafe {
                match lanes {
                    8 => done = blocks::<8>(from, stride, kc, width, to),
                    6 => done = blocks::<6>(from, stride, kc, width, to),
                    4 => done = blocks::<4>(from, stride, kc, width, to),
                    _ => {}
                }
                for p in done..kc {
                    for i in 0..lanes {
                        *to.add(p * width + i) = *from.add(i * stride + p);
                    }
                }
            }
        }
    }

    /// All whole blocks of eight columns of `LANES` rows; returns the columns done.
    ///
    /// # Safety
    /// As [`transpose`].
    #[target_feature(enable = "avx2")]
    unsafe fn blocks<const LANES: usize>(
        from: *const f32,
        stride: usize,
        kc: usize,
        width: usize,
        to: *mut f32,
    ) -> usize {
        let whole = kc / 8 * 8;
        for p in (0..whole).step_by(8) {
            let mut rows = [_mm256_setzero_ps(); 8];
            for (i, row) in rows.iter_mut().enumerate().take(LANES) {
                // SAFETY: columns `p..p + 8` of row `i` exist.
                *row = unsafe { _mm256_loadu_ps(from.add(i * stride + p)) };
            }
            let columns = turn(rows);
            for (q, column) in columns.into_iter().enumerate() {
                // SAFETY: `LANES` elements from here belong to column `p + q`.
                unsafe { store::<LANES>(to.add((p + q) * width), column) };
            }
        }
        whole
    }

    /// The first `LANES` elements of `x`.
    ///
    /// # Safety
    /// There is room for them.
    #[target_feature(enable = "avx2")]
    unsafe fn store<const LANES: usize>(to: *mut f32, x: __m256) {
        // SAFETY: the caller vouches for `LANES` elements.
        unsafe {
            match LANES {
                8 => _mm256_storeu_ps(to, x),
                6 => {
                    _mm_storeu_ps(to, _mm256_castps256_ps128(x));
                    let high = _mm_castps_si128(_mm256_extractf128_ps::<1>(x));
                    _mm_storel_epi64(to.add(4).cast(), high);
                }
                _ => _mm_storeu_ps(to, _mm256_castps256_ps128(x)),
            }
        }
    }

    /// Transposes eight rows of eight.
    #[target_feature(enable = "avx2")]
    fn turn(r: [__m256; 8]) -> [__m256; 8] {
        let low = |i: usize| _mm256_unpacklo_ps(r[i], r[i + 1]);
        let high = |i: usize| _mm256_unpackhi_ps(r[i], r[i + 1]);
        let (a0, a1, a2, a3) = (low(0), high(0), low(2), high(2));
        let (a4, a5, a6, a7) = (low(4), high(4), low(6), high(6));
        let b = [
            _mm256_shuffle_ps::<0x44>(a0, a2),
            _mm256_shuffle_ps::<0xee>(a0, a2),
            _mm256_shuffle_ps::<0x44>(a1, a3),
            _mm256_shuffle_ps::<0xee>(a1, a3),
            _mm256_shuffle_ps::<0x44>(a4, a6),
            _mm256_shuffle_ps::<0xee>(a4, a6),
            _mm256_shuffle_ps::<0x44>(a5, a7),
            _mm256_shuffle_ps::<0xee>(a5, a7),
        ];
        [
            _mm256_permute2f128_ps::<0x20>(b[0], b[4]),
            _mm256_permute2f128_ps::<0x20>(b[1], b[5]),
            _mm256_permute2f128_ps::<0x20>(b[2], b[6]),
            _mm256_permute2f128_ps::<0x20>(b[3], b[7]),
            _mm256_permute2f128_ps::<0x31>(b[0], b[4]),
            _mm256_permute2f128_ps::<0x31>(b[1], b[5]),
            _mm256_permute2f128_ps::<0x31>(b[2], b[6]),
            _mm256_permute2f128_ps::<0x31>(b[3], b[7]),
        ]
    }
}
