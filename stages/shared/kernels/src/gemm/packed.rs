//! A constant right operand, packed once: what makes small batches (decoding) run at memory speed.

use rayon::prelude::*;

use super::microkernel::microkernel;
use super::pack::{Buffer, pack_a, pack_b_panel};
use super::{Into, KC, PARALLEL_WORK, Tiles, View};

/// Matrix B (k x n) in the order in which the microkernel reads it.
#[derive(Debug)]
pub struct PackedMatrix {
    k: usize,
    n: usize,
    /// Panels of `nr` columns, each `k` rows deep.
    data: Vec<f32>,
}

impl PackedMatrix {
    /// Packs a `k` by `n` matrix.
    ///
    /// # Panics
    /// Where the matrix exceeds its slice.
    pub fn new(k: usize, n: usize, b: View<'_>) -> Self {
        b.check(k, n);
        let nr = microkernel().nr;
        let mut data = vec![0.0; n.div_ceil(nr) * nr * k];
        data.par_chunks_mut(nr * k).enumerate().for_each(|(panel, out)| {
            let col = panel * nr;
            pack_b_panel(&b, 0, k, col, nr.min(n - col), nr, out);
        });
        Self { k, n, data }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.k
    }

    /// Columns of the matrix.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }
}

/// `C (m x n) = or += A (m x k) · B`, B packed. Same bits as [`super::gemm`].
///
/// # Panics
/// Where a matrix exceeds its slice.
pub fn gemm_packed(m: usize, a: View<'_>, b: &PackedMatrix, c: &mut [f32], ldc: usize, into: Into) {
    if m == 0 || b.n == 0 {
        return;
    }
    let (k, n) = (b.k, b.n);
    a.check(m, k);
    assert!(ldc >= n && (m - 1) * ldc + n <= c.len(), "C of {m} x {n} exceeds its slice");
    let kernel = microkernel();
    let (mr, nr) = (kernel.mr, kernel.nr);
    let tiles = Tiles(c.as_mut_ptr());
    let mut a_block = Buffer::take();
    let panels = m.div_ceil(mr);
    // Blocks of depth KC one after another, each holding all panels of A.
    let packed_a = a_block.resized(panels * mr * k);
    for pc in (0..k).step_by(KC) {
        let kc = KC.min(k - pc);
        let out = &mut packed_a[pc * panels * mr..(pc + kc) * panels * mr];
        pack_a(&a, 0, m, pc, kc, mr, out);
    }
    let packed_a: &[f32] = packed_a;
    let one = |(jp, b_panel): (usize, &[f32])| {
        let j = jp * nr;
        let cols = nr.min(n - j);
        for pc in (0..k).step_by(KC) {
            let kc = KC.min(k - pc);
            let b_block = &b_panel[pc * nr..(pc + kc) * nr];
            let a_block = &packed_a[pc * panels * mr..(pc + kc) * panels * mr];
            let fresh = pc == 0 && into == Into::Overwrite;
            for (ip, a_panel) in a_block.chunks_exact(mr * kc).enumerate() {
                let i = ip * mr;
                let rows = mr.min(m - i);
                // SAFETY: every task owns the columns of its panel; bounds of C were checked.
                unsafe {
                    let c = tiles.at(i * ldc + j);
                    kernel.tile(kc, a_panel, b_block, c, ldc, rows, cols, fresh);
                }
            }
        }
    };
    let work = m * n * k;
    if work < PARALLEL_WORK || rayon::current_num_threads() == 1 {
        b.data.chunks_exact(nr * k).enumerate().for_each(one);
    } else {
        b.data.par_chunks_exact(nr * k).with_min_len(4).enumerate().for_each(one);
    }
}
