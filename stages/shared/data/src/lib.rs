//! The formats that stages hand to each other: rows, prompts, predictions, metrics, packed tokens.
//!
//! Every format is plain JSON Lines or safetensors, so that other tools can read what `pipe` makes.

mod jsonl;
mod prediction;
mod prompt;
mod row;
mod text;
mod tokens;

pub use jsonl::{DataError, read_jsonl, write_json, write_jsonl};
pub use prediction::{ClassCounts, ManualAnswer, Metrics, Paired, Parse, Prediction, Rate};
pub use prompt::{Expected, ExpectedCall, Prompt};
pub use row::{Function, Message, Role, Row, Tool, ToolCall};
pub use text::RenderedRow;
pub use tokens::{TokenFile, TokenFileError};
