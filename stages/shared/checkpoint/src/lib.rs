//! Reads model folders: GGUF, safetensors, configuration, tokenizer, chat template.
//!
//! Files come from strangers: nothing here trusts a length, a count or an offset it has not checked.

mod blocks;
mod bytes;
mod chat_template;
mod config;
mod error;
mod folder;
mod ggml;
mod ggml_encode;
mod ggml_type;
pub mod gguf;
mod gguf_writer;
mod hub_config;
mod names;
mod nf4;
mod packed;
mod quant_state;
mod quantise;
mod quantization;
mod safetensors_writer;
mod sentencepiece;
mod shards;
mod stored;
mod tensors;
mod tokenizer;
mod variations;
mod vocabulary;

pub use blocks::BlockMatrix;
pub use bytes::Bytes;
pub use chat_template::ChatTemplate;
pub use config::{Family, ModelConfig};
pub use error::CheckpointError;
pub use folder::ModelFolder;
pub use ggml_type::GgmlType;
pub use gguf::{Gguf, Metadata, TensorInfo};
pub use gguf_writer::{GgufWriter, gguf_rows};
pub use names::{LINEAR, gguf_name};
pub use nf4::{Absmax, FloatType, NF4_VALUES, NestedAbsmax, Nf4};
pub use quantise::{NestedRounding, dynamic_map};
pub use safetensors_writer::{ShardPlan, plan_shards, shard_index, write_bf16};
pub use stored::{HalfMatrix, StoredMatrix};
pub use tensors::{LinearWeight, Weights, to_f32};
pub use tokenizer::{Encoding, Tokenizer};
pub use variations::{Activation, Variations};
pub use vocabulary::{Vocabulary, VocabularyKind};
