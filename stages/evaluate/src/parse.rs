//! Finds function calls in generated text: strictly (the trained format) and leniently (any common
//! format).
//!
//! Both share one notion of an *attempt*, so that "rightly no call" never depends on the format:
//! a false call in a foreign format is a false call for the strict parser too. Neither panics on
//! any text.

use data::{Parse, Tool};
use serde_json::{Map, Value};

use crate::literal::Cursor;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Marks that begin a call in other formats: Glaive, Mistral, Llama 3.
const FOREIGN: [&str; 4] = ["<functioncall>", "<function_call>", "[TOOL_CALLS]", "<|python_tag|>"];

type Call = Map<String, Value>;

/// Reads `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, once or several times: white
/// space around the JSON is free, text before the first mark is allowed (templates render content
/// before calls), text after the last is not.
pub(crate) fn strict(text: &str, tools: &[Tool]) -> Parse {
    let attempted = attempts(text, tools);
    let found = if !attempted {
        Ok(Vec::new())
    } else if text.contains(OPEN) {
        strict_calls(text).and_then(|calls| on_offer(calls, tools))
    } else {
        Err(format!("a call without `{OPEN}`"))
    };
    into_parse(attempted, found)
}

/// Reads calls in any common format: `<tool_call>` and other marks, code fences, bare JSON with
/// `name` and `arguments` (or `parameters`), and Python calls of an offered tool.
pub(crate) fn lenient(text: &str, tools: &[Tool]) -> Parse {
    let attempted = attempts(text, tools);
    let mut calls = json_calls(text);
    if calls.is_empty() {
        calls = python_calls(text, tools);
    }
    let found = match (attempted, calls.is_empty()) {
        (false, _) => Ok(Vec::new()),
        (true, true) => Err("a call that cannot be read".to_owned()),
        (true, false) => on_offer(calls, tools),
    };
    into_parse(attempted, found)
}

fn into_parse(attempted: bool, found: Result<Vec<Call>, String>) -> Parse {
    match found {
        Ok(calls) => Parse { attempted, calls, fault: String::new() },
        Err(fault) => Parse { attempted, calls: Vec::new(), fault },
    }
}

/// Whether the text tries to call something, well-formed or not: a mark, a JSON key `"name"` beside
/// a key for arguments or with an offered tool as its value, or a whole Python call.
fn attempts(text: &str, tools: &[Tool]) -> bool {
    text.contains(OPEN)
        || FOREIGN.iter().any(|mark| text.contains(mark))
        || names_a_call(text, tools)
        || !python_calls(text, tools).is_empty()
}

fn names_a_call(text: &str, tools: &[Tool]) -> bool {
    let has_arguments = ["arguments", "parameters"].iter().any(|key| {
        let key = [format!("\"{key}\""), format!("'{key}'")];
        key.iter().any(|key| text.contains(key.as_str()))
    });
    ["\"name\"", "'name'"].iter().any(|key| {
        text.match_indices(key).any(|(at, _)| {
            let mut cursor = Cursor::new(text, at + key.len());
            if !cursor.take(':') {
                return false;
            }
            let value = cursor.value();
            has_arguments || tools.iter().any(|t| value.as_ref().is_some_and(|v| v == t.name()))
        })
    })
}

fn strict_calls(text: &str) -> Result<Vec<Call>, String> {
    let mut calls = Vec::new();
    let mut blocks = text.split(OPEN).skip(1).peekable();
    while let Some(block) = blocks.next() {
        let (body, after) = block
            .split_once(CLOSE)
            .ok_or_else(|| format!("`{OPEN}` is not closed by `{CLOSE}`"))?;
        if !after.trim().is_empty() {
            let place = if blocks.peek().is_some() { "between calls" } else { "after the call" };
            return Err(format!("text {place}: `{}`", excerpt(after.trim())));
        }
        calls.push(strict_call(body)?);
    }
    Ok(calls)
}

fn strict_call(body: &str) -> Result<Call, String> {
    let value: Value = serde_json::from_str(body.trim())
        .map_err(|e| format!("the call is not JSON: {e}: `{}`", excerpt(body.trim())))?;
    let name = value.get("name").and_then(Value::as_str);
    let name = name.ok_or("the call has no string `name`")?;
    let arguments = value.get("arguments").and_then(Value::as_object);
    let arguments = arguments.ok_or("the call has no object `arguments`")?;
    Ok(call(name, arguments.clone()))
}

fn on_offer(calls: Vec<Call>, tools: &[Tool]) -> Result<Vec<Call>, String> {
    let stranger = calls.iter().filter_map(|c| c.get("name")?.as_str());
    let stranger = stranger.into_iter().find(|name| !tools.iter().any(|t| t.name() == *name));
    match stranger {
        Some(name) => Err(format!("calls `{}`, which is not on offer", excerpt(name))),
        None => Ok(calls),
    }
}

/// Every outermost JSON object that is a call.
fn json_calls(text: &str) -> Vec<Call> {
    let (mut calls, mut at) = (Vec::new(), 0);
    while let Some(found) = text[at..].find('{') {
        let mut cursor = Cursor::new(text, at + found);
        let read = cursor.value().and_then(|value| as_call(&value));
        at = match read {
            Some(call) => {
                calls.push(call);
                cursor.at()
            }
            None => at + found + 1,
        };
    }
    calls
}

/// `{"name", "arguments"}`, also inside OpenAI's `{"type": "function", "function": {…}}`, with
/// `parameters` for `arguments`, or with the arguments encoded as a string.
fn as_call(value: &Value) -> Option<Call> {
    let object = value.as_object()?;
    if let Some(inner @ Value::Object(_)) = object.get("function") {
        return as_call(inner);
    }
    let name = object.get("name")?.as_str()?;
    let arguments = object.get("arguments").or_else(|| object.get("parameters"))?;
    let arguments = match arguments {
        Value::Object(map) => map.clone(),
        Value::String(text) => match Cursor::new(text, 0).value()? {
            Value::Object(map) => map,
            _ => return None,
        },
        _ => return None,
    };
    Some(call(name, arguments))
}

/// Python calls of offered tools that begin a line, or follow `[` or `print(` there. Positional
/// arguments take the names of the tool's properties in their order.
fn python_calls(text: &str, tools: &[Tool]) -> Vec<Call> {
    let mut calls = Vec::new();
    let (mut at, mut read) = (0, 0);
    for line in text.split_inclusive('\n') {
        let start = at;
        at += line.len();
        // Calls that began above may end below this line, which is theirs then.
        if start < read {
            continue;
        }
        let begin = line.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, '`' | '['));
        let begin = begin.strip_prefix("print(").unwrap_or(begin);
        let mut cursor = Cursor::new(text, at - begin.len());
        while let Some(call) = python_call(&mut cursor, tools) {
            calls.push(call);
            read = cursor.at();
            if !cursor.take(',') {
                break;
            }
            cursor.skip_space();
        }
    }
    calls
}

fn python_call(cursor: &mut Cursor<'_>, tools: &[Tool]) -> Option<Call> {
    let name = cursor.name();
    let tool = tools.iter().find(|t| !name.is_empty() && t.name() == name)?;
    let mut properties = properties(tool).into_iter();
    cursor.take('(').then_some(())?;
    let mut arguments = Map::new();
    loop {
        if cursor.take(')') {
            return Some(call(name, arguments));
        }
        cursor.skip_space();
        let start = *cursor;
        let key = cursor.name();
        let key = if !key.is_empty() && cursor.take('=') {
            key.to_owned()
        } else {
            *cursor = start;
            properties.next()?
        };
        arguments.insert(key, cursor.value()?);
        if !cursor.take(',') {
            return cursor.take(')').then(|| call(name, arguments));
        }
    }
}

fn properties(tool: &Tool) -> Vec<String> {
    let properties = tool.function.get("parameters").and_then(|p| p.get("properties"));
    let names = properties.and_then(Value::as_object).map(|map| map.keys().cloned().collect());
    names.unwrap_or_default()
}

fn call(name: &str, arguments: Map<String, Value>) -> Call {
    let mut call = Map::new();
    call.insert("name".to_owned(), Value::String(name.to_owned()));
    call.insert("arguments".to_owned(), Value::Object(arguments));
    call
}

/// The first characters of a text on one line, for messages.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
#[path = "parse/tests.rs"]
mod tests;
