//! Reads model folders: GGUF, safetensors, configuration, tokenizer, chat template.
//!
//! Files come from strangers: nothing here trusts a length, a count or an offset it has not checked.

mod error;
pub mod gguf;

pub use error::CheckpointError;
pub use gguf::{GgmlType, Gguf, Metadata, TensorInfo};
