//! Reads model folders: GGUF, safetensors, configuration, tokenizer, chat template.
//!
//! Files come from strangers: nothing here trusts a length, a count or an offset it has not checked.

mod chat_template;
mod config;
mod error;
mod folder;
mod ggml;
pub mod gguf;
mod nf4;
mod packed;
mod quant_state;
mod quantise;
mod quantization;
mod shards;
mod tensors;
mod tokenizer;

pub use chat_template::ChatTemplate;
pub use config::{Family, ModelConfig};
pub use error::CheckpointError;
pub use folder::ModelFolder;
pub use gguf::{GgmlType, Gguf, Metadata, TensorInfo};
pub use nf4::{Absmax, FloatType, NF4_VALUES, NestedAbsmax, Nf4};
pub use quantise::{NestedRounding, dynamic_map};
pub use tensors::{LinearWeight, Weights, to_f32};
pub use tokenizer::{Encoding, Tokenizer};
