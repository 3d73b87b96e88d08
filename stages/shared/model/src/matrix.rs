//! Frozen matrices: in f32, or as the checkpoint stores them and decoded whenever they are used.
//!
//! Decoding gives the same values every time, so that where a matrix lies changes no result.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use checkpoint::{StoredMatrix, Weights};
use rayon::prelude::*;

use crate::ModelError;
use crate::decoder::Memory;

/// Values that one thread decodes at a time.
const CHUNK: usize = 1 << 16;

/// A frozen matrix `[rows, columns]`.
pub enum Matrix {
    /// In f32.
    Full(Box<Tensor<2>>),
    /// In four or 16 bits.
    Stored(Arc<StoredMatrix>),
}

impl Matrix {
    /// A matrix in f32 on the CPU.
    pub(crate) fn full(values: Vec<f32>, shape: [usize; 2]) -> Self {
        let tensor = Tensor::from_data(TensorData::new(values, shape), &Device::flex());
        Self::Full(Box::new(tensor))
    }

    /// Reads the matrix `name`, which is the weight of a linear layer or not.
    pub(crate) fn load(
        weights: &Weights<'_>,
        name: &str,
        shape: [usize; 2],
        linear: bool,
    ) -> Result<Self, ModelError> {
        if let Some(stored) = weights.load_stored(name, shape, linear)? {
            return Ok(Self::Stored(Arc::new(stored)));
        }
        let values = if linear {
            weights.load_linear(name, shape)?.into_f32()
        } else {
            weights.load(name, &shape)?
        };
        Ok(Self::full(values, shape))
    }

    /// `[rows, columns]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Full(tensor) => tensor.dims(),
            Self::Stored(stored) => stored.shape(),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Full(tensor) => tensor.dims().iter().product::<usize>() * size_of::<f32>(),
            Self::Stored(stored) => stored.bytes(),
        }
    }

    /// The matrix in f32.
    pub fn tensor(&self) -> Tensor<2> {
        match self {
            Self::Full(tensor) => tensor.as_ref().clone(),
            Self::Stored(stored) => {
                let values = decode(stored, 0..stored.shape()[0]);
                let data = TensorData::new(values, stored.shape());
                Tensor::from_data(data, &Device::flex())
            }
        }
    }

    /// The matrix's own memory.
    pub(crate) fn pin(&self) -> PinnedMatrix {
        match self {
            Self::Full(tensor) => PinnedMatrix::Full(Memory::of(tensor)),
            Self::Stored(stored) => PinnedMatrix::Stored(stored.clone()),
        }
    }
}

/// A share of a matrix's memory.
pub(crate) enum PinnedMatrix {
    Full(Memory),
    Stored(Arc<StoredMatrix>),
}

impl PinnedMatrix {
    /// The matrix, borrowed.
    pub(crate) fn view(&self) -> MatrixView<'_> {
        match self {
            Self::Full(memory) => MatrixView::Full(memory.slice()),
            Self::Stored(stored) => MatrixView::Stored(stored),
        }
    }
}

/// A borrowed matrix.
#[derive(Clone, Copy)]
pub(crate) enum MatrixView<'a> {
    /// Row-major.
    Full(&'a [f32]),
    Stored(&'a StoredMatrix),
}

impl<'a> MatrixView<'a> {
    /// All values, row-major; decoded where they have to be, for as long as the result lives.
    pub(crate) fn values(self) -> Cow<'a, [f32]> {
        match self {
            Self::Full(values) => Cow::Borrowed(values),
            Self::Stored(stored) => Cow::Owned(decode(stored, 0..stored.shape()[0])),
        }
    }

    /// A copy of the given rows of `width` values.
    pub(crate) fn rows(self, rows: Range<usize>, width: usize) -> Vec<f32> {
        match self {
            Self::Full(values) => values[rows.start * width..rows.end * width].to_vec(),
            Self::Stored(stored) => decode(stored, rows),
        }
    }

    /// The row of every token, of a table `[vocabulary, width]`.
    pub(crate) fn embed(self, width: usize, tokens: impl Iterator<Item = usize>) -> Vec<f32> {
        match self {
            Self::Full(table) => crate::forward::embed(table, width, tokens),
            Self::Stored(stored) => {
                let mut out = Vec::new();
                for token in tokens {
                    let end = out.len();
                    out.resize(end + width, 0.0);
                    stored.decode_rows(token..token + 1, &mut out[end..]);
                }
                out
            }
        }
    }

    /// Whether the values lie in memory in f32.
    pub(crate) fn is_full(self) -> bool {
        matches!(self, Self::Full(_))
    }
}

fn decode(stored: &StoredMatrix, rows: Range<usize>) -> Vec<f32> {
    let columns = stored.shape()[1];
    let each = (CHUNK / columns).max(1);
    let mut out = vec![0.0; rows.len() * columns];
    out.par_chunks_mut(each * columns).enumerate().for_each(|(index, out)| {
        let first = rows.start + index * each;
        stored.decode_rows(first..first + out.len() / columns, out);
    });
    out
}
