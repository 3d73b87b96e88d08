//! JSON and JSON Lines files, with the line of every error.

use std::fs;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use contract::{Fault, StageError};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A file that two stages share could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
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
    /// A line does not parse.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
}

impl From<DataError> for StageError {
    fn from(error: DataError) -> Self {
        match &error {
            DataError::Io { doing, path, source } => Self::io(doing, path, source),
            DataError::Parse { .. } => Self::new(Fault::Input, error.to_string()),
        }
    }
}

/// Reads one value a line; empty lines are skipped.
///
/// # Errors
/// [`DataError`] with file, line and column.
pub fn read_jsonl<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, DataError> {
    let io = |source| DataError::Io { doing: "read", path: path.to_owned(), source };
    let reader = BufReader::new(fs::File::open(path).map_err(io)?);
    let mut rows = Vec::new();
    for (index, line) in reader.lines().enumerate() {
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        rows.push(serde_json::from_str(&line).map_err(|e| DataError::Parse {
            path: path.to_owned(),
            line: index + 1,
            column: e.column(),
            message: e.to_string(),
        })?);
    }
    Ok(rows)
}

/// Writes one value a line.
///
/// # Errors
/// [`DataError::Io`] when the disk refuses.
pub fn write_jsonl<'a, T: Serialize + 'a>(
    path: &Path,
    rows: impl IntoIterator<Item = &'a T>,
) -> Result<(), DataError> {
    let io = |source| DataError::Io { doing: "write", path: path.to_owned(), source };
    let mut out = BufWriter::new(fs::File::create(path).map_err(io)?);
    for row in rows {
        serde_json::to_writer(&mut out, row).map_err(|e| io(e.into()))?;
        out.write_all(b"\n").map_err(io)?;
    }
    out.flush().map_err(io)
}

/// Writes one pretty-printed JSON value.
///
/// # Errors
/// [`DataError::Io`] when the disk refuses.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DataError> {
    let io = |source| DataError::Io { doing: "write", path: path.to_owned(), source };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| io(e.into()))?;
    bytes.push(b'\n');
    fs::write(path, bytes).map_err(io)
}
