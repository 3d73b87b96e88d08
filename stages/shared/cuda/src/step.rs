//! One micro-batch forward and backward, enqueued without a host synchronisation in between.
//!
//! A group of projections that read the same input is one product: its input buffer carries the
//! low-rank activation `u = s x Aᵀ` in extra columns, and the decoded weights carry B, so that
//! `y = [x, u] [W, B]ᵀ`. Backward, the gradient carries `du = s dy B` and `dx = [dy, du] [W; A]`;
//! `dB += dyᵀ u` and `dA += duᵀ x` go to f32 in the layout of the operands.

use model::MicroBatch;

use crate::adapter::Lora;
use crate::attention::{Attention, Plan};
use crate::device::{Buffer, Device, args};
use crate::gemm::{Gemm, View};
use crate::{CudaError, Frozen};

/// What a forward pass keeps for the backward one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Everything: fastest.
    Keep,
    /// The residual stream before each layer; the layer runs forward again: smallest.
    Recompute,
}

/// Rows whose logits exist at once, at most; and at least where their memory is lent.
const HEAD_ROWS: usize = 1024;
const LEAST_HEAD_ROWS: usize = 256;

/// Activations of one layer. `*_ld` in [`Step`] are the row strides.
struct State {
    /// Normed input `[n, hidden + width]`.
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    lse: Buffer,
    middle: Buffer,
    middle_normed: Buffer,
    /// Gate and up, and after the backward pass their gradients.
    gate_up: Buffer,
    activated: Buffer,
    roots: [Buffer; 2],
}

/// Buffers and tables of a training step of one shape.
pub struct Step {
    activations: Activations,
    attention: Option<Plan>,
    capacity: usize,
    widths: [usize; 4],
    states: Vec<State>,
    /// Residual stream before each layer, and after the last.
    residual: Vec<Buffer>,
    scratch: Buffer,
    dhidden: Buffer,
    dnormed: Buffer,
    dactivated: Buffer,
    dqkv: Buffer,
    delta: Buffer,
    head: HeadBuffers,
    cosines: Buffer,
    sines: Buffer,
    /// Tokens, positions, segment starts and stops, target rows, targets: orders of tiles:
    /// `[11, capacity]` i32.
    integers: Buffer,
    total: Buffer,
}

/// Addresses of what the head works with. Where a layer runs forward again before its backward pass,
/// the layer's buffers are free while the head runs, and serve it.
struct HeadBuffers {
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

/// Memory that is free between micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct Spare {
    pub(crate) ptr: u64,
    pub(crate) bytes: u64,
}

impl HeadBuffers {
    fn new(
        device: &Device,
        c: &checkpoint::ModelConfig,
        capacity: usize,
        lent: Option<&State>,
    ) -> Result<Self, CudaError> {
        let size = device.dtype.size();
        let mut own = Vec::new();
        let matrix = (capacity * c.hidden_size) as u64 * size;
        let rows = match lent.filter(|s| s.activated.bytes() >= 4 * matrix) {
            Some(state) => state.activated.ptr(),
            None => {
                own.push(device.alloc(4 * matrix)?);
                own[0].ptr()
            }
        };
        let row = c.vocab_size as u64 * size;
        let room = lent.map_or(0, |s| s.gate_up.bytes() / row) as usize;
        let (logits, chunk) = match lent.filter(|_| room >= LEAST_HEAD_ROWS.min(capacity)) {
            Some(state) => (state.gate_up.ptr(), room.min(HEAD_ROWS)),
            None => {
                let chunk = HEAD_ROWS.min(capacity);
                let buffer = device.alloc(chunk as u64 * row)?;
                let ptr = buffer.ptr();
                own.push(buffer);
                (ptr, chunk)
            }
        };
        Ok(Self {
            rows,
            normed: rows + matrix,
            dnormed: rows + 2 * matrix,
            drows: rows + 3 * matrix,
            roots: device.alloc(capacity as u64 * 4)?,
            logits,
            chunk,
            losses: device.alloc(chunk as u64 * 4)?,
            _own: own,
        })
    }
}

/// A micro-batch on the device.
struct Batch {
    n: usize,
    targets: usize,
    longest: usize,
    tokens: u64,
    positions: u64,
    start: u64,
    stop: u64,
    rows: u64,
    labels: u64,
    bounds: u64,
    orders: [u64; 3],
}

impl Step {
    /// Buffers for micro-batches of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`CudaError::Memory`] where they do not fit.
    pub fn new(
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        capacity: usize,
        activations: Activations,
    ) -> Result<Self, CudaError> {
        let c = &frozen.config;
        let (heads, kv_heads, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let attention = Plan::new(device, (heads, kv_heads, d), capacity)?;
        let groups = &lora.groups[0];
        let widths = groups.map(|g| g.width);
        let (q, out) = (groups[1].inputs, groups[0].outputs);
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let matrix = |columns: usize| device.elements(capacity * columns);
        let floats = |count: usize| device.alloc(count as u64 * 4);
        let state = || -> Result<State, CudaError> {
            Ok(State {
                normed: matrix(hidden + widths[0])?,
                qkv: matrix(out)?,
                attended: matrix(q + widths[1])?,
                lse: floats(capacity * c.num_attention_heads)?,
                middle: matrix(hidden)?,
                middle_normed: matrix(hidden + widths[2])?,
                gate_up: matrix(2 * ffn + widths[2])?,
                activated: matrix(ffn + widths[3])?,
                roots: [floats(capacity)?, floats(capacity)?],
            })
        };
        let layers = c.num_hidden_layers;
        let kept = if activations == Activations::Keep { layers } else { 1 };
        let scratch = groups
            .iter()
            .map(|g| ((g.inputs + g.width) * g.outputs).max(g.inputs * (g.outputs + g.width)))
            .max()
            .unwrap_or(0);
        let (cosines, sines) = rope_tables(c, capacity);
        let size = device.dtype.size();
        let attention_scratch =
            attention.map_or(0, |plan| plan.scratch_bytes(kv_heads, d, capacity));
        let states: Vec<State> = (0..kept).map(|_| state()).collect::<Result<_, _>>()?;
        let lent = (activations == Activations::Recompute).then_some(&states[0]);
        let head = HeadBuffers::new(device, c, capacity, lent)?;
        Ok(Self {
            activations,
            attention,
            capacity,
            widths,
            states,
            residual: (0..=layers).map(|_| matrix(hidden)).collect::<Result<_, _>>()?,
            scratch: device.elements(scratch)?,
            dhidden: matrix(hidden + widths[1].max(widths[3]))?,
            dnormed: matrix(hidden.max(q))?,
            dactivated: device.alloc(attention_scratch.max(capacity as u64 * ffn as u64 * size))?,
            dqkv: matrix(out + widths[0])?,
            delta: floats(capacity * c.num_attention_heads)?,
            head,
            cosines: device.upload_f32(&cosines)?,
            sines: device.upload_f32(&sines)?,
            integers: device.alloc(capacity as u64 * 11 * 4)?,
            total: device.zeros(8)?,
        })
    }

    /// Enqueues forward and backward: adds the gradient of `scale * sum of token losses` to that of
    /// `lora`, and the sum of token losses to the total.
    ///
    /// # Errors
    /// [`CudaError::Input`] for a batch that does not fit.
    pub fn run(
        &self,
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        batch: MicroBatch<'_>,
        scale: f32,
    ) -> Result<(), CudaError> {
        let b = self.upload(device, batch)?;
        let pass = Pass { step: self, device, frozen, lora, b: &b };
        pass.trunk()?;
        pass.head(Some(scale))?;
        for layer in (0..frozen.config.num_hidden_layers).rev() {
            let state = self.state(layer);
            if self.activations == Activations::Recompute {
                pass.forward(layer, state, false)?;
            }
            pass.backward(layer, state)?;
        }
        Ok(())
    }

    /// Enqueues a forward pass alone and adds the sum of token losses to the total.
    ///
    /// # Errors
    /// As [`Step::run`].
    pub fn loss(
        &self,
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        batch: MicroBatch<'_>,
    ) -> Result<(), CudaError> {
        let b = self.upload(device, batch)?;
        let pass = Pass { step: self, device, frozen, lora, b: &b };
        pass.trunk()?;
        pass.head(None)
    }

    /// Sum of token losses since the last call, after all work so far.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also for a fault of earlier work.
    pub fn take_loss(&self, device: &Device) -> Result<f64, CudaError> {
        let bytes = device.read(&self.total, 8)?;
        device.clear(self.total.ptr(), 8)?;
        Ok(bytes.first_chunk::<8>().map_or(0.0, |b| f64::from_le_bytes(*b)))
    }

    /// Memory that nothing uses between micro-batches.
    pub fn spare(&self) -> Spare {
        let buffer = &self.states[0].gate_up;
        Spare { ptr: buffer.ptr(), bytes: buffer.bytes() }
    }

    fn state(&self, layer: usize) -> &State {
        &self.states[layer.min(self.states.len() - 1)]
    }

    fn upload(&self, device: &Device, batch: MicroBatch<'_>) -> Result<Batch, CudaError> {
        let n = batch.tokens.len();
        if n > self.capacity || n != batch.targets.len() || n == 0 {
            let message = format!("a batch of {n} tokens where {} fit", self.capacity);
            return Err(CudaError::Input(message));
        }
        let mut columns: [Vec<i32>; 11] = Default::default();
        columns[0].extend(batch.tokens);
        let mut longest = 0;
        for bounds in batch.cu_seqlens.windows(2) {
            longest = longest.max(bounds[1] - bounds[0]);
            for row in bounds[0]..bounds[1] {
                columns[1].push(row - bounds[0]);
                columns[2].push(bounds[0]);
                columns[3].push(bounds[1]);
            }
        }
        for (row, target) in batch.targets.iter().enumerate().filter(|(_, t)| **t != -100) {
            columns[4].push(row as i32);
            columns[5].push(*target);
        }
        let targets = columns[4].len();
        // A column and the next: pairs.
        let pairs: Vec<i32> =
            columns[2].iter().zip(&columns[3]).flat_map(|(a, b)| [*a, *b]).collect();
        let (low, high) = pairs.split_at(pairs.len().min(self.capacity));
        (columns[6], columns[7]) = (low.to_vec(), high.to_vec());
        if let Some(plan) = &self.attention {
            [columns[8], columns[9], columns[10]] = plan.orders(&columns[2], &columns[3]);
        }
        let mut bytes = vec![0u8; self.capacity * 11 * 4];
        for (column, to) in columns.iter().zip(bytes.chunks_exact_mut(self.capacity * 4)) {
            for (value, to) in column.iter().zip(to.chunks_exact_mut(4)) {
                to.copy_from_slice(&value.to_le_bytes());
            }
        }
        device.write(self.integers.ptr(), &bytes)?;
        let column = |index: usize| self.integers.ptr() + (index * self.capacity * 4) as u64;
        Ok(Batch {
            n,
            targets,
            longest: longest as usize,
            tokens: column(0),
            positions: column(1),
            start: column(2),
            stop: column(3),
            rows: column(4),
            labels: column(5),
            bounds: column(6),
            orders: [column(8), column(9), column(10)],
        })
    }
}

/// Cosines and sines `[positions, d / 2]`.
fn rope_tables(c: &checkpoint::ModelConfig, capacity: usize) -> (Vec<f32>, Vec<f32>) {
    let half = c.head_dim / 2;
    let mut tables = (Vec::new(), Vec::new());
    for position in 0..capacity.min(c.max_position_embeddings) {
        for j in 0..half {
            // transformers forms the frequencies in f32.
            let power = (2 * j) as f32 / c.head_dim as f32;
            let angle = position as f32 * (1.0 / c.rope_theta.powf(power));
            tables.0.push(angle.cos());
            tables.1.push(angle.sin());
        }
    }
    tables
}

/// One micro-batch in progress.
struct Pass<'a> {
    step: &'a Step,
    device: &'a Device,
    frozen: &'a Frozen,
    lora: &'a Lora,
    b: &'a Batch,
}

impl Pass<'_> {
    fn attention(&self, state: &State) -> Attention {
        let c = &self.frozen.config;
        let groups = &self.lora.groups[0];
        Attention {
            qkv: state.qkv.ptr(),
            ld: groups[0].outputs,
            out: state.attended.ptr(),
            ldo: groups[1].inputs + self.step.widths[1],
            lse: state.lse.ptr(),
            start: self.b.start,
            stop: self.b.stop,
            bounds: self.b.bounds,
            orders: self.b.orders,
            plan: self.step.attention,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            d: c.head_dim,
            n: self.b.n,
            longest: self.b.longest,
        }
    }

    /// Embedding and all layers forward.
    fn trunk(&self) -> Result<(), CudaError> {
        let (step, hidden) = (self.step, self.frozen.config.hidden_size);
        let (table, out) = (self.frozen.embed.ptr(), step.residual[0].ptr());
        gather(self.device, (table, hidden), self.b.tokens, out, hidden, self.b.n)?;
        for layer in 0..self.frozen.config.num_hidden_layers {
            self.forward(layer, step.state(layer), true)?;
        }
        Ok(())
    }

    /// Layer forward; the product that leaves the layer only where `whole`.
    fn forward(&self, layer: usize, s: &State, whole: bool) -> Result<(), CudaError> {
        let (h, w) = (self.frozen.config.hidden_size, self.step.widths);
        let input = self.step.residual[layer].ptr();
        let norm = self.frozen.input_norm(layer);
        self.norm(input, norm, (s.normed.ptr(), h + w[0]), s.roots[0].ptr())?;
        self.project((layer, 0), s.normed.ptr(), s.qkv.ptr(), 0)?;
        self.rope((s.qkv.ptr(), self.lora.groups[0][0].outputs), 1.0)?;
        self.attention(s).forward(self.device)?;
        self.project((layer, 1), s.attended.ptr(), s.middle.ptr(), input)?;
        let norm = self.frozen.post_norm(layer);
        let normed = (s.middle_normed.ptr(), h + w[2]);
        self.norm(s.middle.ptr(), norm, normed, s.roots[1].ptr())?;
        self.project((layer, 2), s.middle_normed.ptr(), s.gate_up.ptr(), 0)?;
        let ffn = self.frozen.config.intermediate_size;
        let (from, ldg) = (s.gate_up.ptr(), (2 * ffn + w[2]) as i32);
        let (to, ldy, width) = (s.activated.ptr(), (ffn + w[3]) as i32, ffn as i32);
        let rows = self.b.n as i32;
        // SAFETY: shapes of the state.
        unsafe {
            let kernel = ("layer.cu", "swiglu");
            let args = args![from, ldg, to, ldy, width, rows];
            self.device.launch(kernel, self.packs(ffn), 256, 0, args)?;
        }
        let out = self.step.residual[layer + 1].ptr();
        if whole {
            return self.project((layer, 3), s.activated.ptr(), out, s.middle.ptr());
        }
        self.low_rank((layer, 3), s.activated.ptr())
    }

    /// Turns `dhidden`, the gradient of the layer's output, into that of its input.
    fn backward(&self, layer: usize, s: &State) -> Result<(), CudaError> {
        let (step, w) = (self.step, self.step.widths);
        let c = &self.frozen.config;
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let (dh, ldh) = (step.dhidden.ptr(), hidden + w[1].max(w[3]));
        let dnormed = step.dnormed.ptr();
        self.project_backward((layer, 3), (dh, ldh), s.activated.ptr(), step.dactivated.ptr())?;
        let (gate_up, ldg, ldy) = (s.gate_up.ptr(), (2 * ffn + w[2]) as i32, ffn as i32);
        let (from, rows) = (step.dactivated.ptr(), self.b.n as i32);
        // SAFETY: shapes of the state; every thread reads what it overwrites.
        unsafe {
            let args = args![gate_up, ldg, from, ldy, gate_up, ldg, ldy, rows];
            let kernel = ("layer.cu", "swiglu_backward");
            self.device.launch(kernel, self.packs(ffn), 256, 0, args)?;
        }
        let dy = (gate_up, 2 * ffn + w[2]);
        self.project_backward((layer, 2), dy, s.middle_normed.ptr(), dnormed)?;
        let (middle, root) = (s.middle.ptr(), s.roots[1].ptr());
        self.norm_backward(middle, self.frozen.post_norm(layer), root, (dh, ldh))?;
        self.project_backward((layer, 1), (dh, ldh), s.attended.ptr(), dnormed)?;
        let dqkv = (step.dqkv.ptr(), self.lora.groups[0][0].outputs + w[0]);
        let dout = (dnormed, self.lora.groups[0][1].inputs);
        // What the feed-forward block left is free by now.
        let scratch = (step.delta.ptr(), step.dactivated.ptr());
        self.attention(s).backward(self.device, dout, dqkv, scratch)?;
        self.rope(dqkv, -1.0)?;
        // Nothing needs the gradient of the embeddings.
        let wanted = if layer > 0 { dnormed } else { 0 };
        self.project_backward((layer, 0), dqkv, s.normed.ptr(), wanted)?;
        if layer == 0 {
            return Ok(());
        }
        let (input, root) = (step.residual[layer].ptr(), s.roots[0].ptr());
        self.norm_backward(input, self.frozen.input_norm(layer), root, (dh, ldh))
    }

    /// Final norm, head and loss of the rows that have a target; with a scale, the gradient of
    /// scale times that into `dhidden`.
    fn head(&self, scale: Option<f32>) -> Result<(), CudaError> {
        let (step, device, b) = (self.step, self.device, self.b);
        let c = &self.frozen.config;
        let (hidden, vocabulary) = (c.hidden_size, c.vocab_size);
        let size = device.dtype.size();
        let ldh = hidden + step.widths[1].max(step.widths[3]);
        let dh = step.dhidden.ptr();
        let (gradient, scale) = (scale.is_some(), scale.unwrap_or(0.0));
        if gradient {
            device.clear(dh, (b.n * ldh) as u64 * size)?;
        }
        let last = step.residual[c.num_hidden_layers].ptr();
        let x = &step.head;
        gather(device, (last, hidden), b.rows, x.rows, hidden, b.targets)?;
        let norm = self.frozen.norm.ptr();
        let to = (x.normed, hidden);
        self.norm_rows(x.rows, norm, to, x.roots.ptr(), b.targets)?;
        for first in (0..b.targets).step_by(x.chunk) {
            let rows = x.chunk.min(b.targets - first);
            let at = |base: u64| base + (first * hidden) as u64 * size;
            let head = View::new(self.frozen.head(), hidden);
            let logits = View::new(x.logits, vocabulary);
            let normed = View::new(at(x.normed), hidden);
            let product = Gemm::new((rows, vocabulary, hidden), normed, head.t(), logits);
            device.gemm("gemm head", product)?;
            let (ptr, labels) = (x.logits, b.labels + (first * 4) as u64);
            let (losses, columns) = (x.losses.ptr(), vocabulary as i32);
            let (count, total) = (rows as i32, step.total.ptr());
            // SAFETY: `rows` rows of logits, labels and losses.
            unsafe {
                let args = args![ptr, labels, losses, columns, scale];
                device.launch(("loss.cu", "cross_entropy"), [rows, 1], 1024, 0, args)?;
                let args = args![losses, count, total];
                device.launch(("loss.cu", "add_losses"), [1, 1], 256, 0, args)?;
            }
            if gradient {
                let out = View::new(at(x.dnormed), hidden);
                let product = Gemm::new((rows, hidden, vocabulary), logits, head, out);
                device.gemm("gemm head", product)?;
            }
        }
        if !gradient {
            return Ok(());
        }
        device.clear(x.drows, (b.targets * hidden) as u64 * size)?;
        let [ld, width] = [hidden as i32; 2];
        let (rows, roots) = (x.rows, x.roots.ptr());
        let (dy, dx) = (x.dnormed, x.drows);
        let (index, ldo) = (b.rows, ldh as i32);
        // SAFETY: matrices of `targets` rows.
        unsafe {
            let args = args![rows, ld, norm, roots, dy, ld, dx, ld, width];
            let kernel = ("layer.cu", "rms_norm_backward");
            device.launch(kernel, [b.targets, 1], 256, 0, args)?;
            let args = args![dx, ld, index, dh, ldo, width];
            device.launch(("layer.cu", "scatter_rows"), [b.targets, 1], 256, 0, args)
        }
    }

    /// Grid of a kernel that takes 16 bytes of a row of `width` elements a thread.
    fn packs(&self, width: usize) -> [usize; 2] {
        let vector = 16 / self.device.dtype.size() as usize;
        [(self.b.n * width / vector).div_ceil(256), 1]
    }

    fn norm(&self, x: u64, w: u64, y: (u64, usize), roots: u64) -> Result<(), CudaError> {
        self.norm_rows(x, w, y, roots, self.b.n)
    }

    fn norm_rows(
        &self,
        x: u64,
        w: u64,
        (y, ldy): (u64, usize),
        roots: u64,
        rows: usize,
    ) -> Result<(), CudaError> {
        let [width, ldy] = [self.frozen.config.hidden_size, ldy].map(|v| v as i32);
        let eps = self.frozen.config.rms_norm_eps;
        // SAFETY: matrices of `rows` rows.
        unsafe {
            let args = args![x, width, w, y, ldy, roots, width, eps];
            self.device.launch(("layer.cu", "rms_norm"), [rows, 1], 256, 0, args)
        }
    }

    /// Adds the gradient through a norm, of `dnormed`, to `dx`.
    fn norm_backward(
        &self,
        x: u64,
        w: u64,
        roots: u64,
        (dx, lddx): (u64, usize),
    ) -> Result<(), CudaError> {
        let [width, lddx] = [self.frozen.config.hidden_size, lddx].map(|v| v as i32);
        let dy = self.step.dnormed.ptr();
        // SAFETY: matrices of n rows.
        unsafe {
            let args = args![x, width, w, roots, dy, width, dx, lddx, width];
            let kernel = ("layer.cu", "rms_norm_backward");
            self.device.launch(kernel, [self.b.n, 1], 256, 0, args)
        }
    }

    /// Rotates queries and keys.
    fn rope(&self, (x, ld): (u64, usize), sign: f32) -> Result<(), CudaError> {
        let c = &self.frozen.config;
        let heads = c.num_attention_heads + c.num_key_value_heads;
        let vector = 16 / self.device.dtype.size() as usize;
        let packs = self.b.n * heads * c.head_dim / 2 / vector;
        let [ld, heads, d, rows] = [ld, heads, c.head_dim, self.b.n].map(|v| v as i32);
        let (positions, cosines) = (self.b.positions, self.step.cosines.ptr());
        let sines = self.step.sines.ptr();
        // SAFETY: tables cover the capacity, which bounds positions.
        unsafe {
            let args = args![x, ld, heads, d, positions, cosines, sines, sign, rows];
            self.device.launch(("layer.cu", "rope"), [packs.div_ceil(256), 1], 256, 0, args)
        }
    }

    /// `u = s x Aᵀ` into the extra columns of `x`.
    fn low_rank(&self, (layer, index): (usize, usize), x: u64) -> Result<(), CudaError> {
        let g = self.lora.groups[layer][index];
        if g.width == 0 {
            return Ok(());
        }
        let (n, ld, size) = (self.b.n, g.inputs + g.width, self.device.dtype.size());
        let a = View::new(self.lora.operand(g.a), g.inputs);
        let u = View::new(x + g.inputs as u64 * size, ld);
        let product = Gemm::new((n, g.width, g.inputs), View::new(x, ld), a.t(), u);
        self.device.gemm("lora u", Gemm { alpha: self.lora.scale, ..product })
    }

    /// `y = [x, u] [W, B]ᵀ + bias`, plus `residual` where it is not 0.
    fn project(
        &self,
        at @ (layer, index): (usize, usize),
        x: u64,
        y: u64,
        residual: u64,
    ) -> Result<(), CudaError> {
        let g = self.lora.groups[layer][index];
        self.low_rank(at, x)?;
        let scratch = self.step.scratch.ptr();
        let k = self.frozen.forward_operand(self.device, self.lora, at, scratch)?;
        // Gate and up leave room for the gradient's low-rank columns.
        let ldy = g.outputs + if index == 2 { g.width } else { 0 };
        let (x, w) = (View::new(x, k), View::new(scratch, k).t());
        let mut product = Gemm::new((self.b.n, g.outputs, k), x, w, View::new(y, ldy));
        product.bias = self.frozen.bias(layer, index);
        if residual != 0 {
            (product.beta, product.c) = (1.0, residual);
        }
        self.device.gemm("gemm forward", product)
    }

    /// Gradients of the group's factors from `dy`, and `dx = [dy, du] [W; A]` where `dx` is not 0.
    fn project_backward(
        &self,
        at @ (layer, index): (usize, usize),
        (dy, lddy): (u64, usize),
        x: u64,
        dx: u64,
    ) -> Result<(), CudaError> {
        let g = self.lora.groups[layer][index];
        let (n, size) = (self.b.n, self.device.dtype.size());
        let (gradient, ldx) = (View::new(dy, lddy), g.inputs + g.width);
        if g.width > 0 {
            let du = View::new(dy + g.outputs as u64 * size, lddy);
            let b = View::new(self.lora.operand(g.b), g.width);
            let product = Gemm::new((n, g.width, g.outputs), gradient, b, du);
            self.device.gemm("lora du", Gemm { alpha: self.lora.scale, ..product })?;
            let u = View::new(x + g.inputs as u64 * size, ldx);
            let db = View::new(self.lora.gradient(g.b), g.width);
            let product = Gemm::new((g.outputs, g.width, n), gradient.t(), u, db);
            self.device.gemm("lora dB", Gemm { beta: 1.0, f32_out: true, ..product })?;
            let da = View::new(self.lora.gradient(g.a), g.inputs);
            let product = Gemm::new((g.width, g.inputs, n), du.t(), View::new(x, ldx), da);
            self.device.gemm("lora dA", Gemm { beta: 1.0, f32_out: true, ..product })?;
        }
        if dx == 0 {
            return Ok(());
        }
        let scratch = self.step.scratch.ptr();
        self.frozen.backward_operand(self.device, self.lora, at, scratch)?;
        let (k, w) = (g.outputs + g.width, View::new(scratch, g.inputs));
        let product = Gemm::new((n, g.inputs, k), gradient, w, View::new(dx, g.inputs));
        self.device.gemm("gemm backward", product)
    }
}

/// `out[i] = table[index[i]]`.
fn gather(
    device: &Device,
    (table, ldt): (u64, usize),
    index: u64,
    out: u64,
    width: usize,
    rows: usize,
) -> Result<(), CudaError> {
    let [ldt, width] = [ldt, width].map(|v| v as i32);
    // SAFETY: the caller's matrices and indices.
    unsafe {
        let args = args![table, ldt, index, out, width, width];
        device.launch(("layer.cu", "gather_rows"), [rows, 1], 256, 0, args)
    }
}
