//! Frozen matrices: in f32, or as the checkpoint stores them and decoded when they are used.
//!
//! Decoding gives the same values every time, so that where a matrix lies changes no result.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor, TensorData};
use checkpoint::{ModelConfig, StoredMatrix, Weights};
use rayon::prelude::*;

use crate::ModelError;
use crate::adapter::PROJECTIONS;
use crate::decoder::Memory;

/// Values that one thread decodes at a time.
const CHUNK: usize = 1 << 16;
/// A model whose matrices take no more than this in f32 is decoded once, when it is first used: a
/// larger one whenever it is used. That changes speed and memory, never a value.
const KEPT_BYTES: usize = 1 << 30;

/// A frozen matrix `[rows, columns]`.
pub enum Matrix {
    /// In f32.
    Full(Box<Tensor<2>>),
    /// As its file has it.
    Stored(Arc<Stored>),
}

/// A matrix in its stored form.
pub struct Stored {
    matrix: StoredMatrix,
    /// The values in f32 once they were used, where they are kept.
    kept: Option<OnceLock<Vec<f32>>>,
}

impl Matrix {
    /// A matrix in f32 on the CPU.
    pub(crate) fn full(values: Vec<f32>, shape: [usize; 2]) -> Self {
        let tensor = Tensor::from_data(TensorData::new(values, shape), &Device::flex());
        Self::Full(Box::new(tensor))
    }

    pub(crate) fn stored(matrix: StoredMatrix, keep: bool) -> Self {
        Self::Stored(Arc::new(Stored { matrix, kept: keep.then(OnceLock::new) }))
    }

    /// Reads the matrix `name`, which is the weight of a linear layer or not.
    pub(crate) fn load(
        weights: &Weights<'_>,
        name: &str,
        shape: [usize; 2],
        linear: bool,
    ) -> Result<Self, ModelError> {
        if let Some(stored) = weights.load_stored(name, shape, linear)? {
            return Ok(Self::stored(stored, is_kept(weights.config())));
        }
        let values = if linear {
            weights.load_linear(name, shape)?.into_f32()
        } else {
            weights.load(name, &shape)?
        };
        Ok(Self::full(values, shape))
    }

    /// The same, decoded whenever it is used, as in a large model.
    #[cfg(test)]
    pub(crate) fn not_kept(&self) -> Self {
        match self {
            Self::Full(tensor) => Self::Full(tensor.clone()),
            Self::Stored(stored) => Self::stored(stored.matrix.clone(), false),
        }
    }

    /// `[rows, columns]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Full(tensor) => tensor.dims(),
            Self::Stored(stored) => stored.matrix.shape(),
        }
    }

    /// Bytes of the matrix as it was loaded.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Full(tensor) => tensor.dims().iter().product::<usize>() * size_of::<f32>(),
            Self::Stored(stored) => stored.matrix.bytes(),
        }
    }

    /// The matrix in f32.
    pub fn tensor(&self) -> Tensor<2> {
        match self {
            Self::Full(tensor) => tensor.as_ref().clone(),
            Self::Stored(stored) => {
                let data = TensorData::new(stored.values().into_owned(), self.dims());
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

impl Stored {
    /// Whether it is in NF4.
    pub(crate) fn is_nf4(&self) -> bool {
        matches!(self.matrix, StoredMatrix::Nf4(_))
    }

    fn values(&self) -> Cow<'_, [f32]> {
        let decode = || decode(&self.matrix, 0..self.matrix.shape()[0]);
        let Some(kept) = &self.kept else { return Cow::Owned(decode()) };
        // Decoded before the cell is taken: a thread that waits inside for its helpers may be given
        // work that wants the same cell.
        let values = if let Some(values) = kept.get() {
            values
        } else {
            let values = decode();
            kept.get_or_init(|| values)
        };
        Cow::Borrowed(values)
    }
}

/// Whether the values of a model's matrices are kept in f32 once they were decoded.
fn is_kept(config: &ModelConfig) -> bool {
    let layer = (0..PROJECTIONS.len()).fold(0_usize, |sum, projection| {
        let (inputs, outputs) = config.linear_shape(projection);
        sum.saturating_add(inputs.saturating_mul(outputs))
    });
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    let outer = config.vocab_size.saturating_mul(tables * config.hidden_size);
    let values = layer.saturating_mul(config.num_hidden_layers).saturating_add(outer);
    values <= KEPT_BYTES / size_of::<f32>()
}

/// A share of a matrix's memory.
pub(crate) enum PinnedMatrix {
    Full(Memory),
    Stored(Arc<Stored>),
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
    Stored(&'a Stored),
}

impl<'a> MatrixView<'a> {
    /// All values, row-major; decoded where they have to be, for as long as the result lives.
    pub(crate) fn values(self) -> Cow<'a, [f32]> {
        match self {
            Self::Full(values) => Cow::Borrowed(values),
            Self::Stored(stored) => stored.values(),
        }
    }

    /// A copy of the given rows of `width` values.
    pub(crate) fn rows(self, rows: Range<usize>, width: usize) -> Vec<f32> {
        match self {
            Self::Full(values) => values[rows.start * width..rows.end * width].to_vec(),
            Self::Stored(stored) => decode(&stored.matrix, rows),
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
                    stored.matrix.decode_rows(token..token + 1, &mut out[end..]);
                }
                out
            }
        }
    }

    /// Whether the values stay in memory in f32.
    pub(crate) fn is_full(self) -> bool {
        match self {
            Self::Full(_) => true,
            Self::Stored(stored) => stored.kept.is_some(),
        }
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
