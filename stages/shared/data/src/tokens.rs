//! The token artifact: packed rows of token ids as one safetensors file.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// Packed token rows of one split.
///
/// Tensors of the file: `tokens` i32 `[n]`; `cu_seqlens` i32 `[segments + 1]`, the bounds of every
/// segment (one example or a piece of one) inside `tokens`; `row_offsets` i32 `[rows + 1]`, the
/// bounds of every packed row, each also a segment bound; `label_mask` u8 `[n]`, 1 where the token
/// counts in the loss as a target. Positions (from 0 in every segment) and segment ids derive from
/// `cu_seqlens`; a segment's first token is never a target. The order of tensors in the file and
/// its empty metadata are fixed, so equal content is equal bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenFile {
    /// Token ids.
    pub tokens: Vec<i32>,
    /// Segment bounds, from 0 to `tokens.len()`.
    pub cu_seqlens: Vec<i32>,
    /// Packed row bounds, from 0 to `tokens.len()`.
    pub row_offsets: Vec<i32>,
    /// 1 where the token is a target.
    pub label_mask: Vec<u8>,
}

/// A token file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// The file system refused.
    #[error("could not access {path}: {source}")]
    Io {
        /// File.
        path: String,
        /// What the file system said.
        source: std::io::Error,
    },
    /// Not a token file, or an inconsistent one.
    #[error("{path} is not a token file: {message}")]
    Format {
        /// File.
        path: String,
        /// What is wrong.
        message: String,
    },
}

impl From<TokenFileError> for contract::StageError {
    fn from(error: TokenFileError) -> Self {
        Self::input(error.to_string())
    }
}

impl TokenFile {
    /// Number of packed rows.
    pub fn rows(&self) -> usize {
        self.row_offsets.len().saturating_sub(1)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`TokenFileError`] when the disk refuses or the content is inconsistent.
    pub fn write(&self, path: &Path) -> Result<(), TokenFileError> {
        self.check(path)?;
        let bytes = |values: &[i32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let parts: [(&str, Dtype, usize, Vec<u8>); 4] = [
            ("cu_seqlens", Dtype::I32, self.cu_seqlens.len(), bytes(&self.cu_seqlens)),
            ("label_mask", Dtype::U8, self.label_mask.len(), self.label_mask.clone()),
            ("row_offsets", Dtype::I32, self.row_offsets.len(), bytes(&self.row_offsets)),
            ("tokens", Dtype::I32, self.tokens.len(), bytes(&self.tokens)),
        ];
        let format = |e: safetensors::SafeTensorError| TokenFileError::Format {
            path: path.display().to_string(),
            message: e.to_string(),
        };
        let mut views = Vec::with_capacity(parts.len());
        for (name, dtype, len, data) in &parts {
            views.push((*name, TensorView::new(*dtype, vec![*len], data).map_err(format)?));
        }
        let out = safetensors::serialize(views, None::<HashMap<String, String>>).map_err(format)?;
        fs::write(path, out)
            .map_err(|source| TokenFileError::Io { path: path.display().to_string(), source })
    }

    /// Reads and checks the file.
    ///
    /// # Errors
    /// [`TokenFileError`] naming the tensor that is missing or inconsistent.
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        let shown = path.display().to_string();
        let raw =
            fs::read(path).map_err(|source| TokenFileError::Io { path: shown.clone(), source })?;
        let format = |message: String| TokenFileError::Format { path: shown.clone(), message };
        let file = SafeTensors::deserialize(&raw).map_err(|e| format(e.to_string()))?;
        let tensor = |name: &str, dtype| {
            let view = file.tensor(name).map_err(|e| format(format!("{name}: {e}")))?;
            if view.dtype() != dtype || view.shape().len() != 1 {
                return Err(format(format!("{name} has the wrong type or rank")));
            }
            Ok(view.data().to_vec())
        };
        let ints = |name: &str| -> Result<Vec<i32>, TokenFileError> {
            let bytes = tensor(name, Dtype::I32)?;
            Ok(bytes
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect())
        };
        let read = Self {
            tokens: ints("tokens")?,
            cu_seqlens: ints("cu_seqlens")?,
            row_offsets: ints("row_offsets")?,
            label_mask: tensor("label_mask", Dtype::U8)?,
        };
        read.check(path)?;
        Ok(read)
    }

    fn check(&self, path: &Path) -> Result<(), TokenFileError> {
        let n = i32::try_from(self.tokens.len()).unwrap_or(i32::MAX);
        let bounds = |v: &[i32]| {
            v.first() == Some(&0) && v.last() == Some(&n) && v.windows(2).all(|w| w[0] <= w[1])
        };
        let fault = if self.tokens.len() > i32::MAX as usize {
            "more than 2^31 tokens in one split"
        } else if self.label_mask.len() != self.tokens.len() {
            "label_mask and tokens differ in length"
        } else if !bounds(&self.cu_seqlens) {
            "cu_seqlens does not run from 0 to the number of tokens"
        } else if !bounds(&self.row_offsets)
            || self.row_offsets.iter().any(|o| self.cu_seqlens.binary_search(o).is_err())
        {
            "row_offsets are not segment bounds from 0 to the number of tokens"
        } else {
            return Ok(());
        };
        let path = path.display().to_string();
        Err(TokenFileError::Format { path, message: fault.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_file_reads_back_and_is_the_same_bytes_twice() {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile {
            tokens: vec![5, 6, 7, 8, 9],
            cu_seqlens: vec![0, 2, 5],
            row_offsets: vec![0, 5],
            label_mask: vec![0, 1, 0, 1, 1],
        };
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        file.write(&a).unwrap();
        file.write(&b).unwrap();
        assert_eq!(TokenFile::read(&a).unwrap(), file);
        assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
    }

    #[test]
    fn inconsistent_offsets_are_refused() {
        let file = TokenFile {
            tokens: vec![1, 2],
            cu_seqlens: vec![0, 2],
            row_offsets: vec![0, 1, 2],
            label_mask: vec![1, 1],
        };
        let error = file.write(Path::new("x")).unwrap_err().to_string();
        assert!(error.contains("row_offsets"), "{error}");
    }
}
