//! Matrices of GGUF files, kept in ggml's blocks.

use std::ops::Range;

use crate::{Bytes, FloatType, GgmlType, ggml};

/// A row-major matrix `[rows, columns]` in one of ggml's types.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockMatrix {
    shape: [usize; 2],
    dtype: GgmlType,
    data: Bytes,
    /// Rows of a head, where llama.cpp has interleaved its halves.
    interleaved: Option<usize>,
}

impl BlockMatrix {
    /// A matrix from its blocks. With `interleaved`, rows `2i` and `2i + 1` of each head of so many
    /// rows are rows `i` and `i + d/2` of the matrix.
    ///
    /// # Errors
    /// Names a type that is not supported, or says what does not fit.
    pub(crate) fn new(
        shape: [usize; 2],
        dtype: GgmlType,
        data: Bytes,
        interleaved: Option<usize>,
    ) -> Result<Self, String> {
        if !GgmlType::DECODED.contains(&dtype) {
            let supported = GgmlType::DECODED.map(|t| format!("{t:?}")).join(", ");
            return Err(format!(
                "has type {dtype:?}, which is not supported (supported: {supported}): requantise it"
            ));
        }
        if dtype.tensor_bytes(&shape.map(|d| d as u64)) != Some(data.len() as u64) {
            return Err(format!("has {} bytes, which do not fit {shape:?}", data.len()));
        }
        if let Some(rows) = interleaved
            && (rows == 0 || !rows.is_multiple_of(2) || !shape[0].is_multiple_of(rows))
        {
            return Err(format!("has {} rows, which are no heads of {rows}", shape[0]));
        }
        Ok(Self { shape, dtype, data, interleaved })
    }

    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    pub(crate) fn is_f32(&self) -> bool {
        self.dtype == GgmlType::F32
    }

    /// Type and bytes of a matrix of floats whose rows lie in order.
    pub(crate) fn plain(self) -> Option<(FloatType, Bytes)> {
        let dtype = match self.dtype {
            GgmlType::F32 => FloatType::F32,
            GgmlType::F16 => FloatType::F16,
            GgmlType::BF16 => FloatType::Bf16,
            _ => return None,
        };
        self.interleaved.is_none().then_some((dtype, self.data))
    }

    /// Bytes of the blocks.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Decodes rows into `out` `[rows.len(), columns]`.
    ///
    /// # Panics
    /// Where `rows` is not inside the matrix or `out` is not of that size.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let [count, columns] = self.shape;
        assert!(rows.start <= rows.end && rows.end <= count, "rows {rows:?} of {count}");
        assert_eq!(out.len(), rows.len() * columns, "length of the decoded rows");
        let stride = self.data.len() / count.max(1);
        let data: &[u8] = &self.data;
        let Some(head) = self.interleaved else {
            let data = &data[rows.start * stride..rows.end * stride];
            return ggml::decode_into(self.dtype, data, out);
        };
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.max(1))) {
            let (first, r) = (row / head * head, row % head);
            let stored = first + 2 * (r % (head / 2)) + r / (head / 2);
            ggml::decode_into(self.dtype, &data[stored * stride..][..stride], out);
        }
    }

    /// Decodes the whole matrix.
    pub(crate) fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape[0] * self.shape[1]];
        self.decode_rows(0..self.shape[0], &mut out);
        out
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]
mod tests {
    use super::*;

    fn rows(values: &[f32]) -> Bytes {
        values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    #[test]
    fn rows_of_a_head_come_back_in_halves() {
        // Two heads of four rows; llama.cpp interleaves the halves: 0, 2, 1, 3.
        let stored = rows(&[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let matrix = BlockMatrix::new([8, 1], GgmlType::F32, stored, Some(4)).unwrap();
        assert_eq!(matrix.decode(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let mut part = [0.0; 3];
        matrix.decode_rows(2..5, &mut part);
        assert_eq!(part, [2.0, 3.0, 4.0]);
    }

    #[test]
    fn any_rows_decode_as_in_the_whole() {
        for (dtype, columns) in [(GgmlType::Q4_1, 96), (GgmlType::Q6_K, 512), (GgmlType::F16, 5)] {
            let bytes = dtype.tensor_bytes(&[7, columns as u64]).unwrap();
            // No byte makes a scale that is not finite.
            let data: Vec<u8> = (0..bytes).map(|i| (i * 29 % 120) as u8).collect();
            let matrix = BlockMatrix::new([7, columns], dtype, data.into(), None).unwrap();
            let whole = matrix.decode();
            let mut part = vec![0.0; 3 * columns];
            matrix.decode_rows(2..5, &mut part);
            assert_eq!(part, whole[2 * columns..5 * columns], "{dtype:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let new = |shape, dtype, bytes: usize, heads| {
            BlockMatrix::new(shape, dtype, vec![0; bytes].into(), heads).unwrap_err()
        };
        assert!(new([1, 256], GgmlType::Q8_K, 292, None).contains("Q8_K, which is not supported"));
        assert!(new([2, 32], GgmlType::Q4_0, 35, None).contains("35 bytes"));
        assert!(new([1, 16], GgmlType::Q4_0, 9, None).contains("9 bytes"));
        assert!(new([6, 1], GgmlType::F32, 24, Some(4)).contains("no heads of 4"));
        assert!(new([3, 1], GgmlType::F32, 12, Some(3)).contains("no heads of 3"));
        assert!(new([3, 1], GgmlType::F32, 12, Some(0)).contains("no heads of 0"));
    }
}
