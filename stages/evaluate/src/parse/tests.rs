//! What the two parsers make of texts, and what is said of it where an answer is known.
#![allow(clippy::unwrap_used, reason = "tests")]

use data::{Expected, ExpectedCall};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::score::judge;

/// What a parser should make of a text.
#[derive(Clone, Debug)]
enum Want {
    /// No attempt at a call.
    Nothing,
    /// These calls.
    Calls(Vec<Value>),
    /// An attempt that cannot be read; part of what is said.
    Fault(&'static str),
}

use Want::{Calls, Fault, Nothing};

fn tools() -> Vec<Tool> {
    let tool = |name: &str, properties: Value| {
        let function = json!({"name": name, "parameters": {"properties": properties}});
        Tool::new(function.as_object().unwrap().clone())
    };
    vec![
        tool("weather", json!({"city": {}, "days": {}, "unit": {}})),
        tool("math.eval", json!({"expression": {}})),
    ]
}

fn weather(arguments: Value) -> Value {
    json!({"name": "weather", "arguments": arguments})
}

fn oslo() -> Want {
    Calls(vec![weather(json!({"city": "Oslo"}))])
}

fn oslo_and_rome() -> Want {
    Calls(vec![weather(json!({"city": "Oslo"})), weather(json!({"city": "Rome"}))])
}

/// Calls in the trained format, one after the other.
fn trained(calls: &[&str]) -> String {
    let blocks = calls.iter().map(|call| format!("{OPEN}\n{call}\n{CLOSE}"));
    blocks.collect::<Vec<_>>().join("\n")
}

const OSLO: &str = r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#;
const ROME: &str = r#"{"name": "weather", "arguments": {"city": "Rome"}}"#;
const BARE: Want = Fault("a call without `<tool_call>`");
const UNREAD: Want = Fault("a call that cannot be read");
const NOT_JSON: Want = Fault("the call is not JSON");

fn check(parser: fn(&str, &[Tool]) -> Parse, text: &str, want: &Want) {
    let found = parser(text, &tools());
    let calls: Vec<Value> = found.calls.iter().cloned().map(Value::Object).collect();
    let (attempted, expected, fault) = match want {
        Nothing => (false, Vec::new(), ""),
        Calls(calls) => (true, calls.clone(), ""),
        Fault(fault) => (true, Vec::new(), *fault),
    };
    assert_eq!(found.attempted, attempted, "{text}: {found:?}");
    assert_eq!(calls, expected, "{text}: {found:?}");
    let is_said =
        if fault.is_empty() { found.fault.is_empty() } else { found.fault.contains(fault) };
    assert!(is_said, "{text}: {found:?}");
}

fn check_all(cases: &[(String, Want, Want)]) {
    for (text, by_strict, by_lenient) in cases {
        check(strict, text, by_strict);
        check(lenient, text, by_lenient);
    }
}

#[test]
fn the_trained_format_is_read_by_both() {
    let rich = json!({"city": "Tromsø 日本 😀", "days": [1, 2.5, {"from": -1, "to": null}],
        "unit": {"scale": {"name": "C", "exact": true}}});
    let alike = [
        (trained(&[OSLO]), oslo()),
        (format!("I will look it up.\n{}", trained(&[OSLO])), oslo()),
        (trained(&[OSLO, ROME]), oslo_and_rome()),
        (format!("{OPEN}{OSLO}{CLOSE}"), oslo()),
        (format!(" {OPEN} \t{OSLO}  {CLOSE} \n\n"), oslo()),
        (trained(&[&weather(rich.clone()).to_string()]), Calls(vec![weather(rich)])),
        (
            trained(&[r#"{"name": "weather", "arguments": {"city": "Troms\u00f8 \ud83d\ude00"}}"#]),
            Calls(vec![weather(json!({"city": "Tromsø 😀"}))]),
        ),
        (trained(&[r#"{"name": "weather", "arguments": {}}"#]), Calls(vec![weather(json!({}))])),
    ];
    let cases = alike.map(|(text, want)| (text, want.clone(), want));
    check_all(&cases);
}

#[test]
fn whole_numbers_and_fractions_stay_what_they_are() {
    let call = |days: &str| {
        trained(&[&format!(r#"{{"name": "weather", "arguments": {{"days": {days}}}}}"#)])
    };
    for (text, value) in [("1", json!(1)), ("1.0", json!(1.0)), ("-2e3", json!(-2000.0))] {
        let want = Calls(vec![weather(json!({"days": value}))]);
        check_all(&[(call(text), want.clone(), want)]);
    }
    assert_ne!(json!(1), json!(1.0), "the two would be told apart");
}

#[test]
fn text_around_calls_is_free_before_the_first_only() {
    let both = trained(&[OSLO]) + " and\n" + &trained(&[ROME]);
    check_all(&[
        (trained(&[OSLO]) + "\nDone.", Fault("text after the call: `Done.`"), oslo()),
        (both, Fault("text between calls: `and`"), oslo_and_rome()),
        (format!("{OPEN}\n{OSLO}\n{ROME}\n{CLOSE}"), NOT_JSON, oslo_and_rome()),
    ]);
}

#[test]
fn a_missing_end_mark_is_a_fault_of_the_format_alone() {
    let open = Fault("`<tool_call>` is not closed by `</tool_call>`");
    check_all(&[
        (format!("{OPEN}\n{OSLO}"), open.clone(), oslo()),
        (format!("{OPEN}\n{OSLO}\n{OPEN}\n{ROME}\n{CLOSE}"), open.clone(), oslo_and_rome()),
        (format!("{OPEN}\n{{\"name\": \"weather\", \"argum"), open.clone(), UNREAD),
        (OPEN.to_owned(), open, UNREAD),
        (CLOSE.to_owned(), Nothing, Nothing),
    ]);
}

#[test]
fn malformed_calls_are_attempts_that_nobody_completes() {
    let no_name = Fault("the call has no string `name`");
    let no_arguments = Fault("the call has no object `arguments`");
    let inside = |json: &str, by_strict: &Want| (trained(&[json]), by_strict.clone(), UNREAD);
    check_all(&[
        inside(r#"{"name": "weather", "arguments": {"city": "Oslo"}"#, &NOT_JSON),
        inside(r#"{"name": "weather", "arguments": {"city": Oslo}}"#, &NOT_JSON),
        inside("", &NOT_JSON),
        inside("the weather in Oslo", &NOT_JSON),
        inside(r#"{"arguments": {"city": "Oslo"}}"#, &no_name),
        inside(r#"{"name": 7, "arguments": {}}"#, &no_name),
        inside(r#"{"name": "weather"}"#, &no_arguments),
        inside(r#"{"name": "weather", "arguments": ["Oslo"]}"#, &no_arguments),
        (r#"{"name": "weather"}"#.to_owned(), BARE, UNREAD),
        (r#"{"name": "weather", "arguments": {"city": "Os"#.to_owned(), BARE, UNREAD),
    ]);
}

#[test]
fn other_formats_of_json_are_read_leniently_only() {
    let encoded = r#"{"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}"#;
    let aquila = r#"<functioncall> {"name": "weather", "arguments": '{"city": "L'Aquila"}'}"#;
    let python =
        "{'name': 'weather', 'arguments': {'city': 'Oslo', 'days': (1, None), 'unit': True,}}";
    let read = weather(json!({"city": "Oslo", "days": [1, null], "unit": true}));
    check_all(&[
        (OSLO.to_owned(), BARE, oslo()),
        (format!("Sure:\n```json\n{OSLO}\n```\nThat is it."), BARE, oslo()),
        (format!("```\n{OSLO}\n{ROME}\n```"), BARE, oslo_and_rome()),
        (format!("[{OSLO}, {ROME}]"), BARE, oslo_and_rome()),
        (format!("[TOOL_CALLS] [{OSLO}]"), BARE, oslo()),
        (format!("<|python_tag|>{OSLO}"), BARE, oslo()),
        (format!(r#"{{"tool_calls": [{OSLO}, {ROME}]}}"#), BARE, oslo_and_rome()),
        (format!(r#"{{"type": "function", "function": {OSLO}}}"#), BARE, oslo()),
        (r#"{"name": "weather", "parameters": {"city": "Oslo"}}"#.to_owned(), BARE, oslo()),
        (encoded.to_owned(), BARE, oslo()),
        (trained(&[encoded]), Fault("no object `arguments`"), oslo()),
        (aquila.to_owned(), BARE, Calls(vec![weather(json!({"city": "L'Aquila"}))])),
        (trained(&[python]), NOT_JSON, Calls(vec![read])),
    ]);
}

#[test]
fn python_calls_of_offered_tools_are_read_leniently_only() {
    let eval = json!({"name": "math.eval", "arguments": {"expression": "1+1"}});
    let lists = weather(json!({"city": ["a", {"b": [1, 2]}], "days": 1.0}));
    let read = |text: &str, calls: Want| (text.to_owned(), BARE, calls);
    check_all(&[
        read("weather(city=\"Oslo\")", oslo()),
        read("weather('Oslo')", oslo()),
        read("I call:\n  weather('Oslo')\n", oslo()),
        read("print(weather(\"Oslo\"))", oslo()),
        read("```python\nweather(city='Oslo')\n```", oslo()),
        read("`weather('Oslo')`", oslo()),
        read("math.eval(\"1+1\")", Calls(vec![eval])),
        read("weather(city=['a', {'b': (1, 2)}], days=1.0)", Calls(vec![lists])),
        read("[weather(city='Oslo'), weather(city='Rome')]", oslo_and_rome()),
        read("weather('Oslo')\nweather('Rome')", oslo_and_rome()),
        (trained(&["weather('Oslo')"]), NOT_JSON, oslo()),
    ]);
}

#[test]
fn a_list_of_python_calls_over_lines_counts_each_once() {
    let read = |text: &str| check(lenient, text, &oslo_and_rome());
    read("[weather(city='Oslo'),\n weather(city='Rome')]");
    read("[\n  weather(city='Oslo'),\n  weather(city='Rome'),\n]");
    let quoted = weather(json!({"city": "Oslo\nweather('Rome')"}));
    check(lenient, "weather(city=\"Oslo\nweather('Rome')\")", &Calls(vec![quoted]));
}

#[test]
fn answers_in_words_attempt_nothing() {
    for text in [
        "",
        " \n",
        "The weather in Oslo is fine.",
        "I could call weather('Oslo') for you.",
        "other_tool(city='Oslo')",
        "weather(in Oslo)",
        "weather",
        r#"{"city": "Oslo", "days": 1}"#,
        r#"{"name": "Ada", "age": 36}"#,
        "```json\n{\"result\": [1, 2]}\n```",
        "猫が好きです 🐈",
    ] {
        check_all(&[(text.to_owned(), Nothing, Nothing)]);
    }
}

#[test]
fn a_tool_that_is_not_on_offer_is_a_fault_of_both() {
    let strange = r#"{"name": "delete_all", "arguments": {}}"#;
    let fault = Fault("calls `delete_all`, which is not on offer");
    check_all(&[
        (trained(&[strange]), fault.clone(), fault.clone()),
        (trained(&[OSLO, strange]), fault.clone(), fault.clone()),
        (strange.to_owned(), BARE, fault),
    ]);
    let untooled = strict(&trained(&[OSLO]), &[]);
    assert_eq!(untooled.fault, "calls `weather`, which is not on offer");
}

/// Faults of the strict and the lenient reading against one right answer.
fn faults(text: &str, calls: &[ExpectedCall]) -> [String; 2] {
    let expected = Expected { calls: calls.to_vec(), text: String::new() };
    [strict, lenient].map(|parser| {
        let mut parse = parser(text, &tools());
        let is_right = judge(&mut parse, &expected);
        assert_eq!(is_right, parse.fault.is_empty(), "{text}");
        parse.fault
    })
}

#[test]
fn one_right_call_judges_names_and_arguments() {
    let accepted = json!({"city": ["Oslo"], "days": [1], "unit": ["C", ""]});
    let right =
        [ExpectedCall { name: "weather".into(), arguments: accepted.as_object().unwrap().clone() }];
    let with = |arguments: Value| trained(&[&weather(arguments).to_string()]);
    let eval = json!({"name": "math.eval", "arguments": {"expression": "1"}}).to_string();
    for (text, fault) in [
        (with(json!({"city": "Oslo", "days": 1, "unit": "C"})), ""),
        (with(json!({"days": 1.0, "city": "oslo"})), ""),
        (with(json!({"city": "Rome", "days": 1})), "argument `city` is `\"Rome\"`"),
        (with(json!({"city": "Oslo", "days": "1"})), "argument `days` is `\"1\"`"),
        (with(json!({"city": "Oslo", "days": 1, "unit": "F"})), "argument `unit` is `\"F\"`"),
        (with(json!({"city": "Oslo"})), "argument `days` is missing"),
        (with(json!({"city": "Oslo", "days": 1, "hours": 2})), "unexpected argument `hours`"),
        (trained(&[&eval]), "calls `math.eval` instead of `weather`"),
        (trained(&[OSLO, OSLO]), "2 calls where 1 are right"),
        ("It is fine.".to_owned(), "no call where one is right"),
    ] {
        for found in faults(&text, &right) {
            let is_said = if fault.is_empty() { found.is_empty() } else { found.contains(fault) };
            assert!(is_said, "{text}: {found}");
        }
    }
    let [by_strict, by_lenient] = faults("weather(city='Oslo', days=1)", &right);
    assert_eq!((by_strict.as_str(), by_lenient.as_str()), ("a call without `<tool_call>`", ""));
}

#[test]
fn where_no_call_is_right_every_attempt_is_wrong() {
    assert_eq!(faults("It is fine.", &[]), ["", ""]);
    assert_eq!(faults("", &[]), ["", ""]);
    let called = "calls where no call is right";
    assert_eq!(faults(&trained(&[OSLO]), &[]), [called, called]);
    let [by_strict, by_lenient] = faults(OSLO, &[]);
    assert_eq!(by_strict, "a call without `<tool_call>`, and no call is right");
    assert_eq!(by_lenient, called);
    let [_, unread] = faults(&format!("{OPEN}{{"), &[]);
    assert_eq!(unread, "a call that cannot be read, and no call is right");
}

#[test]
fn excerpts_are_one_short_line() {
    assert_eq!(excerpt("a\nb\tc"), "a b c");
    assert_eq!(excerpt(&"é".repeat(60)), "é".repeat(60));
    assert_eq!(excerpt(&"é".repeat(61)), "é".repeat(60) + "…");
}

proptest! {
    #[test]
    fn no_text_makes_a_parser_panic(
        parts in proptest::collection::vec(
            prop_oneof![
                Just("<tool_call>"), Just("</tool_call>"), Just("<functioncall>"), Just("{"),
                Just("}"), Just("\"name\""), Just("\"weather\""), Just("\"arguments\""), Just(":"),
                Just(","), Just("'"), Just("\\u00"), Just("weather("), Just(")"), Just("["),
                Just("\n"), Just("é😀"), Just("1."), Just("print("), Just("function"),
            ],
            0..24,
        ),
    ) {
        let text = parts.concat();
        let (by_strict, by_lenient) = (strict(&text, &tools()), lenient(&text, &tools()));
        prop_assert_eq!(by_strict.attempted, by_lenient.attempted);
        for parse in [by_strict, by_lenient] {
            let is_read = parse.fault.is_empty() == (!parse.calls.is_empty() || !parse.attempted);
            prop_assert!(is_read, "{}: {:?}", text, parse);
        }
    }
}
