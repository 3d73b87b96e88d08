//! Chats in OpenAI's layout, one JSON object a line: `{"messages": […], "tools": […]}`.

use data::{Message, Role, Row, Tool, ToolCall};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    id: Option<String>,
    messages: Vec<RawMessage>,
    #[serde(default)]
    tools: Vec<RawTool>,
}

#[derive(Deserialize)]
struct RawMessage {
    role: Role,
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    tool_calls: Vec<RawCall>,
}

#[derive(Deserialize)]
struct RawCall {
    function: RawFunction,
}

#[derive(Deserialize)]
struct RawFunction {
    name: String,
    #[serde(default)]
    arguments: Value,
}

/// `{"type": "function", "function": {…}}`, or the function alone.
#[derive(Deserialize)]
struct RawTool {
    function: Option<Map<String, Value>>,
    #[serde(flatten)]
    bare: Map<String, Value>,
}

pub(crate) fn parse(value: Value, index: u64) -> Result<Row, String> {
    let raw: Raw = serde_json::from_value(value).map_err(|e| e.to_string())?;
    if raw.messages.iter().all(|m| m.role != Role::Assistant) {
        return Err("no assistant message to learn from".to_owned());
    }
    let mut messages = Vec::new();
    for message in raw.messages {
        let mut kept = Message::text(message.role, message.content.unwrap_or_default());
        if !message.tool_calls.is_empty() && message.role != Role::Assistant {
            return Err("calls in a message that is not the assistant's".to_owned());
        }
        for RawCall { function } in message.tool_calls {
            let arguments = arguments(&function)?;
            kept.tool_calls.push(ToolCall::new(function.name, arguments));
        }
        messages.push(kept);
    }
    let mut tools = Vec::new();
    for tool in raw.tools {
        let function = tool.function.unwrap_or(tool.bare);
        if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err("a tool has no name".to_owned());
        }
        tools.push(Tool::new(function));
    }
    Ok(Row { id: raw.id.unwrap_or_else(|| index.to_string()), index, tools, messages })
}

/// OpenAI writes arguments as JSON text; templates need the object.
fn arguments(function: &RawFunction) -> Result<Map<String, Value>, String> {
    match &function.arguments {
        Value::Null => Ok(Map::new()),
        Value::Object(arguments) => Ok(arguments.clone()),
        Value::String(text) if text.trim().is_empty() => Ok(Map::new()),
        Value::String(text) => serde_json::from_str(text)
            .map_err(|e| format!("the arguments of `{}` are not JSON: {e}", function.name)),
        _ => Err(format!("the arguments of `{}` are no object", function.name)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arguments_as_text_or_object_become_objects() {
        let row = |arguments: Value| {
            json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}],
                "tools": [{"type": "function", "function": {"name": "f"}}]})
        };
        for arguments in [json!("{\"a\": 1}"), json!({"a": 1})] {
            let parsed = parse(row(arguments), 0).unwrap();
            assert_eq!(parsed.messages[1].tool_calls[0].function.arguments["a"], json!(1));
            assert_eq!(parsed.tools[0].name(), "f");
        }
        assert!(parse(row(json!("{")), 0).unwrap_err().contains("not JSON"));
    }

    #[test]
    fn chat_without_an_assistant_is_refused() {
        let row = json!({"messages": [{"role": "user", "content": "x"}]});
        assert!(parse(row, 0).unwrap_err().contains("assistant"));
    }
}
