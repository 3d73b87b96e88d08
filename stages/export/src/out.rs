//! Files of the export: each appears under its name when it is whole.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use contract::StageError;

/// What has been written.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// Files with weights, in order.
    pub(crate) files: Vec<String>,
    pub(crate) tensors: u64,
    /// Bytes of the files with weights.
    pub(crate) bytes: u64,
    /// Sum of the squares of the exact weights, and of what rounding changed them by.
    squares: f64,
    error_squares: f64,
}

impl Written {
    /// Takes note of a tensor and of the values that a reader will get.
    pub(crate) fn tensor(&mut self, exact: &[f32], stored: impl Iterator<Item = f32>) {
        self.tensors += 1;
        for (exact, stored) in exact.iter().zip(stored) {
            self.squares += f64::from(*exact).powi(2);
            self.error_squares += (f64::from(*exact) - f64::from(stored)).powi(2);
        }
    }

    /// Root mean square of what rounding changed, over that of the weights.
    pub(crate) fn relative_error(&self) -> f64 {
        if self.squares > 0.0 { (self.error_squares / self.squares).sqrt() } else { 0.0 }
    }
}

/// A failure while a file is being written.
pub(crate) enum Fault {
    Disk(io::Error),
    Stage(StageError),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl From<StageError> for Fault {
    fn from(error: StageError) -> Self {
        Self::Stage(error)
    }
}

/// Writes the file `name` of `folder` through `write`; returns its length in bytes.
///
/// # Errors
/// What `write` fails with; the file is not there then.
pub(crate) fn file(
    folder: &Path,
    name: &str,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), Fault>,
) -> Result<u64, StageError> {
    let (path, partial) = (folder.join(name), folder.join(format!("{name}.part")));
    let attempt = || -> Result<u64, Fault> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
        write(&mut out)?;
        out.flush()?;
        let file = out.into_inner().map_err(|e| Fault::Disk(e.into_error()))?;
        file.sync_all()?;
        let len = file.metadata()?.len();
        std::fs::rename(&partial, &path)?;
        Ok(len)
    };
    attempt().map_err(|fault| {
        // What is left of it must not be taken for a whole one; that it may be gone is fine.
        let _ = std::fs::remove_file(&partial);
        match fault {
            Fault::Disk(error) => StageError::io("write", &path, &error),
            Fault::Stage(error) => error,
        }
    })
}

/// Writes bytes as the file `name` of `folder`.
pub(crate) fn bytes(folder: &Path, name: &str, content: &[u8]) -> Result<(), StageError> {
    file(folder, name, |out| Ok(out.write_all(content)?)).map(|_| ())
}
