//! Packing of operands into the order in which the microkernel reads them.

use std::cell::RefCell;

use super::View;

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

/// Packs `mc` rows of A, columns `pc..pc + kc`, into panels of `mr` rows: panel by panel, column by
/// column. Missing rows of the last panel are zero.
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
        let rows = mr.min(mc - first);
        let origin = (ic + first) * a.row_stride + pc * a.col_stride;
        if a.row_stride == 1 {
            for (p, out) in out.chunks_exact_mut(mr).enumerate() {
                let start = origin + p * a.col_stride;
                out[..rows].copy_from_slice(&a.data[start..start + rows]);
                out[rows..].fill(0.0);
            }
        } else {
            if rows < mr {
                out.fill(0.0);
            }
            transpose_into(a, origin, rows, kc, mr, out);
        }
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
    let origin = pc * b.row_stride + col * b.col_stride;
    if b.col_stride == 1 {
        for (p, out) in out.chunks_exact_mut(nr).enumerate() {
            let start = origin + p * b.row_stride;
            out[..cols].copy_from_slice(&b.data[start..start + cols]);
            out[cols..].fill(0.0);
        }
    } else {
        if cols < nr {
            out.fill(0.0);
        }
        let flipped = View { data: b.data, row_stride: b.col_stride, col_stride: b.row_stride };
        transpose_into(&flipped, origin, cols, kc, nr, out);
    }
}

/// `out[p * width + i] = view[i, p]` from `origin`: reads along rows in runs of eight, so that both
/// sides stay in cache lines.
fn transpose_into(
    view: &View<'_>,
    origin: usize,
    rows: usize,
    kc: usize,
    width: usize,
    out: &mut [f32],
) {
    if view.col_stride != 1 {
        for i in 0..rows {
            for p in 0..kc {
                out[p * width + i] = view.data[origin + i * view.row_stride + p * view.col_stride];
            }
        }
        return;
    }
    let mut p = 0;
    while p < kc {
        let run = 8.min(kc - p);
        let out = &mut out[p * width..(p + run) * width];
        for i in 0..rows {
            let start = origin + i * view.row_stride + p;
            let source = &view.data[start..start + run];
            for (q, value) in source.iter().enumerate() {
                out[q * width + i] = *value;
            }
        }
        p += run;
    }
}
