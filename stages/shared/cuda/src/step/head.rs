//! Final norm, head and loss, in chunks of rows, so that the logits never exist at once.

use model::MicroBatch;

use super::pass::{Pass, gather};
use super::{State, Step};
use crate::adapter::Lora;
use crate::device::{Buffer, Device, args};
use crate::gemm::{Gemm, View};
use crate::sizes::logits_stride;
use crate::{CudaError, Frozen};

/// Rows whose logits exist at once, at most; and at least where their memory is lent.
const HEAD_ROWS: usize = 1024;
const LEAST_HEAD_ROWS: usize = 512;
/// Rows of the tiles of large products divide this.
const HEAD_TILE: usize = 128;

/// Addresses of what the head works with. Where a layer runs forward again before its backward pass,
/// the layer's buffers are free while the head runs, and serve it.
pub(super) struct HeadBuffers {
    rows: u64,
    normed: u64,
    dnormed: u64,
    drows: u64,
    roots: Buffer,
    logits: u64,
    /// Rows whose logits exist at once.
    chunk: usize,
    losses: Buffer,
    _own: Vec<Buffer>,
}

impl HeadBuffers {
    pub(super) fn new(
        device: &Device,
        c: &checkpoint::ModelConfig,
        capacity: usize,
        lent: Option<&State>,
    ) -> Result<Self, CudaError> {
        let size = device.dtype.size();
        let mut own = Vec::new();
        let count = (capacity * c.hidden_size) as u64;
        let (matrix, wide) = (count * size, count * device.dtype.residual().size());
        let rows = match lent.filter(|s| s.activated.bytes() >= 3 * matrix + wide) {
            Some(state) => state.activated.ptr(),
            None => {
                own.push(device.alloc(3 * matrix + wide)?);
                own[0].ptr()
            }
        };
        // The same in every mode, so that results are: what would fit into the buffer that is lent.
        let row = logits_stride(c, device.dtype) as u64 * size;
        let room = (capacity as u64 * 2 * c.intermediate_size as u64 * size / row) as usize;
        let whole_tiles = room / HEAD_TILE * HEAD_TILE;
        let chunk = whole_tiles.clamp(LEAST_HEAD_ROWS, HEAD_ROWS).min(capacity);
        let logits = match lent.filter(|s| s.gate_up.bytes() >= chunk as u64 * row) {
            Some(state) => state.gate_up.ptr(),
            None => {
                let buffer = device.alloc(chunk as u64 * row)?;
                let ptr = buffer.ptr();
                own.push(buffer);
                ptr
            }
        };
        Ok(Self {
            rows,
            normed: rows + wide,
            dnormed: rows + wide + matrix,
            drows: rows + wide + 2 * matrix,
            roots: device.alloc(capacity as u64 * 4)?,
            logits,
            chunk,
            losses: device.alloc(chunk as u64 * 4)?,
            _own: own,
        })
    }
}

impl Pass<'_> {
    /// Loss of the rows that have a target; where `gradient` is wanted, that of the batch's scale times
    /// the loss into `dhidden`.
    pub(super) fn head(&self, gradient: bool) -> Result<(), CudaError> {
        let (step, device, b) = (self.step, self.device, self.b);
        let (hidden, vocabulary) = (self.frozen.config.hidden_size, self.frozen.config.vocab_size);
        let size = device.dtype.size();
        let ldh = hidden + step.widths[1].max(step.widths[3]);
        let dh = step.dhidden.ptr();
        if gradient {
            device.clear(dh, (b.n * ldh) as u64 * size)?;
        }
        let (x, ld) = (&step.head, logits_stride(&self.frozen.config, device.dtype));
        self.norm_targets()?;
        for first in (0..b.targets).step_by(x.chunk) {
            let rows = x.chunk.min(b.targets - first);
            self.logits(first, rows)?;
            self.cross_entropy(first, rows)?;
            if gradient {
                let out = View::new(x.dnormed + (first * hidden) as u64 * size, hidden);
                let head = View::new(self.frozen.head(), hidden);
                let logits = View::new(x.logits, ld);
                let product = Gemm::new((rows, hidden, vocabulary), logits, head, out);
                device.gemm("gemm head", product)?;
            }
        }
        if !gradient {
            return Ok(());
        }
        let [ld, width] = [hidden as i32; 2];
        let (rows, norm, roots, add) = (x.rows, self.frozen.norm.ptr(), x.roots.ptr(), 0i32);
        let (dy, dx) = (x.dnormed, x.drows);
        let (index, ldo) = (b.rows, ldh as i32);
        // SAFETY: matrices of `targets` rows.
        unsafe {
            let args = args![rows, ld, norm, roots, dy, ld, dx, ld, width, add];
            let kernel = ("layer.cu", "rms_norm_backward");
            device.launch(kernel, [b.targets, 1], self.row_threads(), 0, args)?;
            let args = args![dx, ld, index, dh, ldo, width];
            device.launch(("layer.cu", "scatter_rows"), [b.targets, 1], 256, 0, args)
        }
    }

    /// The rows that have a target, and their norms.
    fn norm_targets(&self) -> Result<(), CudaError> {
        let (step, c, b) = (self.step, &self.frozen.config, self.b);
        let (last, x) = (step.residual(c.num_hidden_layers), &step.head);
        gather(self.device, (last, c.hidden_size), b.rows, x.rows, b.targets)?;
        let to = (x.normed, c.hidden_size);
        self.norm_rows(x.rows, self.frozen.norm.ptr(), to, x.roots.ptr(), b.targets)
    }

    /// Logits, without their cap, of `rows` of the rows that have a target.
    fn logits(&self, first: usize, rows: usize) -> Result<(), CudaError> {
        let (x, c) = (&self.step.head, &self.frozen.config);
        let (hidden, vocabulary) = (c.hidden_size, c.vocab_size);
        let at = x.normed + (first * hidden) as u64 * self.device.dtype.size();
        let head = View::new(self.frozen.head(), hidden);
        let ld = logits_stride(c, self.device.dtype);
        let (normed, logits) = (View::new(at, hidden), View::new(x.logits, ld));
        let product = Gemm::new((rows, vocabulary, hidden), normed, head.t(), logits);
        self.device.gemm("gemm head", product)
    }

    /// Adds the losses of these logits to the total, and makes them their gradients.
    fn cross_entropy(&self, first: usize, rows: usize) -> Result<(), CudaError> {
        let (step, device, c) = (self.step, self.device, &self.frozen.config);
        let x = &step.head;
        let (ptr, labels) = (x.logits, self.b.labels + (first * 4) as u64);
        let (losses, columns) = (x.losses.ptr(), c.vocab_size as i32);
        let (count, total, grid) = (rows as i32, step.total.ptr(), [rows, 1]);
        let scale = self.b.scale;
        // SAFETY: `rows` rows of logits, labels and losses.
        unsafe {
            if let Some(cap) = c.variations.final_logit_softcapping {
                let args = args![ptr, labels, losses, columns, scale, cap];
                device.launch(("loss.cu", "cross_entropy_capped"), grid, 1024, 0, args)?;
            } else {
                let args = args![ptr, labels, losses, columns, scale];
                device.launch(("loss.cu", "cross_entropy"), grid, 1024, 0, args)?;
            }
            let args = args![losses, count, total];
            device.launch(("loss.cu", "add_losses"), [1, 1], 256, 0, args)
        }
    }
}

impl Step {
    /// Logits `[rows that have a target, vocabulary]` as the loss reads them: for checks.
    ///
    /// # Errors
    /// As [`Step::run`].
    pub fn logits(
        &self,
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        batch: MicroBatch<'_>,
    ) -> Result<Vec<f32>, CudaError> {
        let wanted = batch.targets.iter().filter(|t| **t != -100).count();
        let b = self.upload(device, batch, 0.0)?;
        let pass = self.pass(device, frozen, lora, &b)?;
        pass.trunk()?;
        pass.norm_targets()?;
        let vocabulary = frozen.config.vocab_size;
        let ld = logits_stride(&frozen.config, device.dtype);
        let row = ld * device.dtype.size() as usize;
        let mut logits: Vec<f32> = Vec::new();
        for first in (0..b.targets).step_by(self.head.chunk) {
            let rows = self.head.chunk.min(b.targets - first);
            pass.logits(first, rows)?;
            let values = device.dtype.decode(&device.read_at(self.head.logits, rows * row)?);
            logits.extend(values.chunks_exact(ld).flat_map(|row| &row[..vocabulary]));
        }
        pass.settle()?;
        logits.truncate(wanted * vocabulary);
        if let Some(cap) = frozen.config.variations.final_logit_softcapping {
            logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
        }
        Ok(logits)
    }
}
