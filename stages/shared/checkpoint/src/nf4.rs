//! Matrices in bitsandbytes' NF4: four-bit codes, with a scale for every block of the flat matrix.
//!
//! Format and rounding: `bitsandbytes/functional.py` (`QuantState`, `dequantize_4bit`) and
//! `csrc/cpu_ops.cpp`. Dettmers et al. 2023, QLoRA (arXiv:2305.14314) describes the type.

use std::ops::Range;

use half::{bf16, f16};

use crate::Bytes;

/// Values of the sixteen codes: quantiles of the normal distribution, scaled to [-1, 1]
/// (`get_4bit_type("nf4")`).
pub const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Block sizes that bitsandbytes knows.
const BLOCK_SIZES: Range<usize> = 32..4097;

/// The type that a quantised matrix had, to which its decoded values are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// 32-bit float: no rounding.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl FloatType {
    /// The type of that name in torch.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "float32" => Self::F32,
            "bfloat16" => Self::Bf16,
            "float16" => Self::F16,
            _ => return None,
        })
    }

    /// The nearest value of the type, ties to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Scale of each block: its largest absolute value.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// As floats.
    Plain(Vec<f32>),
    /// Double quantisation.
    Nested(NestedAbsmax),
}

/// Scales in eight bits: block `i` has `map[codes[i]] * absmax[i / block_size] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedAbsmax {
    /// One code for each block of the matrix.
    pub codes: Bytes,
    /// One scale for every `block_size` codes.
    pub absmax: Vec<f32>,
    /// Values of the codes.
    pub map: Box<[f32; 256]>,
    /// Codes that share a scale.
    pub block_size: usize,
    /// Mean that was taken off the scales before they were quantised.
    pub offset: f32,
}

/// A linear layer's weight `[out, in]` in NF4.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    shape: [usize; 2],
    block_size: usize,
    dtype: FloatType,
    packed: Bytes,
    absmax: Absmax,
}

impl Nf4 {
    /// A matrix from its parts. `packed` holds two codes a byte, the first in the high nibble, of
    /// the row-major matrix; a block of `block_size` of them shares a scale and may span rows.
    ///
    /// # Errors
    /// Says which length or block size does not fit.
    pub fn new(
        shape: [usize; 2],
        block_size: usize,
        dtype: FloatType,
        packed: Bytes,
        absmax: Absmax,
    ) -> Result<Self, String> {
        let count = shape[0].checked_mul(shape[1]).filter(|n| *n > 0);
        let count = count.ok_or_else(|| format!("the shape {shape:?} is empty or too large"))?;
        check_block_size("blocksize", block_size)?;
        check_len("the packed codes", packed.len(), count.div_ceil(2))?;
        let blocks = count.div_ceil(block_size);
        match &absmax {
            Absmax::Plain(scales) => check_len("absmax", scales.len(), blocks)?,
            Absmax::Nested(nested) => {
                check_block_size("nested_blocksize", nested.block_size)?;
                check_len("absmax", nested.codes.len(), blocks)?;
                let outer = blocks.div_ceil(nested.block_size);
                check_len("nested_absmax", nested.absmax.len(), outer)?;
            }
        }
        Ok(Self { shape, block_size, dtype, packed, absmax })
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Elements that share a scale.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The type that decoded values are rounded to.
    pub fn dtype(&self) -> FloatType {
        self.dtype
    }

    /// Two codes a byte, the first in the high nibble.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales as stored.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        let scales = match &self.absmax {
            Absmax::Plain(scales) => size_of_val(&scales[..]),
            Absmax::Nested(nested) => nested.codes.len() + size_of_val(&nested.absmax[..]),
        };
        self.packed.len() + scales
    }

    /// The scale of block `index` of the flat matrix.
    pub fn scale(&self, index: usize) -> f32 {
        match &self.absmax {
            Absmax::Plain(scales) => scales[index],
            Absmax::Nested(nested) => {
                let value = nested.map[usize::from(nested.codes[index])];
                value * nested.absmax[index / nested.block_size] + nested.offset
            }
        }
    }

    /// Decodes rows into `out` `[rows.len(), in]`, as bitsandbytes does: value times scale in f32,
    /// rounded to the type the matrix had.
    ///
    /// # Panics
    /// Where `rows` is not inside the matrix or `out` is not of that size.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let [outputs, inputs] = self.shape;
        assert!(rows.start <= rows.end && rows.end <= outputs, "rows {rows:?} of {outputs}");
        assert_eq!(out.len(), rows.len() * inputs, "length of the decoded rows");
        let (mut at, mut rest) = (rows.start * inputs, out);
        while !rest.is_empty() {
            let block = at / self.block_size;
            let len = rest.len().min((block + 1) * self.block_size - at);
            let (run, later) = rest.split_at_mut(len);
            let scale = self.scale(block);
            let values = NF4_VALUES.map(|value| self.dtype.round(value * scale));
            unpack(&self.packed, at, &values, run);
            (at, rest) = (at + len, later);
        }
    }

    /// Decodes the whole matrix, row-major; see [`Nf4::decode_rows`].
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape[0] * self.shape[1]];
        self.decode_rows(0..self.shape[0], &mut out);
        out
    }
}

/// Looks up the codes of elements `at..at + out.len()`.
fn unpack(packed: &[u8], at: usize, values: &[f32; 16], out: &mut [f32]) {
    // An odd start takes the low nibble of a byte that the run before has begun.
    let (head, out) = out.split_at_mut(at % 2);
    if let [first] = head {
        *first = values[usize::from(packed[at / 2] & 15)];
    }
    let packed = &packed[at.div_ceil(2)..];
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(packed) {
        *pair = [values[usize::from(byte >> 4)], values[usize::from(byte & 15)]];
    }
    if let [last] = last {
        *last = values[usize::from(packed[pairs.len()] >> 4)];
    }
}

fn check_block_size(what: &str, size: usize) -> Result<(), String> {
    if BLOCK_SIZES.contains(&size) && size.is_power_of_two() {
        return Ok(());
    }
    Err(format!("{what} is {size}, not a power of two from 32 to 4096"))
}

fn check_len(what: &str, found: usize, expected: usize) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what} has {found} values, expected {expected}"))
}
