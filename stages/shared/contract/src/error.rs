//! Why a stage failed, as told to the user.

use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Whose fault it is; decides the exit code and whether a retry can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// An input or a param is wrong.
    Input,
    /// The network, a remote service or a missing program.
    Environment,
    /// A file could not be read or written here: permissions, a full disk.
    Io,
    /// Out of host or device memory.
    Memory,
    /// A defect of `pipe`.
    Internal,
}

/// A failed stage.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct StageError {
    /// Whose fault it is.
    pub fault: Fault,
    /// What went wrong and where (file, line, row id): lowercase, no full stop.
    pub message: String,
    /// What the user can do about it.
    pub help: Option<String>,
}

impl StageError {
    /// An error without a hint.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: message.into(), help: None }
    }

    /// A wrong input or param.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Fault::Input, message)
    }

    /// A file system error at `path`; `doing` completes "could not …".
    pub fn io(doing: &str, path: &Path, error: &std::io::Error) -> Self {
        let full = error.kind() == std::io::ErrorKind::StorageFull;
        let plain = Self::new(Fault::Io, format!("could not {doing} {}: {error}", path.display()));
        if full { plain.help("free some space on that disk and run again") } else { plain }
    }

    /// A defect of `pipe`.
    pub fn internal(error: impl Display) -> Self {
        Self::new(Fault::Internal, error.to_string())
    }

    /// The same error with a hint.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}
