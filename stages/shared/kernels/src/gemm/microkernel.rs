//! The innermost loop: one tile of C in registers, one chain of fused multiply-adds an element.

use crate::simd::{Isa, isa};

/// Largest tile of any microkernel, for edge tiles.
const MAX_TILE: usize = 12 * 32;

/// A tile routine and its shape.
pub(super) struct Microkernel {
    /// Rows of the tile.
    pub(super) mr: usize,
    /// Columns of the tile.
    pub(super) nr: usize,
    /// `(kc, a, b, c, ldc, fresh)`: `c` tile = (`fresh` ? 0 : c) + a panel · b panel.
    run: unsafe fn(usize, *const f32, *const f32, *mut f32, usize, bool),
}

#[cfg(target_arch = "x86_64")]
static AVX512: Microkernel = Microkernel { mr: 12, nr: 32, run: x86::tile_12x32 };
#[cfg(target_arch = "x86_64")]
static AVX2: Microkernel = Microkernel { mr: 6, nr: 16, run: x86::tile_6x16 };
static PORTABLE: Microkernel = Microkernel { mr: 4, nr: 16, run: tile_portable };

/// The microkernel of this machine.
pub(super) fn microkernel() -> &'static Microkernel {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &AVX2,
        _ => &PORTABLE,
    }
}

impl Microkernel {
    /// One tile, whole or at an edge.
    ///
    /// # Safety
    /// `c` points to a `rows` by `cols` tile with rows `ldc` apart that no other thread touches.
    pub(super) unsafe fn tile(
        &self,
        kc: usize,
        a: &[f32],
        b: &[f32],
        c: *mut f32,
        ldc: usize,
        rows: usize,
        cols: usize,
        fresh: bool,
    ) {
        debug_assert!(a.len() == self.mr * kc && b.len() == self.nr * kc);
        if rows == self.mr && cols == self.nr {
            // SAFETY: a whole tile, and panels of depth `kc`.
            unsafe { (self.run)(kc, a.as_ptr(), b.as_ptr(), c, ldc, fresh) };
            return;
        }
        let mut edge = [0.0f32; MAX_TILE];
        for i in 0..rows {
            // SAFETY: `rows` and `cols` bound the tile behind `c`, and `edge` is large enough.
            unsafe {
                let from = c.add(i * ldc);
                edge.as_mut_ptr().add(i * self.nr).copy_from_nonoverlapping(from, cols);
            }
        }
        // SAFETY: `edge` holds a whole tile.
        unsafe {
            (self.run)(kc, a.as_ptr(), b.as_ptr(), edge.as_mut_ptr(), self.nr, fresh);
        }
        for i in 0..rows {
            // SAFETY: as above.
            unsafe {
                c.add(i * ldc).copy_from_nonoverlapping(edge.as_ptr().add(i * self.nr), cols);
            }
        }
    }
}

/// 4 x 16 in plain Rust.
///
/// # Safety
/// As [`Microkernel::tile`] for a whole tile.
unsafe fn tile_portable(
    kc: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    fresh: bool,
) {
    let mut acc = [[0.0f32; 16]; 4];
    for (i, row) in acc.iter_mut().enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            if !fresh {
                // SAFETY: inside the tile.
                *value = unsafe { *c.add(i * ldc + j) };
            }
        }
    }
    for p in 0..kc {
        for (i, row) in acc.iter_mut().enumerate() {
            // SAFETY: inside the panel.
            let x = unsafe { *a.add(p * 4 + i) };
            for (j, value) in row.iter_mut().enumerate() {
                // SAFETY: inside the panel.
                *value = x.mul_add(unsafe { *b.add(p * 16 + j) }, *value);
            }
        }
    }
    for (i, row) in acc.iter().enumerate() {
        for (j, value) in row.iter().enumerate() {
            // SAFETY: inside the tile.
            unsafe { *c.add(i * ldc + j) = *value };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    /// 6 x 16: twelve accumulators of eight lanes, two of B, one broadcast of A.
    ///
    /// # Safety
    /// As [`super::Microkernel::tile`] for a whole tile, on a machine with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile_6x16(
        kc: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        ldc: usize,
        fresh: bool,
    ) {
        // SAFETY: the caller vouches for the tile and for panels of depth `kc`.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; 6];
            if !fresh {
                for i in 0..6 {
                    acc[i][0] = _mm256_loadu_ps(c.add(i * ldc));
                    acc[i][1] = _mm256_loadu_ps(c.add(i * ldc + 8));
                }
            }
            for _ in 0..kc {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for i in 0..6 {
                    let x = _mm256_broadcast_ss(&*a.add(i));
                    acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
                    acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
                }
                a = a.add(6);
                b = b.add(16);
            }
            for i in 0..6 {
                _mm256_storeu_ps(c.add(i * ldc), acc[i][0]);
                _mm256_storeu_ps(c.add(i * ldc + 8), acc[i][1]);
            }
        }
    }

    /// 12 x 32: twenty-four accumulators of sixteen lanes, two of B, one broadcast of A.
    ///
    /// # Safety
    /// As [`super::Microkernel::tile`] for a whole tile, on a machine with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn tile_12x32(
        kc: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        ldc: usize,
        fresh: bool,
    ) {
        // SAFETY: the caller vouches for the tile and for panels of depth `kc`.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; 12];
            if !fresh {
                for i in 0..12 {
                    acc[i][0] = _mm512_loadu_ps(c.add(i * ldc));
                    acc[i][1] = _mm512_loadu_ps(c.add(i * ldc + 16));
                }
            }
            for _ in 0..kc {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for i in 0..12 {
                    let x = _mm512_set1_ps(*a.add(i));
                    acc[i][0] = _mm512_fmadd_ps(x, b0, acc[i][0]);
                    acc[i][1] = _mm512_fmadd_ps(x, b1, acc[i][1]);
                }
                a = a.add(12);
                b = b.add(32);
            }
            for i in 0..12 {
                _mm512_storeu_ps(c.add(i * ldc), acc[i][0]);
                _mm512_storeu_ps(c.add(i * ldc + 16), acc[i][1]);
            }
        }
    }
}
