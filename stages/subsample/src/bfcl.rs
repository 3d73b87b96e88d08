//! The Berkeley function-calling rows: one JSON object a line, answers in a file of their own.

use std::collections::BTreeMap;

use data::{Message, Role, Row, Tool, ToolCall};
use serde::Deserialize;
use serde_json::{Map, Value};

/// One row of the source; fields that do not matter here are ignored.
#[derive(Deserialize)]
struct Raw {
    id: String,
    question: Vec<Vec<RawMessage>>,
    function: Vec<Map<String, Value>>,
}

#[derive(Deserialize)]
struct RawMessage {
    role: Role,
    content: String,
}

/// The accepted calls of one row.
#[derive(Deserialize)]
pub(crate) struct Answer {
    pub(crate) id: String,
    ground_truth: Vec<BTreeMap<String, Map<String, Value>>>,
}

/// A row whose right answer is the first listed value of every argument, arguments that may be
/// omitted left out; without an answer, the right reply is `no_call`.
pub(crate) fn parse(
    value: Value,
    index: u64,
    answer: Option<&Answer>,
    no_call: &str,
) -> Result<Row, String> {
    let raw: Raw = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let [turn] = raw.question.as_slice() else {
        return Err(format!("{} turns where one is expected", raw.question.len()));
    };
    if turn.last().is_none_or(|m| m.role != Role::User) {
        return Err("the question does not end with a user message".to_owned());
    }
    let mut messages: Vec<Message> =
        turn.iter().map(|m| Message::text(m.role, m.content.clone())).collect();
    let mut reply = Message::text(Role::Assistant, "");
    match answer {
        None => no_call.clone_into(&mut reply.content),
        Some(answer) => {
            for call in &answer.ground_truth {
                let [(name, accepted)] = call.iter().collect::<Vec<_>>()[..] else {
                    return Err("an answer that does not name exactly one function".to_owned());
                };
                reply.tool_calls.push(ToolCall::new(name.clone(), first_values(accepted)?));
                reply.accepted.push(accepted.clone());
            }
        }
    }
    messages.push(reply);
    let tools = raw.function.into_iter().map(Tool::new).collect();
    Ok(Row { id: raw.id, index, tools, messages })
}

fn first_values(accepted: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    let mut arguments = Map::new();
    for (name, values) in accepted {
        let Some(values) = values.as_array() else {
            return Err(format!("the accepted values of `{name}` are no list"));
        };
        if values.iter().any(|v| v == "") {
            continue;
        }
        let first = values.first().ok_or_else(|| format!("no accepted value of `{name}`"))?;
        arguments.insert(name.clone(), first.clone());
    }
    Ok(arguments)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn gold_is_the_first_value_without_what_may_be_omitted() {
        let row = json!({"id": "x_0", "question": [[{"role": "user", "content": "q"}]],
            "function": [{"name": "f", "parameters": {}}]});
        let answer: Answer = serde_json::from_value(
            json!({"id": "x_0", "ground_truth": [{"f": {"a": [4, 5], "unit": ["m", ""]}}]}),
        )
        .unwrap();
        let parsed = parse(row.clone(), 3, Some(&answer), "no").unwrap();
        let reply = &parsed.messages[1];
        assert_eq!(Value::Object(reply.tool_calls[0].function.arguments.clone()), json!({"a": 4}));
        assert_eq!(reply.accepted[0]["unit"], json!(["m", ""]));
        assert_eq!(parse(row, 3, None, "no").unwrap().messages[1].content, "no");
    }
}
