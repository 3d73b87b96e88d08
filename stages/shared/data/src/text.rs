//! A row rendered by the chat template: what `template` hands to `tokenize-pack`.

use serde::{Deserialize, Serialize};

/// One rendered conversation. One line of `train.text.jsonl` and `dev.text.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenderedRow {
    /// [`crate::Row::id`].
    pub id: String,
    /// The whole conversation, begin and end marks included as text.
    pub text: String,
    /// Byte ranges `[start, end)` of `text` that the model is to produce: from just after the
    /// generation prompt to the end of the turn, its end mark included. Ascending, disjoint.
    pub response_spans: Vec<[usize; 2]>,
}
