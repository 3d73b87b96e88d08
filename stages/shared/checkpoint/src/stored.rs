//! Matrices as a checkpoint stores them, decoded row by row when they are needed.

use std::ops::Range;

use half::{bf16, f16};

use crate::nf4::{FloatType, Nf4};
use crate::{BlockMatrix, Bytes};

/// A row-major matrix `[rows, columns]` that takes no more memory than in its file.
#[derive(Clone, Debug, PartialEq)]
pub enum StoredMatrix {
    /// Four-bit codes and their scales.
    Nf4(Nf4),
    /// 16-bit floats.
    Half(HalfMatrix),
    /// ggml's blocks.
    Blocks(BlockMatrix),
}

/// A row-major matrix of bf16 or f16.
#[derive(Clone, Debug, PartialEq)]
pub struct HalfMatrix {
    shape: [usize; 2],
    is_bf16: bool,
    /// Little-endian.
    data: Bytes,
}

impl HalfMatrix {
    /// A matrix from little-endian bytes; `None` where the type is not of 16 bits or the length is
    /// not that of the shape.
    pub(crate) fn new(shape: [usize; 2], dtype: FloatType, data: Bytes) -> Option<Self> {
        let is_bf16 = match dtype {
            FloatType::Bf16 => true,
            FloatType::F16 => false,
            FloatType::F32 => return None,
        };
        let fits = shape[0].checked_mul(shape[1])?.checked_mul(2)? == data.len();
        fits.then_some(Self { shape, is_bf16, data })
    }

    fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let columns = self.shape[1];
        let bits = &self.data.as_chunks().0[rows.start * columns..rows.end * columns];
        assert_eq!(out.len(), bits.len(), "length of the decoded rows");
        let pairs = out.iter_mut().zip(bits);
        if self.is_bf16 {
            pairs.for_each(|(o, b)| *o = bf16::from_le_bytes(*b).to_f32());
        } else {
            pairs.for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32());
        }
    }
}

impl StoredMatrix {
    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Nf4(nf4) => nf4.shape(),
            Self::Half(half) => half.shape,
            Self::Blocks(blocks) => blocks.shape(),
        }
    }

    /// Decodes rows into `out` `[rows.len(), columns]`.
    ///
    /// # Panics
    /// Where `rows` is not inside the matrix or `out` is not of that size.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Nf4(nf4) => nf4.decode_rows(rows, out),
            Self::Half(half) => half.decode_rows(rows, out),
            Self::Blocks(blocks) => blocks.decode_rows(rows, out),
        }
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Nf4(nf4) => nf4.bytes(),
            Self::Half(half) => half.data.len(),
            Self::Blocks(blocks) => blocks.bytes(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn rows_of_sixteen_bits_decode_exactly() {
        let values = [1.5_f32, -2.0, 0.007_812_5, 3.0, 65_504.0, -0.0];
        for dtype in [FloatType::Bf16, FloatType::F16] {
            let rounded: Vec<f32> = values.iter().map(|v| dtype.round(*v)).collect();
            let bytes: Vec<u8> = rounded
                .iter()
                .flat_map(|v| match dtype {
                    FloatType::Bf16 => bf16::from_f32(*v).to_le_bytes(),
                    _ => f16::from_f32(*v).to_le_bytes(),
                })
                .collect();
            let matrix = StoredMatrix::Half(HalfMatrix::new([3, 2], dtype, bytes.into()).unwrap());
            let mut out = [0.0; 4];
            matrix.decode_rows(1..3, &mut out);
            assert!(out.iter().zip(&rounded[2..]).all(|(a, b)| a.to_bits() == b.to_bits()));
            assert_eq!((matrix.shape(), matrix.bytes()), ([3, 2], 12));
        }
        assert!(HalfMatrix::new([3, 2], FloatType::Bf16, vec![0; 10].into()).is_none());
        assert!(HalfMatrix::new([1, 2], FloatType::F32, vec![0; 8].into()).is_none());
    }
}
