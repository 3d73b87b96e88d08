//! Compares calls with the right answer, as the Berkeley Function-Calling Leaderboard does.
//!
//! Rules (BFCL v4, `ast_checker.py`): the same number of calls, in any order; equal names; no
//! unexpected argument; an argument is missing only where the accepted values hold `""`; strings
//! equal after dropping ``[ ,./-_*^]`` and case; lists equal item by item; objects key by key. Two
//! deviations: numbers compare by value (10 is 10.0), and kinds are taken from the accepted values
//! rather than from the tool's schema, so that a number is never equal to its text or to a boolean.

use data::{Expected, ExpectedCall, Parse};
use serde_json::{Map, Value};

use crate::parse::excerpt;

/// Whether the parse is a right call, or rightly no call; says in `parse.fault` why not.
pub(crate) fn judge(parse: &mut Parse, expected: &Expected) -> bool {
    if parse.fault.is_empty() {
        parse.fault = fault(parse, expected).unwrap_or_default();
    } else if expected.calls.is_empty() {
        parse.fault = format!("{}, and no call is right", parse.fault);
    }
    parse.fault.is_empty()
}

fn fault(parse: &Parse, expected: &Expected) -> Option<String> {
    match (parse.attempted, expected.calls.is_empty()) {
        (false, true) => None,
        (true, true) => Some("calls where no call is right".to_owned()),
        (false, false) => Some("no call where one is right".to_owned()),
        (true, false) => calls_fault(&parse.calls, &expected.calls),
    }
}

fn calls_fault(calls: &[Map<String, Value>], expected: &[ExpectedCall]) -> Option<String> {
    if calls.len() != expected.len() {
        return Some(format!("{} calls where {} are right", calls.len(), expected.len()));
    }
    if let ([call], [expected]) = (calls, expected) {
        return call_fault(call, expected);
    }
    // Kuhn's augmenting paths: which call answers which expected one.
    let mut taken_by = vec![None; expected.len()];
    for index in 0..calls.len() {
        let mut visited = vec![false; expected.len()];
        if !assign(index, calls, expected, &mut taken_by, &mut visited) {
            return Some(format!(
                "call {} of {} is not among the right ones",
                index + 1,
                calls.len()
            ));
        }
    }
    None
}

fn assign(
    index: usize,
    calls: &[Map<String, Value>],
    expected: &[ExpectedCall],
    taken_by: &mut [Option<usize>],
    visited: &mut [bool],
) -> bool {
    for slot in 0..expected.len() {
        if visited[slot] || call_fault(&calls[index], &expected[slot]).is_some() {
            continue;
        }
        visited[slot] = true;
        let free = taken_by[slot].is_none_or(|o| assign(o, calls, expected, taken_by, visited));
        if free {
            taken_by[slot] = Some(index);
            return true;
        }
    }
    false
}

fn call_fault(call: &Map<String, Value>, expected: &ExpectedCall) -> Option<String> {
    let name = call.get("name").and_then(Value::as_str).unwrap_or_default();
    if name != expected.name {
        return Some(format!("calls `{}` instead of `{}`", excerpt(name), expected.name));
    }
    let empty = Map::new();
    let given = call.get("arguments").and_then(Value::as_object).unwrap_or(&empty);
    if let Some(key) = given.keys().find(|key| !expected.arguments.contains_key(*key)) {
        return Some(format!("unexpected argument `{}`", excerpt(key)));
    }
    expected.arguments.iter().find_map(|(key, accepted)| match given.get(key) {
        Some(value) if alternatives(accepted).iter().any(|a| is_equal(value, a)) => None,
        Some(value) => {
            let value = excerpt(&value.to_string());
            let accepted = excerpt(&accepted.to_string());
            Some(format!("argument `{key}` is `{value}`, accepted are `{accepted}`"))
        }
        None if may_be_missing(accepted) => None,
        None => Some(format!("argument `{key}` is missing")),
    })
}

fn alternatives(accepted: &Value) -> &[Value] {
    match accepted {
        Value::Array(values) => values,
        one => std::slice::from_ref(one),
    }
}

fn may_be_missing(accepted: &Value) -> bool {
    alternatives(accepted).iter().any(|a| a.as_str() == Some(""))
}

fn is_equal(given: &Value, accepted: &Value) -> bool {
    match (given, accepted) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::String(a), Value::String(b)) => normalised(a) == normalised(b),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_equal(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.keys().all(|key| b.contains_key(key))
                && b.iter().all(|(key, accepted)| match a.get(key) {
                    Some(value) => is_field_equal(value, accepted),
                    None => accepted.is_array() && may_be_missing(accepted),
                })
        }
        (a, b) => a == b,
    }
}

/// Berkeley's answers list alternatives inside objects too; other sources hold plain values.
fn is_field_equal(given: &Value, accepted: &Value) -> bool {
    is_equal(given, accepted)
        || accepted.as_array().is_some_and(|all| all.iter().any(|a| is_equal(given, a)))
}

fn normalised(text: &str) -> String {
    let dropped = |c: &char| !matches!(c, ' ' | ',' | '.' | '/' | '-' | '_' | '*' | '^');
    text.to_lowercase().chars().filter(dropped).map(|c| if c == '\'' { '"' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn expected(calls: &[(&str, Value)]) -> Expected {
        let call = |(name, arguments): &(&str, Value)| ExpectedCall {
            name: (*name).to_owned(),
            arguments: arguments.as_object().unwrap().clone(),
        };
        Expected { calls: calls.iter().map(call).collect(), text: String::new() }
    }

    fn fault_of(calls: &[Value], expected: &Expected) -> String {
        let calls: Vec<_> = calls.iter().map(|c| c.as_object().unwrap().clone()).collect();
        let mut parse = Parse { attempted: !calls.is_empty(), calls, fault: String::new() };
        let correct = judge(&mut parse, expected);
        assert_eq!(correct, parse.fault.is_empty());
        parse.fault
    }

    fn one(arguments: &Value, accepted: Value) -> String {
        fault_of(&[json!({"name": "f", "arguments": arguments})], &expected(&[("f", accepted)]))
    }

    #[test]
    fn values_that_berkeley_accepts_are_right() {
        let cases = [
            (json!({"a": 10}), json!({"a": [10.0]})),
            (json!({"a": 10.0}), json!({"a": [10]})),
            (json!({"a": "New York, NY"}), json!({"a": ["new york ny", "NYC"]})),
            (json!({"a": "it's"}), json!({"a": ["it\"s"]})),
            (json!({}), json!({"a": ["meter", ""]})),
            (json!({"a": ["X y", 2]}), json!({"a": [["xy", 2], [1]]})),
            (json!({"a": {"k": 1}}), json!({"a": [{"k": [1, 2], "m": [""]}]})),
            (json!({"a": {"k": [1, 2]}}), json!({"a": [{"k": [1, 2]}]})),
            (json!({"a": null}), json!({"a": [null]})),
        ];
        for (arguments, accepted) in cases {
            assert_eq!(one(&arguments, accepted.clone()), "", "{arguments} {accepted}");
        }
    }

    #[test]
    fn values_that_berkeley_refuses_are_wrong() {
        let cases = [
            (json!({"a": "10"}), json!({"a": [10]})),
            (json!({"a": true}), json!({"a": [1]})),
            (json!({"a": 1}), json!({"a": [true]})),
            (json!({"a": [1, 2]}), json!({"a": [[2, 1]]})),
            (json!({"a": [1]}), json!({"a": [[1, 2]]})),
            (json!({"a": {"k": 1, "z": 1}}), json!({"a": [{"k": [1]}]})),
            (json!({"a": {}}), json!({"a": [{"k": [1]}]})),
            (json!({}), json!({"a": [1]})),
            (json!({"a": 1, "b": 1}), json!({"a": [1]})),
        ];
        for (arguments, accepted) in cases {
            assert_ne!(one(&arguments, accepted.clone()), "", "{arguments} {accepted}");
        }
    }

    #[test]
    fn the_fault_says_what_is_wrong() {
        assert_eq!(
            one(&json!({"a": 3}), json!({"a": [1, 2]})),
            "argument `a` is `3`, accepted are `[1,2]`"
        );
        assert_eq!(one(&json!({}), json!({"a": [1]})), "argument `a` is missing");
        assert_eq!(one(&json!({"b": 1}), json!({})), "unexpected argument `b`");
        let other =
            fault_of(&[json!({"name": "g", "arguments": {}})], &expected(&[("f", json!({}))]));
        assert_eq!(other, "calls `g` instead of `f`");
        assert_eq!(fault_of(&[], &expected(&[("f", json!({}))])), "no call where one is right");
        let called = fault_of(&[json!({"name": "f", "arguments": {}})], &expected(&[]));
        assert_eq!(called, "calls where no call is right");
    }

    #[test]
    fn parallel_calls_match_in_any_order_and_each_once() {
        let want = expected(&[("f", json!({"a": [1, 2]})), ("f", json!({"a": [1]}))]);
        let call = |a: i32| json!({"name": "f", "arguments": {"a": a}});
        assert_eq!(fault_of(&[call(1), call(2)], &want), "");
        assert_eq!(fault_of(&[call(2), call(1)], &want), "");
        assert_eq!(fault_of(&[call(1), call(1)], &want), "");
        assert_eq!(fault_of(&[call(2), call(2)], &want), "call 2 of 2 is not among the right ones");
        assert_eq!(fault_of(&[call(1)], &want), "1 calls where 2 are right");
    }
}
