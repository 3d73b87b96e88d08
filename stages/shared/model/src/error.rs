//! A model that cannot be loaded or used.

use std::path::{Path, PathBuf};

/// A model that cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint, adapter or batch is wrong.
    #[error("{0}")]
    Input(String),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// The file system refused.
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        /// Completes "could not".
        doing: &'static str,
        /// File.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
}

impl ModelError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}

impl From<ModelError> for contract::StageError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Input(message) => Self::input(message),
            ModelError::Checkpoint(error) => error.into(),
            ModelError::Io { doing, path, source } => Self::io(doing, &path, &source),
        }
    }
}
