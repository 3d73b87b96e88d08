//! Which files of a model folder count.

use std::path::{Path, PathBuf};

use crate::{CheckpointError, Gguf};

/// A model folder, by the format of its weights.
#[derive(Debug)]
pub enum ModelFolder {
    /// One GGUF file holds everything.
    Gguf {
        /// The mapped file.
        gguf: Gguf,
    },
    /// `config.json`, safetensors and tokenizer files, as on the Hugging Face hub.
    Safetensors {
        /// The folder.
        dir: PathBuf,
    },
}

impl ModelFolder {
    /// Opens a folder that holds exactly one `*.gguf`, or `config.json` beside safetensors; or a
    /// GGUF file itself.
    ///
    /// # Errors
    /// [`CheckpointError`] where neither is there, or more than one GGUF file.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if path.is_file() {
            return Ok(Self::Gguf { gguf: Gguf::open(path)? });
        }
        let mut ggufs = Vec::new();
        for entry in std::fs::read_dir(path).map_err(|e| CheckpointError::io(path, e))? {
            let file = entry.map_err(|e| CheckpointError::io(path, e))?.path();
            if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
                ggufs.push(file);
            }
        }
        ggufs.sort();
        match ggufs.as_slice() {
            [one] => Ok(Self::Gguf { gguf: Gguf::open(one)? }),
            [] if path.join("config.json").is_file() => {
                Ok(Self::Safetensors { dir: path.to_owned() })
            }
            [] => Err(CheckpointError::content(
                path,
                "no model here: expected one `*.gguf` file, or `config.json` with `*.safetensors`",
            )),
            many => Err(CheckpointError::content(
                path,
                format!("{} GGUF files where one is expected: download just one", many.len()),
            )),
        }
    }

    /// The GGUF file, or the folder.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf { gguf } => gguf.path(),
            Self::Safetensors { dir } => dir,
        }
    }
}
