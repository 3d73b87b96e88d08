//! `C = A·B` or `C += A·B` in f32, with one order of summation.
//!
//! Every element of C is one chain of fused multiply-adds over the inner dimension, in ascending
//! order, started from zero or from the C that was there: blocking, threads, instruction set and
//! the number of rows never change a bit. The blocking is Goto and van de Geijn's ("Anatomy of
//! High-Performance Matrix Multiplication", 2008): B is packed into panels that stay in the last
//! cache level, A into panels that stay in the second, and a microkernel keeps a tile of C in
//! registers.

mod microkernel;
mod pack;
mod packed;

use rayon::prelude::*;

use microkernel::{Microkernel, microkernel};
use pack::{pack_a_panel, pack_b_panel};
pub use packed::{PackedMatrix, gemm_packed};

/// Largest inner-dimension block: a panel of B (16 or 32 columns) of this depth fits in L1.
const KC: usize = 320;
/// Rows of a block of A: with [`KC`] it fits in L2. A multiple of every microkernel's rows.
const MC: usize = 96;
/// Columns of a block of B: with [`KC`] it is 3 MiB, for L3.
const NC: usize = 3072;
/// Below this many multiply-adds threads cost more than they bring.
const PARALLEL_WORK: usize = 1 << 19;

/// A matrix inside a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Elements.
    pub data: &'a [f32],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major with rows `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    /// The transpose of a row-major matrix with rows `stride` apart.
    pub fn transposed(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: 1, col_stride: stride }
    }

    /// Panics unless a `rows` by `cols` matrix lies inside the slice.
    fn check(&self, rows: usize, cols: usize) {
        let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
        assert!(last < self.data.len(), "matrix of {rows} x {cols} exceeds its slice");
    }
}

/// One product of a chain: A (m x k) · B (k x n).
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// Inner dimension.
    pub k: usize,
    /// Left operand.
    pub a: View<'a>,
    /// Right operand.
    pub b: View<'a>,
}

/// A run of one term's inner dimension inside a block.
#[derive(Clone, Copy)]
struct Span<'a> {
    term: Term<'a>,
    /// First index within the term.
    start: usize,
    /// Length of the run.
    len: usize,
    /// Where the run begins within the block.
    offset: usize,
}

/// The runs that make up the inner indices `pc..pc + kc` of a chain.
fn spans<'a>(terms: &[Term<'a>], pc: usize, kc: usize) -> Vec<Span<'a>> {
    let mut found = Vec::with_capacity(terms.len());
    let mut first = 0;
    for &term in terms {
        let (from, to) = (pc.max(first), (pc + kc).min(first + term.k));
        if from < to {
            found.push(Span { term, start: from - first, len: to - from, offset: from - pc });
        }
        first += term.k;
    }
    found
}

/// What happens to the C that was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// `C = A·B`.
    Overwrite,
    /// `C += A·B`, the old C being the first term of the chain.
    Accumulate,
}

/// A pointer that threads may share; each writes tiles of its own.
#[derive(Clone, Copy)]
struct Tiles(*mut f32);
// SAFETY: only used to hand disjoint tiles of one exclusive slice to threads.
unsafe impl Send for Tiles {}
// SAFETY: as above.
unsafe impl Sync for Tiles {}

impl Tiles {
    /// Keeps closures from capturing the bare pointer.
    fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: callers stay inside the slice whose bounds `gemm` checked.
        unsafe { self.0.add(offset) }
    }
}

/// `C (m x n, row-major, rows ldc apart) = or += A (m x k) · B (k x n)`, on all threads where the
/// work is worth it.
///
/// # Panics
/// Where a matrix exceeds its slice.
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    ldc: usize,
    into: Into,
) {
    gemm_chain(m, n, &[Term { k, a, b }], c, ldc, into);
}

/// `C = or += A₁·B₁ + A₂·B₂ + …`: the bits of one [`gemm`] after another, the later ones
/// accumulating, for one pass over C.
///
/// # Panics
/// Where a matrix exceeds its slice.
pub fn gemm_chain(m: usize, n: usize, terms: &[Term<'_>], c: &mut [f32], ldc: usize, into: Into) {
    let work = m * n * terms.iter().map(|t| t.k).sum::<usize>();
    let parallel = work >= PARALLEL_WORK && rayon::current_num_threads() > 1;
    blocked(m, n, terms, c, ldc, into, parallel);
}

/// [`gemm`] on the calling thread alone, for use inside parallel loops. Same bits.
///
/// # Panics
/// Where a matrix exceeds its slice.
pub fn gemm_serial(
    m: usize,
    n: usize,
    k: usize,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    ldc: usize,
    into: Into,
) {
    blocked(m, n, &[Term { k, a, b }], c, ldc, into, false);
}

fn blocked(
    m: usize,
    n: usize,
    terms: &[Term<'_>],
    c: &mut [f32],
    ldc: usize,
    into: Into,
    parallel: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(ldc >= n && (m - 1) * ldc + n <= c.len(), "C of {m} x {n} exceeds its slice");
    let k: usize = terms.iter().map(|t| t.k).sum();
    if k == 0 {
        if into == Into::Overwrite {
            (0..m).for_each(|i| c[i * ldc..i * ldc + n].fill(0.0));
        }
        return;
    }
    for term in terms.iter().filter(|t| t.k > 0) {
        term.a.check(m, term.k);
        term.b.check(term.k, n);
    }
    let kernel = microkernel();
    let tiles = Tiles(c.as_mut_ptr());
    // Blocks of about one size: a short last one would sweep over C for little work.
    let depth = k.div_ceil(k.div_ceil(KC));
    let mut b_block = pack::Buffer::take();
    for jc in (0..n).step_by(NC) {
        let nc = NC.min(n - jc);
        let panels = nc.div_ceil(kernel.nr);
        for pc in (0..k).step_by(depth) {
            let kc = depth.min(k - pc);
            let spans = spans(terms, pc, kc);
            let packed_b = b_block.resized(panels * kernel.nr * kc);
            let pack_one = |(p, out): (usize, &mut [f32])| {
                let col = jc + p * kernel.nr;
                let cols = kernel.nr.min(n - col);
                for s in &spans {
                    let out = &mut out[s.offset * kernel.nr..][..s.len * kernel.nr];
                    pack_b_panel(&s.term.b, s.start, s.len, col, cols, kernel.nr, out);
                }
            };
            if parallel {
                packed_b.par_chunks_mut(kernel.nr * kc).enumerate().for_each(pack_one);
            } else {
                packed_b.chunks_mut(kernel.nr * kc).enumerate().for_each(pack_one);
            }
            let packed_b: &[f32] = packed_b;
            let fresh = pc == 0 && into == Into::Overwrite;
            let rows = row_block(m, kernel.mr, parallel);
            let one = |block: usize| {
                let ic = block * rows;
                let mc = rows.min(m - ic);
                let mut a_block = pack::Buffer::take();
                let packed_a = a_block.resized(mc.div_ceil(kernel.mr) * kernel.mr * kc);
                for (panel, out) in packed_a.chunks_exact_mut(kernel.mr * kc).enumerate() {
                    let first = panel * kernel.mr;
                    let rows = kernel.mr.min(mc - first);
                    for s in &spans {
                        let out = &mut out[s.offset * kernel.mr..][..s.len * kernel.mr];
                        let row = ic + first;
                        pack_a_panel(&s.term.a, row, rows, s.start, s.len, kernel.mr, out);
                    }
                }
                // SAFETY: blocks of rows are disjoint and inside C, which was checked above.
                unsafe {
                    tile_block(
                        kernel,
                        mc,
                        nc,
                        kc,
                        packed_a,
                        packed_b,
                        tiles.at(ic * ldc + jc),
                        ldc,
                        fresh,
                    );
                }
            };
            let blocks = m.div_ceil(rows);
            if parallel {
                (0..blocks).into_par_iter().for_each(one);
            } else {
                (0..blocks).for_each(one);
            }
        }
    }
}

/// Rows of A a task takes: [`MC`], or less where all threads would not get a block.
fn row_block(m: usize, mr: usize, parallel: bool) -> usize {
    if !parallel {
        return MC;
    }
    let threads = rayon::current_num_threads();
    let share = m.div_ceil(2 * threads).div_ceil(mr) * mr;
    share.clamp(mr, MC)
}

/// Multiplies packed panels into a block of C.
///
/// # Safety
/// `c` points to an `mc` by `nc` block with rows `ldc` apart that no other thread touches; the
/// packed slices hold whole panels of depth `kc`.
unsafe fn tile_block(
    kernel: &Microkernel,
    mc: usize,
    nc: usize,
    kc: usize,
    packed_a: &[f32],
    packed_b: &[f32],
    c: *mut f32,
    ldc: usize,
    fresh: bool,
) {
    let (mr, nr) = (kernel.mr, kernel.nr);
    for (jp, b_panel) in packed_b.chunks_exact(nr * kc).enumerate() {
        let j = jp * nr;
        let cols = nr.min(nc - j);
        for (ip, a_panel) in packed_a.chunks_exact(mr * kc).enumerate() {
            let i = ip * mr;
            let rows = mr.min(mc - i);
            // SAFETY: the tile lies inside the block by construction.
            unsafe {
                kernel.tile(kc, a_panel, b_panel, c.add(i * ldc + j), ldc, rows, cols, fresh);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The chain of fused multiply-adds that defines the result.
    fn reference(m: usize, n: usize, k: usize, a: View, b: View, c: &mut [f32], ldc: usize) {
        for i in 0..m {
            for j in 0..n {
                let mut sum = c[i * ldc + j];
                for p in 0..k {
                    let x = a.data[i * a.row_stride + p * a.col_stride];
                    let y = b.data[p * b.row_stride + j * b.col_stride];
                    sum = x.mul_add(y, sum);
                }
                c[i * ldc + j] = sum;
            }
        }
    }

    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_bit_equals_the_chain_that_defines_it(
            m in 1usize..130, n in 1usize..90, k in 0usize..600, ta: bool, tb: bool, acc: bool,
        ) {
            let (a, b) = (numbers(m * k.max(1), 1), numbers(k.max(1) * n, 2));
            let a = if ta { View::transposed(&a, m) } else { View::rows(&a, k) };
            let b = if tb { View::transposed(&b, k) } else { View::rows(&b, n) };
            let ldc = n + 3;
            let start = numbers(m * ldc, 3);
            let mut expected = start.clone();
            if !acc {
                for i in 0..m { expected[i * ldc..i * ldc + n].fill(0.0); }
            }
            reference(m, n, k, a, b, &mut expected, ldc);
            let into = if acc { Into::Accumulate } else { Into::Overwrite };
            for f in [gemm, gemm_serial] {
                let mut c = start.clone();
                f(m, n, k, a, b, &mut c, ldc, into);
                prop_assert_eq!(&c, &expected);
            }
        }

        #[test]
        fn a_chain_has_the_bits_of_its_products_one_after_another(
            m in 1usize..40, n in 1usize..70, k in proptest::array::uniform3(0usize..400), acc: bool,
        ) {
            let operands = k.map(|k| (k, numbers(m * k.max(1), 6), numbers(k.max(1) * n, 7)));
            let start = numbers(m * n, 8);
            let (mut chained, mut expected) = (start.clone(), start);
            let mut into = if acc { Into::Accumulate } else { Into::Overwrite };
            let terms = operands.each_ref().map(|(k, a, b)| Term {
                k: *k,
                a: View::transposed(a, m),
                b: View::transposed(b, (*k).max(1)),
            });
            gemm_chain(m, n, &terms, &mut chained, n, into);
            for t in terms {
                gemm(m, n, t.k, t.a, t.b, &mut expected, n, into);
                into = Into::Accumulate;
            }
            prop_assert_eq!(chained, expected);
        }

        #[test]
        fn packed_weights_give_the_same_bits(m in 1usize..60, n in 1usize..200, k in 1usize..600) {
            let (x, w) = (numbers(m * k, 4), numbers(n * k, 5));
            let mut expected = vec![0.0; m * n];
            let b = View::transposed(&w, k);
            gemm(m, n, k, View::rows(&x, k), b, &mut expected, n, Into::Overwrite);
            let packed = PackedMatrix::new(k, n, b);
            let mut c = vec![1.0; m * n];
            gemm_packed(m, View::rows(&x, k), &packed, &mut c, n, Into::Overwrite);
            prop_assert_eq!(c, expected);
        }
    }
}
