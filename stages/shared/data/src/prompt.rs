//! Prompts for evaluation: what `template` hands to `evaluate`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Tool;

/// One decision of the model. One line of `prompts.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// Row id and turn, as in `simple_python_12#1`; unique within a file.
    pub id: String,
    /// [`crate::Row::index`]; reports sort by it.
    pub index: u64,
    /// Index of the assistant message that is to be predicted.
    pub turn: u64,
    /// Rendered history up to and including the generation prompt (teacher-forced).
    pub text: String,
    /// What ends the model's turn in this template, such as `<|im_end|>`.
    pub end_mark: String,
    /// The last user message, for people.
    pub user: String,
    /// Tools on offer.
    pub tools: Vec<Tool>,
    /// The right answer; `None` for prompts that are answered but not scored.
    pub expected: Option<Expected>,
}

/// The right answer to a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// Calls, in order; empty means that the right decision is to answer in text.
    pub calls: Vec<ExpectedCall>,
    /// The reference text of the turn, for people.
    pub text: String,
}

/// One right call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedCall {
    /// Name of the tool.
    pub name: String,
    /// Accepted values of every argument. A list per argument; an accepted `""` means that it may
    /// be left out. Where the source lists no alternatives, each list has the one right value.
    pub arguments: Map<String, Value>,
}

impl Prompt {
    /// `call`, `no-call` (tools on offer, none fits) or `no-tools`; `None` where not scored.
    pub fn class(&self) -> Option<&'static str> {
        let expected = self.expected.as_ref()?;
        Some(match (expected.calls.is_empty(), self.tools.is_empty()) {
            (false, _) => "call",
            (true, false) => "no-call",
            (true, true) => "no-tools",
        })
    }
}
