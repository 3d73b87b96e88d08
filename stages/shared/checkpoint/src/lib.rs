//! Reads model folders: GGUF, safetensors, configuration, tokenizer, chat template.
//!
//! Files come from strangers: nothing here trusts a length, a count or an offset it has not checked.

mod chat_template;
mod config;
mod error;
mod folder;
mod ggml;
pub mod gguf;
mod tensors;
mod tokenizer;

pub use chat_template::ChatTemplate;
pub use config::{Family, ModelConfig};
pub use error::CheckpointError;
pub use folder::ModelFolder;
pub use gguf::{GgmlType, Gguf, Metadata, TensorInfo};
pub use tensors::{Weights, to_f32};
pub use tokenizer::{Encoding, Tokenizer};
