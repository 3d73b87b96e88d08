//! A conversation with its tools: what `subsample` makes of every source format.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One conversation. One line of `train.jsonl`, `test.jsonl` and `dev.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Identity in the source: its own id (`simple_python_12`) or the index in file order.
    pub id: String,
    /// Index in source order, before shuffling; reports sort by it.
    pub index: u64,
    /// Tools on offer, in the layout of transformers' chat templates.
    pub tools: Vec<Tool>,
    /// Turns, in the layout of transformers' chat templates.
    pub messages: Vec<Message>,
}

/// One tool on offer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `{name, description, parameters}`, keys in source order.
    pub function: Map<String, Value>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a call.
    Tool,
}

/// One turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// Text; empty where the turn is calls only.
    pub content: String,
    /// Calls of an assistant turn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Scoring only: for each call of `tool_calls`, every accepted value of every argument; an
    /// accepted empty string means that the argument may be left out (BFCL's convention). Absent
    /// where the call itself is the only right answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accepted: Vec<Map<String, Value>>,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name and arguments.
    pub function: Function,
}

/// Name and arguments of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// Name of the tool.
    pub name: String,
    /// Arguments as an object (never as a string: templates would encode it twice).
    pub arguments: Map<String, Value>,
}

impl Tool {
    /// A tool from its `{name, description, parameters}` object.
    pub fn new(function: Map<String, Value>) -> Self {
        Self { kind: "function".to_owned(), function }
    }

    /// Name, empty where the source gave none.
    pub fn name(&self) -> &str {
        self.function.get("name").and_then(Value::as_str).unwrap_or_default()
    }
}

impl ToolCall {
    /// A call of `name`.
    pub fn new(name: impl Into<String>, arguments: Map<String, Value>) -> Self {
        Self { kind: "function".to_owned(), function: Function { name: name.into(), arguments } }
    }
}

impl Message {
    /// A turn without calls.
    pub fn text(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), tool_calls: Vec::new(), accepted: Vec::new() }
    }
}
