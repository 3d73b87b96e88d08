//! One micro-batch forward and backward, enqueued without a host synchronisation in between.
//!
//! A group of projections that read the same input is one product: its input buffer carries the
//! low-rank activation `u = s x Aᵀ` in extra columns, and the decoded weights carry B, so that
//! `y = [x, u] [W, B]ᵀ`. Backward, the gradient carries `du = s dy B` and `dx = [dy, du] [W; A]`;
//! `dB += dyᵀ u` and `dA += duᵀ x` go to f32 in the layout of the operands.

mod ahead;
mod batch;
mod head;
mod offload;
pub(crate) mod pass;
mod resident;

use model::MicroBatch;

use crate::adapter::Lora;
use crate::attention::Plan;
use crate::device::{Buffer, Device};
use crate::graph::Recorder;
use crate::staging::Staging;
use crate::{CudaError, Frozen};
use ahead::Ahead;
pub(crate) use batch::{Batch, COLUMNS};
use head::HeadBuffers;
use offload::Offload;
use pass::Pass;
use resident::Resident;

/// What a forward pass keeps for the backward one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Everything: fastest.
    Keep,
    /// The residual stream before each layer; the layer runs forward again: smaller.
    Recompute,
    /// As [`Activations::Recompute`], with the residual stream in pinned memory of the host, copied
    /// while the layers compute: smallest.
    Offload,
}

/// Activations of one layer. `*_ld` in [`Step`] are the row strides.
struct State {
    /// Normed input `[n, hidden + width]`.
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    lse: Buffer,
    /// Residual stream between the two blocks.
    middle: Buffer,
    middle_normed: Buffer,
    /// Gate and up, and after the backward pass their gradients.
    gate_up: Buffer,
    activated: Buffer,
    /// Outputs of attention and of the feed-forward block before their norms, where they have one, in
    /// the type of the residual stream.
    outputs: Option<[Buffer; 2]>,
    /// Of the norms of the inputs of both blocks, then of their outputs.
    roots: [Buffer; 4],
}

/// What buffers are for.
#[derive(Clone, Copy)]
enum Purpose {
    Train(Activations),
    /// Forward passes alone, at positions below that.
    Answer {
        positions: usize,
    },
}

/// Buffers and tables of a training step of one shape.
pub struct Step {
    activations: Activations,
    trains: bool,
    attention: Option<Plan>,
    /// Shared memory of a block, which bounds sequences where there is no plan.
    shared_bytes: usize,
    capacity: usize,
    /// Rows of the rotary tables: no sequence is longer.
    positions: usize,
    widths: [usize; 4],
    states: Vec<State>,
    /// Residual stream before each layer, and after the last; two in turn without a backward pass.
    residual: Vec<Buffer>,
    resident: Option<Resident>,
    scratch: Buffer,
    dhidden: Buffer,
    dnormed: Buffer,
    dactivated: Buffer,
    dqkv: Buffer,
    delta: Buffer,
    head: HeadBuffers,
    cosines: Buffer,
    sines: Buffer,
    /// Tokens, positions, segment starts and stops, target rows, targets, both bounds in pairs (two
    /// columns), orders of tiles (three), bits of the loss's scale: `[COLUMNS, capacity]` i32.
    integers: Buffer,
    staging: Staging,
    total: Buffer,
    offload: Option<Offload>,
    ahead: Option<Ahead>,
    recorder: Recorder,
}

/// Memory that is free between micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct Spare {
    pub(crate) ptr: u64,
    pub(crate) bytes: u64,
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
        Self::build(device, frozen, lora, capacity, Purpose::Train(activations))
    }

    /// Buffers for forward passes over up to `capacity` tokens at positions below `positions`.
    pub(crate) fn forward_only(
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        capacity: usize,
        positions: usize,
    ) -> Result<Self, CudaError> {
        Self::build(device, frozen, lora, capacity, Purpose::Answer { positions })
    }

    fn build(
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        capacity: usize,
        purpose: Purpose,
    ) -> Result<Self, CudaError> {
        let (activations, positions, trains) = match purpose {
            Purpose::Train(activations) => {
                (activations, capacity.min(frozen.config.max_position_embeddings), true)
            }
            Purpose::Answer { positions } => (Activations::Recompute, positions, false),
        };
        let c = &frozen.config;
        let (heads, kv_heads, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let softcaps = c.variations.attn_logit_softcapping.is_some();
        let attention = Plan::new(device, (heads, kv_heads, d), softcaps, capacity)?;
        let groups = &lora.groups[0];
        let widths = groups.map(|g| g.width);
        let (q, out) = (groups[1].inputs, groups[0].outputs);
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let matrix = |columns: usize| device.elements(capacity * columns);
        let stream = || device.residual_elements(capacity * hidden);
        let floats = |count: usize| device.alloc(count as u64 * 4);
        let output_norms = c.variations.output_norms;
        let outputs = || Ok::<_, CudaError>([stream()?, stream()?]);
        let state = || -> Result<State, CudaError> {
            Ok(State {
                normed: matrix(hidden + widths[0])?,
                qkv: matrix(out)?,
                attended: matrix(q + widths[1])?,
                lse: floats(capacity * c.num_attention_heads)?,
                middle: stream()?,
                middle_normed: matrix(hidden + widths[2])?,
                gate_up: matrix(2 * ffn + widths[2])?,
                activated: matrix(ffn + widths[3])?,
                outputs: output_norms.then(outputs).transpose()?,
                roots: [floats(capacity)?, floats(capacity)?, floats(capacity)?, floats(capacity)?],
            })
        };
        // What only a backward pass needs.
        let backward = |bytes: u64| device.alloc(if trains { bytes } else { 0 });
        let layers = if trains { c.num_hidden_layers } else { 1 };
        let kept = if activations == Activations::Keep { layers } else { 1 };
        let streams = if activations == Activations::Offload { 2 } else { layers + 1 };
        let scratch = groups.iter().map(|g| g.row() * (g.outputs + g.width)).max().unwrap_or(0);
        let (cosines, sines) = rope_tables(c, positions);
        let size = device.dtype.size();
        let attention_scratch =
            attention.map_or(0, |plan| plan.scratch_bytes(kv_heads, d, capacity));
        let states: Vec<State> = (0..kept).map(|_| state()).collect::<Result<_, _>>()?;
        let lent = (activations != Activations::Keep).then_some(&states[0]);
        let head = HeadBuffers::new(device, c, if trains { capacity } else { 0 }, lent)?;
        let rows = capacity as u64 * size;
        let widest = (widths[1].max(widths[3]) + hidden) as u64;
        // Lends itself to the gradient of a block's output before its norm.
        let dqkv = ((out + widths[0]) as u64).max(if output_norms { widest } else { 0 });
        let residual: Vec<Buffer> = (0..streams).map(|_| stream()).collect::<Result<_, _>>()?;
        let offload = match activations {
            Activations::Offload => Some(Offload::new(device, layers, residual[0].bytes())?),
            _ => None,
        };
        let scratch = device.elements(scratch)?;
        let ahead = match purpose {
            Purpose::Train(Activations::Keep) => Some(Ahead::new(device, &scratch)?),
            _ => None,
        };
        Ok(Self {
            activations,
            trains,
            attention,
            shared_bytes: device.shared_bytes()?,
            capacity,
            positions,
            widths,
            states,
            residual,
            resident: None,
            scratch,
            dhidden: backward(rows * widest)?,
            dnormed: backward(rows * hidden.max(q) as u64)?,
            dactivated: backward(attention_scratch.max(rows * ffn as u64))?,
            dqkv: backward(rows * dqkv)?,
            delta: backward((capacity * c.num_attention_heads) as u64 * 4)?,
            head,
            cosines: device.upload_f32(&cosines)?,
            sines: device.upload_f32(&sines)?,
            integers: device.alloc((capacity * COLUMNS * 4) as u64)?,
            staging: Staging::new(capacity * COLUMNS * 4)?,
            total: device.zeros(8)?,
            offload,
            ahead,
            recorder: Recorder::default(),
        })
    }

    /// Decodes the weights once for all passes where that takes no more than half of the memory that is
    /// free, and says whether it did. It changes no bit of any result.
    ///
    /// # Errors
    /// [`CudaError`] of the driver.
    pub fn keep_weights(
        &mut self,
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
    ) -> Result<bool, CudaError> {
        // What was recorded reads other addresses.
        self.recorder = Recorder::default();
        self.resident = Resident::new(device, frozen, lora, self.trains)?;
        Ok(self.resident.is_some())
    }

    /// A pass of a batch that is on the device.
    pub(crate) fn pass<'a>(
        &'a self,
        device: &'a Device,
        frozen: &'a Frozen,
        lora: &'a Lora,
        b: &'a Batch,
    ) -> Result<Pass<'a>, CudaError> {
        if let Some(resident) = &self.resident {
            resident.refresh(device, frozen, lora)?;
        }
        Ok(Pass { step: self, device, frozen, lora, b, cache: None })
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
        let b = self.upload(device, batch, scale)?;
        let pass = self.pass(device, frozen, lora, &b)?;
        // The copies of another stream, and launches that depend on the longest sequence.
        if self.offload.is_some() || self.attention.is_none() {
            return self.enqueue(&pass);
        }
        let shape = [b.n as u64, b.targets as u64];
        let key = [shape[0], shape[1], frozen.embed.ptr(), lora.operand(0), 1];
        let forget = || self.ahead.iter().for_each(Ahead::forget);
        self.recorder.run(device, key, || self.enqueue(&pass), forget)
    }

    /// Forward and backward of a batch that is on the device.
    fn enqueue(&self, pass: &Pass<'_>) -> Result<(), CudaError> {
        pass.trunk()?;
        pass.head(true)?;
        for layer in (0..pass.frozen.config.num_hidden_layers).rev() {
            if let Some(offload) = &self.offload {
                offload.fetch_before(pass.device, layer, &self.residual)?;
            }
            let state = self.state(layer);
            if self.activations != Activations::Keep {
                pass.forward(layer, state, false)?;
            }
            pass.backward(layer, state)?;
        }
        pass.join()
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
        let b = self.upload(device, batch, 0.0)?;
        let pass = self.pass(device, frozen, lora, &b)?;
        pass.trunk()?;
        pass.head(false)?;
        pass.settle()
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

    /// Residual stream before `layer`.
    pub(crate) fn residual(&self, layer: usize) -> u64 {
        self.residual[layer % self.residual.len()].ptr()
    }

    fn state(&self, layer: usize) -> &State {
        &self.states[layer.min(self.states.len() - 1)]
    }
}

/// Cosines and sines `[positions, d / 2]`.
fn rope_tables(c: &checkpoint::ModelConfig, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let half = c.head_dim / 2;
    let mut tables = (Vec::new(), Vec::new());
    for position in 0..positions {
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
