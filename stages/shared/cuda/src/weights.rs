//! Frozen weights on the device, and the operands they are decoded into.

mod load;
pub(crate) mod matrix;

use checkpoint::{Absmax, FloatType, LINEAR, ModelConfig, Nf4, StoredMatrix};

use crate::adapter::first_row;
use crate::device::{Buffer, Device, args};
use crate::{CudaError, Dtype, Lora};
use matrix::Matrix;

/// A frozen matrix `[out, in]`.
pub enum Linear {
    /// In the device's type.
    Plain(Buffer),
    /// NF4 as bitsandbytes stores it.
    Nf4 {
        /// Two codes a byte.
        codes: Buffer,
        /// For every block of 64: a byte with double quantisation, else an f32.
        absmax: Buffer,
        /// With double quantisation.
        nested: Option<Nested>,
        /// Kernel that decodes it: rounded to the weight's own type, then to the device's.
        kernel: &'static str,
    },
}

/// Scales of the scales.
pub struct Nested {
    /// Values of the 256 bytes, then the scale of every 256 bytes, f32.
    map_and_scales: Buffer,
    /// Added to every decoded scale.
    offset: f32,
}

/// Which product an operand is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// `[out, in + width]`, B in the last columns: `[x, u]` times its transpose is `x Wᵀ + u Bᵀ`.
    Forward,
    /// `[out + width, in]` in rows of `in + width`, A in the last rows: `[dy, du]` times it is
    /// `dy W + du A`.
    Backward,
}

struct Layer {
    input_norm: Buffer,
    feed_forward_norm: Buffer,
    /// Of the outputs of attention and of the feed-forward block, where the family has them.
    output_norms: Option<[Buffer; 2]>,
    linears: Vec<Linear>,
    /// Of q, k and v side by side.
    bias: Option<Buffer>,
}

/// A decoder's frozen weights.
pub struct Frozen {
    pub(crate) config: ModelConfig,
    pub(crate) embed: Buffer,
    head: Option<Buffer>,
    pub(crate) norm: Buffer,
    layers: Vec<Layer>,
}

impl Linear {
    /// A weight on the device. It stays in four bits where the kernel handles its blocks, and gives the
    /// bits that decoding here would: those of bitsandbytes, which rounds to the weight's own type and
    /// then to that of the product (its `compute_dtype`).
    pub(crate) fn upload(
        device: &Device,
        weight: &Matrix,
        shape: [usize; 2],
    ) -> Result<Self, CudaError> {
        match weight {
            Matrix::Stored(StoredMatrix::Nf4(weight)) if has_blocks_of_kernel(weight) => {
                let kernel = decoder(device.dtype, weight.dtype());
                let codes = device.upload(weight.packed())?;
                let (absmax, nested) = match weight.absmax() {
                    Absmax::Plain(scales) => (device.upload_f32(scales)?, None),
                    Absmax::Nested(n) => {
                        let scales: Vec<f32> = n.map.iter().chain(&n.absmax).copied().collect();
                        let map_and_scales = device.upload_f32(&scales)?;
                        let nested = Nested { map_and_scales, offset: n.offset };
                        (device.upload(&n.codes)?, Some(nested))
                    }
                };
                Ok(Self::Nf4 { codes, absmax, nested, kernel })
            }
            other => Ok(Self::Plain(other.upload(device, shape)?)),
        }
    }
}

/// The kernel of `nf4.cu` for a weight whose own type is `own`. Rounding twice to one type is rounding
/// once.
fn decoder(device: Dtype, own: FloatType) -> &'static str {
    match (own, device) {
        (FloatType::Bf16, Dtype::F32 | Dtype::F16) => "nf4_decode_bf16",
        (FloatType::F16, Dtype::F32 | Dtype::Bf16) => "nf4_decode_f16",
        _ => "nf4_decode",
    }
}

/// Whether the kernel handles the blocks of this weight.
fn has_blocks_of_kernel(weight: &Nf4) -> bool {
    let nested = match weight.absmax() {
        Absmax::Plain(_) => true,
        Absmax::Nested(nested) => nested.block_size == 256,
    };
    nested && weight.block_size() == 64 && weight.shape()[1].is_multiple_of(8)
}

impl Frozen {
    /// Random NF4 weights of a shape, with scales of trained magnitude: for measurements.
    ///
    /// # Errors
    /// [`CudaError`] where memory runs out.
    pub fn random(device: &Device, config: ModelConfig, seed: u64) -> Result<Self, CudaError> {
        let mut seed = seed;
        let mut bytes = |count: usize| {
            seed += 1;
            random_bytes(device, seed << 40, count)
        };
        let ones = || device.upload_f32(&vec![1.0; config.hidden_size]);
        let mut layers = Vec::new();
        for _ in 0..config.num_hidden_layers {
            let mut linears = Vec::new();
            for projection in 0..LINEAR.len() {
                let (inputs, outputs) = config.linear_shape(projection);
                let blocks = (inputs * outputs).div_ceil(64);
                // Codes average 0.45 of the scale in magnitude.
                let scale = 2.2 / (inputs as f32).sqrt();
                let (codes, absmax) = (bytes(inputs * outputs / 2)?, bytes(blocks)?);
                let mut scales: Vec<f32> = (0..256).map(|i| (i as f32 - 127.5) / 127.5).collect();
                scales.resize(256 + blocks.div_ceil(256), 0.1 * scale);
                let map_and_scales = device.upload_f32(&scales)?;
                let nested = Some(Nested { map_and_scales, offset: scale });
                linears.push(Linear::Nf4 { codes, absmax, nested, kernel: "nf4_decode" });
            }
            let width = config.linear_shape(0).1 + 2 * config.linear_shape(1).1;
            let bias = config.qkv_bias.then(|| device.zeros(width as u64 * device.dtype.size()));
            let outputs = || Ok::<_, CudaError>([ones()?, ones()?]);
            layers.push(Layer {
                input_norm: ones()?,
                feed_forward_norm: ones()?,
                output_norms: config.variations.output_norms.then(outputs).transpose()?,
                linears,
                bias: bias.transpose()?,
            });
        }
        let count = config.vocab_size * config.hidden_size;
        let embed = device.elements(count)?;
        let (ptr, number, scale, seed) = (embed.ptr(), count as u64, 0.02f32, seed << 40 | 1);
        // SAFETY: as many elements as were allocated.
        unsafe {
            device.launch(
                ("nf4.cu", "random_normal"),
                [count.div_ceil(256), 1],
                256,
                0,
                args![ptr, seed, scale, number],
            )?;
        }
        Ok(Self { embed, head: None, norm: ones()?, layers, config })
    }

    pub(crate) fn head(&self) -> u64 {
        self.head.as_ref().unwrap_or(&self.embed).ptr()
    }

    pub(crate) fn input_norm(&self, layer: usize) -> u64 {
        self.layers[layer].input_norm.ptr()
    }

    pub(crate) fn feed_forward_norm(&self, layer: usize) -> u64 {
        self.layers[layer].feed_forward_norm.ptr()
    }

    /// Norm of the output of attention (0) or of the feed-forward block (1), where there is one.
    pub(crate) fn output_norm(&self, layer: usize, block: usize) -> Option<u64> {
        self.layers[layer].output_norms.as_ref().map(|norms| norms[block].ptr())
    }

    /// Bias of a group's outputs, 0 for none.
    pub(crate) fn bias(&self, layer: usize, group: usize) -> u64 {
        let bias = self.layers[layer].bias.as_ref().filter(|_| group == 0);
        bias.map_or(0, Buffer::ptr)
    }

    /// Decodes the group's weights into rows of an operand: of `in + width` elements, which leave room
    /// for the factors that [`Lora::put`] adds.
    pub(crate) fn decode(
        &self,
        device: &Device,
        (layer, index): (usize, usize),
        lora: &Lora,
        operand: u64,
    ) -> Result<(), CudaError> {
        let ld = lora.groups[layer][index].row();
        for projection in (0..LINEAR.len()).filter(|p| crate::adapter::GROUP_OF[*p] == index) {
            let shape = self.config.linear_shape(projection);
            let row = first_row(&self.config, projection);
            let to = operand + (row * ld) as u64 * device.dtype.size();
            let linear = &self.layers[layer].linears[projection];
            decode_linear(device, linear, shape, to, ld)?;
        }
        Ok(())
    }
}

/// Writes a weight of `(in, out)` features to rows of stride `ld`.
pub(crate) fn decode_linear(
    device: &Device,
    linear: &Linear,
    (inputs, outputs): (usize, usize),
    to: u64,
    ld: usize,
) -> Result<(), CudaError> {
    let (codes, absmax, nested, kernel) = match linear {
        Linear::Plain(weight) => {
            return copy_columns(device, (weight.ptr(), inputs), (to, ld), inputs, outputs);
        }
        Linear::Nf4 { codes, absmax, nested, kernel } => {
            (codes.ptr(), absmax.ptr(), nested, kernel)
        }
    };
    let scales = nested.as_ref().map_or(0, |n| n.map_and_scales.ptr());
    let offset = nested.as_ref().map_or(0.0, |n| n.offset);
    let (columns, ld, count) = (inputs as i32, ld as i32, (inputs * outputs) as u64);
    let grid = [(inputs * outputs).div_ceil(4 * 8 * 256), 1];
    let args = args![codes, absmax, scales, offset, to, columns, ld, count];
    // SAFETY: the buffers hold a matrix of this shape; the caller's rows hold it decoded.
    unsafe { device.launch(("nf4.cu", kernel), grid, 256, 0, args) }
}

fn random_bytes(device: &Device, seed: u64, count: usize) -> Result<Buffer, CudaError> {
    let buffer = device.alloc(count as u64)?;
    let (ptr, number) = (buffer.ptr(), count as u64);
    // SAFETY: as many bytes as were allocated.
    unsafe {
        let grid = [count.div_ceil(256), 1];
        device.launch(("nf4.cu", "random_bytes"), grid, 256, 0, args![ptr, seed, number])?;
    }
    Ok(buffer)
}

/// Copies a matrix between row strides.
pub(crate) fn copy_columns(
    device: &Device,
    (from, ld_from): (u64, usize),
    (to, ld_to): (u64, usize),
    width: usize,
    rows: usize,
) -> Result<(), CudaError> {
    let vector = 16 / device.dtype.size() as usize;
    let grid = [(rows * width / vector).div_ceil(256), 1];
    let [ldi, ldo, width, rows] = [ld_from, ld_to, width, rows].map(|v| v as i32);
    // SAFETY: the caller's matrices.
    unsafe {
        device.launch(
            ("layer.cu", "copy_columns"),
            grid,
            256,
            0,
            args![from, ldi, to, ldo, width, rows],
        )
    }
}
