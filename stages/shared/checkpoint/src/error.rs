//! Why a model folder cannot be read.

use std::path::{Path, PathBuf};

/// A model folder, or a file of it, that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("could not read {}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// A binary file that breaks its own format.
    #[error("{} is not a valid GGUF file: {message} at byte {offset}", path.display())]
    Gguf {
        /// File.
        path: PathBuf,
        /// Byte offset of the value that does not fit.
        offset: u64,
        /// What is wrong.
        message: String,
    },
    /// A file that is well-formed and yet not what is needed.
    #[error("{}: {message}", path.display())]
    Content {
        /// File or folder.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Text that cannot be tokenised.
    #[error("{0}")]
    Text(String),
}

impl CheckpointError {
    /// An I/O error at `path`.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    /// A content error at `path`.
    pub fn content(path: &Path, message: impl Into<String>) -> Self {
        Self::Content { path: path.to_owned(), message: message.into() }
    }
}

impl From<CheckpointError> for contract::StageError {
    fn from(error: CheckpointError) -> Self {
        match &error {
            CheckpointError::Io { path, source } => Self::io("read", path, source),
            CheckpointError::Gguf { .. } => Self::input(error.to_string())
                .help("the file may be cut short: download it again and compare its sha256"),
            _ => Self::input(error.to_string()),
        }
    }
}
