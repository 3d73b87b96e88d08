//! glaive-function-calling-v2: a JSON array of `{system, chat}` texts.
//!
//! Calls are `<functioncall> {"name": …, "arguments": '{…}'}` with the arguments in single quotes.
//! Others drop every quote before parsing, which corrupts apostrophes inside values; here the
//! quoted object is taken as it stands.

use data::{Function, Message, Role, Row, Tool, ToolCall};
use serde::Deserialize;
use serde_json::{Map, Value};

const CALL: &str = "<functioncall>";
const END: &str = "<|endoftext|>";
const SPEAKERS: [(&str, Role); 3] =
    [("USER:", Role::User), ("ASSISTANT:", Role::Assistant), ("FUNCTION RESPONSE:", Role::Tool)];

/// One row of the source.
#[derive(Deserialize)]
struct Raw {
    system: String,
    chat: String,
}

pub(crate) fn parse(value: Value, index: u64) -> Result<Row, String> {
    let raw: Raw = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let tools = tools(&raw.system)?;
    let messages = messages(&raw.chat)?;
    Ok(Row { id: index.to_string(), index, tools, messages })
}

/// Zero or more JSON objects, one after the other, behind a sentence that says so. The sentence
/// itself is not kept: the chat template says it in its own words.
fn tools(system: &str) -> Result<Vec<Tool>, String> {
    let Some(start) = system.find('{') else { return Ok(Vec::new()) };
    let stream =
        serde_json::Deserializer::from_str(&system[start..]).into_iter::<Map<String, Value>>();
    let mut tools = Vec::new();
    for function in stream {
        let function = function.map_err(|e| format!("a function in `system` is not JSON: {e}"))?;
        if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err("a function in `system` has no name".to_owned());
        }
        tools.push(Tool::new(function));
    }
    Ok(tools)
}

fn messages(chat: &str) -> Result<Vec<Message>, String> {
    let turns = turns(chat);
    if turns.is_empty() {
        return Err("`chat` has no `USER:` or `ASSISTANT:`".to_owned());
    }
    turns
        .into_iter()
        .map(|(role, text)| match role {
            Role::Assistant => assistant(text),
            _ => Ok(Message::text(role, text.replace(END, "").trim())),
        })
        .filter(|m| m.as_ref().map_or(true, |m| !m.content.is_empty() || !m.tool_calls.is_empty()))
        .collect()
}

/// Text between speakers' names at line starts.
fn turns(chat: &str) -> Vec<(Role, &str)> {
    let mut starts: Vec<(usize, usize, Role)> = Vec::new();
    let mut at = 0;
    for line in chat.split_inclusive('\n') {
        if let Some((name, role)) = SPEAKERS.iter().find(|(name, _)| line.starts_with(name)) {
            starts.push((at, at + name.len(), *role));
        }
        at += line.len();
    }
    let ends = starts.iter().skip(1).map(|s| s.0).chain([chat.len()]);
    starts.iter().zip(ends).map(|((_, begin, role), end)| (*role, &chat[*begin..end])).collect()
}

fn assistant(text: &str) -> Result<Message, String> {
    let text = text.replace(END, "");
    let mut parts = text.split(CALL);
    let content = parts.next().unwrap_or_default().trim();
    let mut message = Message::text(Role::Assistant, content);
    for payload in parts {
        message.tool_calls.push(call(payload.trim())?);
    }
    Ok(message)
}

fn call(payload: &str) -> Result<ToolCall, String> {
    let fault = |what: &str| {
        let shown: String = payload.chars().take(80).collect();
        format!("a call {what}: {shown}")
    };
    // Proper JSON first: arguments as an object or as a JSON text.
    if let Ok(Value::Object(call)) = serde_json::from_str::<Value>(payload) {
        let name = call.get("name").and_then(Value::as_str).ok_or_else(|| fault("has no name"))?;
        let arguments = match call.get("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments.clone(),
            Some(Value::String(text)) => {
                serde_json::from_str(text).map_err(|_| fault("has arguments that are not JSON"))?
            }
            Some(_) => return Err(fault("has arguments that are no object")),
        };
        return Ok(ToolCall::new(name, arguments));
    }
    let key = payload.find("\"arguments\"").ok_or_else(|| fault("is not JSON"))?;
    let head = payload[..key].trim_end().trim_end_matches(',');
    let head: Map<String, Value> =
        serde_json::from_str(&format!("{head}}}")).map_err(|_| fault("is not JSON"))?;
    let name = head.get("name").and_then(Value::as_str).ok_or_else(|| fault("has no name"))?;
    let rest = payload[key + "\"arguments\"".len()..].trim_start().strip_prefix(':');
    let rest = rest.ok_or_else(|| fault("is not JSON"))?.trim();
    // The last closing brace ends the call; where it was cut off, the quote still ends the object.
    let inner = match rest.strip_prefix('\'') {
        Some(quoted) => {
            let end = quoted.rfind('\'').ok_or_else(|| fault("lacks the closing quote"))?;
            &quoted[..end]
        }
        None => rest.strip_suffix('}').unwrap_or(rest).trim_end(),
    };
    let arguments = if inner.trim().is_empty() {
        Map::new()
    } else {
        // JSON knows no `\'`; Python's repr of a text with both quotes writes it.
        serde_json::from_str(inner)
            .or_else(|_| serde_json::from_str(&inner.replace("\\'", "'")))
            .map_err(|_| fault("has arguments that are not JSON"))?
    };
    Ok(ToolCall {
        kind: "function".to_owned(),
        function: Function { name: name.to_owned(), arguments },
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(text: &str) -> Message {
        let chat = format!("USER: hi\n\n\nASSISTANT: {text}");
        messages(&chat).unwrap().pop().unwrap()
    }

    #[test]
    fn apostrophes_in_values_survive() {
        let message = one(
            "<functioncall> {\"name\": \"f\", \"arguments\": '{\"q\": \"it's O'Brien's\"}'} <|endoftext|>",
        );
        assert_eq!(message.tool_calls[0].function.arguments["q"], json!("it's O'Brien's"));
    }

    #[test]
    fn prose_several_calls_and_a_missing_end_mark() {
        let call =
            |n: u32| format!("<functioncall> {{\"name\": \"f\", \"arguments\": '{{\"n\": {n}}}'}}");
        let message = one(&format!("Sure. {} {}", call(1), call(2)));
        assert_eq!(message.content, "Sure.");
        let numbers: Vec<_> =
            message.tool_calls.iter().map(|c| c.function.arguments["n"].clone()).collect();
        assert_eq!(numbers, [json!(1), json!(2)]);
    }

    #[test]
    fn plain_object_and_empty_arguments_are_calls_too() {
        let plain = one("<functioncall> {\"name\": \"f\", \"arguments\": {\"a\": 1}}");
        assert_eq!(plain.tool_calls[0].function.arguments["a"], json!(1));
        let empty = one("<functioncall> {\"name\": \"f\", \"arguments\": '{}'}");
        assert!(empty.tool_calls[0].function.arguments.is_empty());
        let none = one("<functioncall> {\"name\": \"f\"}");
        assert!(none.tool_calls[0].function.arguments.is_empty());
    }

    #[test]
    fn broken_call_is_named_and_no_panic() {
        for text in [
            "<functioncall>",
            "<functioncall> {",
            "<functioncall> {\"name\": 1}",
            "<functioncall> {\"name\": \"f\", \"arguments\": '{\"a\": }'}",
        ] {
            assert!(assistant(text).is_err(), "{text}");
        }
    }

    #[test]
    fn two_tools_and_no_tools() {
        assert!(
            tools("SYSTEM: You are a helpful assistant, with no access to external functions.")
                .unwrap()
                .is_empty()
        );
        let two =
            tools("SYSTEM: x -\n{\"name\": \"a\", \"parameters\": {}}\n\n{\"name\": \"b\"}\n")
                .unwrap();
        assert_eq!(two.iter().map(Tool::name).collect::<Vec<_>>(), ["a", "b"]);
    }
}
