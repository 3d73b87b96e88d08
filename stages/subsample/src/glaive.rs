//! glaive-function-calling-v2: a JSON array of `{system, chat}` texts.
//!
//! Calls are `<functioncall> {"name": …, "arguments": '{…}'}` with the arguments in single quotes.
//! Others drop every quote before parsing, which corrupts apostrophes inside values; here the
//! quoted object is taken as it stands.

use data::{Function, Message, Role, Row, Tool, ToolCall};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

const CALL: &str = "<functioncall>";
const END: &str = "<|endoftext|>";
/// Marks around calls that say nothing more.
const MARKS: [&str; 3] = ["</functioncall>", "<multiplefunctions>", "</multiplefunctions>"];
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
    let mut text = text.replace(END, "");
    for mark in MARKS {
        text = text.replace(mark, "");
    }
    let mut parts = text.split(CALL);
    let mut words = vec![parts.next().unwrap_or_default().trim()];
    let mut tool_calls = Vec::new();
    for payload in parts {
        let (first, mut rest) = call(payload.trim())?;
        tool_calls.push(first);
        // More calls may follow without a mark of their own, and so may words.
        while rest.starts_with('{') {
            let (next, after) = call(rest)?;
            tool_calls.push(next);
            rest = after;
        }
        words.push(rest);
    }
    words.retain(|w| !w.is_empty());
    Ok(Message { tool_calls, ..Message::text(Role::Assistant, words.join("\n\n")) })
}

/// The call at the beginning of `payload`, and what follows it.
fn call(payload: &str) -> Result<(ToolCall, &str), String> {
    let fault = |what: &str| {
        let shown: String = payload.chars().take(80).collect();
        format!("a call {what}: {shown}")
    };
    // Proper JSON first: arguments as an object or as a JSON text.
    if let Some((Value::Object(call), rest)) = leading::<Value>(payload) {
        let name = call.get("name").and_then(Value::as_str).ok_or_else(|| fault("has no name"))?;
        let arguments = match call.get("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments.clone(),
            Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
            Some(Value::String(text)) => {
                serde_json::from_str(text).map_err(|_| fault("has arguments that are not JSON"))?
            }
            Some(_) => return Err(fault("has arguments that are no object")),
        };
        return Ok((ToolCall::new(name, arguments), rest));
    }
    let key = payload.find("\"arguments\"").ok_or_else(|| fault("is not JSON"))?;
    let head = payload[..key].trim_end().trim_end_matches(',');
    let head: Map<String, Value> =
        serde_json::from_str(&format!("{head}}}")).map_err(|_| fault("is not JSON"))?;
    let name = head.get("name").and_then(Value::as_str).ok_or_else(|| fault("has no name"))?;
    let rest = payload[key + "\"arguments\"".len()..].trim_start().strip_prefix(':');
    let rest = rest.ok_or_else(|| fault("is not JSON"))?.trim_start();
    let inner = rest.strip_prefix('\'').unwrap_or(rest).trim_start();
    // The object says itself where it ends: an apostrophe inside it is no closing quote, and where
    // the call was cut off behind it nothing is lost.
    let (arguments, rest) = match leading(inner).or_else(|| leading_unescaped(inner)) {
        Some(parsed) => parsed,
        None if inner.starts_with(['\'', '}']) => (Map::new(), inner),
        None => return Err(fault("has arguments that are not JSON")),
    };
    let rest = rest.strip_prefix('\'').unwrap_or(rest).trim_start();
    let rest = rest.strip_prefix('}').unwrap_or(rest).trim();
    let function = Function { name: name.to_owned(), arguments };
    Ok((ToolCall { kind: "function".to_owned(), function }, rest))
}

/// The JSON value at the beginning of `text`, and the rest without blanks around it.
fn leading<T: DeserializeOwned>(text: &str) -> Option<(T, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<T>();
    let value = values.next()?.ok()?;
    Some((value, text[values.byte_offset()..].trim()))
}

/// As [`leading`], for an object in the `repr` of Python: of a text with both kinds of quotes it
/// writes `\'`, which JSON does not know.
fn leading_unescaped(text: &str) -> Option<(Map<String, Value>, &str)> {
    let unescaped = text.replace("\\'", "'");
    let mut values = serde_json::Deserializer::from_str(&unescaped).into_iter();
    let value = values.next()?.ok()?;
    // Where that place is in `text`.
    let (mut left, mut rest) = (values.byte_offset(), text);
    while left > 0 {
        rest = rest.strip_prefix("\\'").map_or(rest, |_| &rest[1..]);
        let first = rest.chars().next()?;
        left = left.saturating_sub(first.len_utf8());
        rest = &rest[first.len_utf8()..];
    }
    Some((value, rest.trim()))
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
        let quotes = one("<functioncall> {\"name\": \"f\", \"arguments\": ''} <|endoftext|>");
        assert!(quotes.tool_calls[0].function.arguments.is_empty());
        let none = one("<functioncall> {\"name\": \"f\"}");
        assert!(none.tool_calls[0].function.arguments.is_empty());
    }

    #[test]
    fn apostrophes_survive_in_every_kind_of_quotes() {
        let arguments = |text: &str| one(text).tool_calls[0].function.arguments["q"].clone();
        for (written, q) in [
            (r#"'{"q": "'}' is not the end, it's here"}'}"#, "'}' is not the end, it's here"),
            (r#"'{"q": "it\'s said: \"no\""}'}"#, "it's said: \"no\""),
            (r#"'{"q": "d\'été 日本\'"}' } then it\'s over"#, "d'été 日本'"),
            (r#""{\"q\": \"it's\"}"}"#, "it's"),
            (r#"{"q": "it's"}}"#, "it's"),
        ] {
            let text = format!("<functioncall> {{\"name\": \"f\", \"arguments\": {written}");
            assert_eq!(arguments(&text), json!(q), "{written}");
        }
    }

    #[test]
    fn calls_that_were_cut_off_behind_their_arguments_are_whole() {
        for cut in ["'}", "'", "", "' }  \n"] {
            let text =
                format!("<functioncall> {{\"name\": \"f\", \"arguments\": '{{\"n\": 1}}{cut}");
            let message = one(&text);
            assert_eq!(message.tool_calls[0].function.arguments["n"], json!(1), "{cut:?}");
            assert_eq!(message.content, "", "{cut:?}");
        }
    }

    #[test]
    fn several_calls_in_one_turn_however_they_are_marked() {
        let call = |n: u32| format!("{{\"name\": \"f\", \"arguments\": '{{\"n\": {n}}}'}}");
        let (first, second) = (call(1), call(2));
        for text in [
            format!("<functioncall> {first} <functioncall> {second} <|endoftext|>"),
            format!("<functioncall> {first}\n{second}"),
            format!(
                "<multiplefunctions> <functioncall> {first} </functioncall> \
                 <functioncall> {second} </functioncall> </multiplefunctions>"
            ),
        ] {
            let message = one(&text);
            let numbers: Vec<_> =
                message.tool_calls.iter().map(|c| c.function.arguments["n"].clone()).collect();
            assert_eq!(numbers, [json!(1), json!(2)], "{text}");
            assert_eq!(message.content, "", "{text}");
        }
        let around = one(&format!("I look. <functioncall> {first} It's on its way."));
        assert_eq!(around.content, "I look.\n\nIt's on its way.");
        assert_eq!(around.tool_calls.len(), 1);
    }

    #[test]
    fn broken_call_is_named_and_no_panic() {
        for text in [
            "<functioncall>",
            "<functioncall> {",
            "<functioncall> {\"name\": 1}",
            "<functioncall> {\"name\": \"f\", \"arguments\": '{\"a\": }'}",
            "<functioncall> {\"name\": \"f\", \"arguments\": '{\"a\": \\'",
            "<functioncall> {\"name\": \"f\", \"arguments\": '{\"a\": \"é\\",
            "<functioncall> {\"name\": \"f\", \"arguments\": [1]}",
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
        assert_eq!(two[0].function["parameters"], json!({}));
    }
}
