//! AdamW over the adapter's flat buffer: torch's, and bitsandbytes' with moments in 8 bits.

use std::ops::Range;

use crate::device::{Buffer, Device, args};
use crate::step::Spare;
use crate::{CudaError, Lora};

/// Elements that share a scale.
const BLOCK: usize = 256;
/// Tensors with fewer elements keep f32 moments in the 8-bit variant, as in bitsandbytes.
const LEAST_QUANTISED: usize = 4096;
/// Elements a partial sum of squares covers.
const PARTIAL: usize = 4096;

const FILE: &str = "optimizer.cu";
/// Start of states as bytes.
const MAGIC: &[u8] = b"cuda-adamw";

/// Constants of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamSettings {
    /// Moments in 8 bits (bitsandbytes' `AdamW8bit`), else torch's AdamW.
    pub eight_bit: bool,
    /// Decays of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of a gradient; 0 is no limit.
    pub clip: f64,
}

impl Default for AdamSettings {
    fn default() -> Self {
        Self { eight_bit: false, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, clip: 1.0 }
    }
}

/// The optimiser and its states.
pub struct Optimizer {
    settings: AdamSettings,
    updates: i32,
    states: States,
    partials: Buffer,
    norm: Buffer,
    /// The gradient in the layout of the masters: lent memory, else a buffer.
    gradient: u64,
    _own: Option<Buffer>,
}

enum States {
    Torch { m: Buffer, v: Buffer },
    Blocks(Blocks),
}

struct Blocks {
    m: Buffer,
    v: Buffer,
    m_scale: Buffer,
    v_scale: Buffer,
    runs: Buffer,
    count: usize,
    small_m: Buffer,
    small_v: Buffer,
    small_runs: Buffer,
    small_count: usize,
    maps: Buffer,
}

/// Scalars of one update, laid out as the kernels read them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Scalars {
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step: f32,
    root: f32,
    eps: f32,
    decay: f32,
    rate: f32,
    weight_decay: f32,
    updates: i32,
    unused: i32,
}

impl Optimizer {
    /// Fresh states for tensors that tile the adapter's buffer; `maps` are bitsandbytes' dynamic
    /// maps, 256 signed values and 256 unsigned. `spare` must outlive the optimiser.
    ///
    /// # Errors
    /// [`CudaError`] where memory runs out.
    pub fn new(
        device: &Device,
        settings: AdamSettings,
        tensors: &[Range<usize>],
        maps: &[f32],
        spare: Option<Spare>,
    ) -> Result<Self, CudaError> {
        let count = tensors.last().map_or(0, |t| t.end);
        let states = if settings.eight_bit {
            States::Blocks(Blocks::new(device, tensors, maps)?)
        } else {
            let bytes = count as u64 * 4;
            States::Torch { m: device.zeros(bytes)?, v: device.zeros(bytes)? }
        };
        let bytes = count as u64 * 4;
        let lent = spare.filter(|s| s.bytes >= bytes);
        let own = lent.is_none().then(|| device.alloc(bytes)).transpose()?;
        Ok(Self {
            settings,
            updates: 0,
            states,
            partials: device.alloc(count.div_ceil(PARTIAL) as u64 * 8)?,
            norm: device.zeros(16)?,
            gradient: lent.map_or_else(|| own.as_ref().map_or(0, Buffer::ptr), |s| s.ptr),
            _own: own,
        })
    }

    fn scalars(&self, learning_rate: f64) -> Scalars {
        let [beta1, beta2] = self.settings.betas;
        let power = self.updates;
        let (first, second) = (1.0 - beta1.powi(power), 1.0 - beta2.powi(power));
        Scalars {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step: (learning_rate / first) as f32,
            root: second.sqrt() as f32,
            eps: self.settings.eps as f32,
            decay: (1.0 - learning_rate * self.settings.weight_decay) as f32,
            rate: learning_rate as f32,
            weight_decay: self.settings.weight_decay as f32,
            updates: power,
            unused: 0,
        }
    }

    /// Lays out the gradient of the step, of which `scale` is a factor (of the loss, against the small
    /// range of f16; else 1), and takes its global norm, for [`Optimizer::update`].
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn collect(&self, device: &Device, lora: &Lora, scale: f32) -> Result<(), CudaError> {
        lora.collect(device, self.gradient)?;
        let (g, partials, norm) = (self.gradient, self.partials.ptr(), self.norm.ptr());
        let blocks = lora.count.div_ceil(PARTIAL);
        let (count, number, limit) = (lora.count as u64, blocks as i32, self.settings.clip as f32);
        // SAFETY: buffers were made for this adapter.
        unsafe {
            let kernel = (FILE, "square_partials");
            device.launch(kernel, [blocks, 1], 256, 0, args![g, count, partials])?;
            let kernel = (FILE, "clip_factor");
            device.launch(kernel, [1, 1], 256, 0, args![partials, number, limit, scale, norm])
        }
    }

    /// Undoes the scale of the gradient that was collected, clips it, updates the masters and their
    /// operands, and zeroes the gradient. Where the norm is not finite, which says that a scaled
    /// gradient overflowed, the step is to be skipped by [`Lora::zero_grad`] in its place.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn update(
        &mut self,
        device: &Device,
        lora: &Lora,
        learning_rate: f64,
    ) -> Result<(), CudaError> {
        self.updates += 1;
        let s = self.scalars(learning_rate);
        let (p, g, norm) = (lora.values.ptr(), self.gradient, self.norm.ptr());
        let count = lora.count as u64;
        // SAFETY: buffers were made for this adapter.
        unsafe {
            match &self.states {
                States::Torch { m, v } => {
                    let (m, v) = (m.ptr(), v.ptr());
                    let grid = [lora.count.div_ceil(256), 1];
                    let args = args![p, g, m, v, count, s, norm];
                    device.launch((FILE, "adamw"), grid, 256, 0, args)?;
                }
                States::Blocks(b) => {
                    let [m, v, ms, vs] = [&b.m, &b.v, &b.m_scale, &b.v_scale].map(Buffer::ptr);
                    let (runs, maps) = (b.runs.ptr(), b.maps.ptr());
                    let args = args![p, g, m, v, ms, vs, runs, maps, s, norm];
                    let grid = [b.count, 1];
                    if b.count > 0 {
                        device.launch((FILE, "adamw_8bit"), grid, 256, 0, args)?;
                    }
                    let [m, v, runs] = [&b.small_m, &b.small_v, &b.small_runs].map(Buffer::ptr);
                    let args = args![p, g, m, v, runs, s, norm];
                    let grid = [b.small_count, 1];
                    if b.small_count > 0 {
                        device.launch((FILE, "adamw_bitsandbytes"), grid, 256, 0, args)?;
                    }
                }
            }
        }
        lora.refresh(device)?;
        lora.zero_grad(device)
    }

    /// Appends updates done and all states to `out`, for [`Optimizer::read`].
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn write(&self, device: &Device, out: &mut Vec<u8>) -> Result<(), CudaError> {
        out.extend(MAGIC);
        out.extend(self.updates.to_le_bytes());
        for buffer in self.states.buffers() {
            out.extend(device.read(buffer, buffer.bytes() as usize)?);
        }
        Ok(())
    }

    /// Whether `bytes` are what [`Optimizer::write`] writes for this shape and kind.
    pub fn accepts(&self, bytes: &[u8]) -> bool {
        self.parse(bytes).is_some()
    }

    /// Number of updates, and the states.
    fn parse<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8; 4], &'a [u8])> {
        let (updates, states) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
        let size: u64 = self.states.buffers().iter().map(|b| b.bytes()).sum();
        (states.len() as u64 == size).then_some((updates, states))
    }

    /// Takes back what [`Optimizer::write`] wrote; false, and nothing changed, where it is of another
    /// shape or kind.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read(&mut self, device: &Device, bytes: &[u8]) -> Result<bool, CudaError> {
        let Some((updates, mut rest)) = self.parse(bytes) else { return Ok(false) };
        self.updates = i32::from_le_bytes(*updates);
        for buffer in self.states.buffers() {
            let (own, later) = rest.split_at(buffer.bytes() as usize);
            device.write(buffer.ptr(), own)?;
            rest = later;
        }
        Ok(true)
    }

    /// Global norm of the newest gradient without its scale, before clipping; not finite where an
    /// element is not.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read_norm(&self, device: &Device) -> Result<f32, CudaError> {
        Ok(device.read_f32(&self.norm, 1)?[0])
    }
}

impl States {
    /// What changes from step to step.
    fn buffers(&self) -> Vec<&Buffer> {
        match self {
            Self::Torch { m, v } => vec![m, v],
            Self::Blocks(b) => vec![&b.m, &b.v, &b.m_scale, &b.v_scale, &b.small_m, &b.small_v],
        }
    }
}

impl Blocks {
    fn new(device: &Device, tensors: &[Range<usize>], maps: &[f32]) -> Result<Self, CudaError> {
        let (mut runs, mut small_runs): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
        for tensor in tensors {
            let list = if tensor.len() < LEAST_QUANTISED { &mut small_runs } else { &mut runs };
            for start in tensor.clone().step_by(BLOCK) {
                list.extend((start as u64).to_le_bytes());
                list.extend(((tensor.end - start).min(BLOCK) as u32).to_le_bytes());
                list.extend([0; 4]);
            }
        }
        let (count, small_count) = (runs.len() / 16, small_runs.len() / 16);
        let elements = tensors.last().map_or(0, |t| t.end) as u64;
        // Codes are offsets into the maps: zero is code 127 signed and 0 unsigned, but with a scale
        // of zero every code means zero.
        Ok(Self {
            m: device.zeros(elements)?,
            v: device.zeros(elements)?,
            m_scale: device.zeros(count as u64 * 4)?,
            v_scale: device.zeros(count as u64 * 4)?,
            runs: device.upload(&runs)?,
            count,
            small_m: device.zeros((small_count * BLOCK) as u64 * 4)?,
            small_v: device.zeros((small_count * BLOCK) as u64 * 4)?,
            small_runs: device.upload(&small_runs)?,
            small_count,
            maps: device.upload_f32(maps)?,
        })
    }
}
