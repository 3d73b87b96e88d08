#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;

use data::{Role, read_jsonl};

use super::*;

fn request(dir: &Path, input: &Path, params: &Value) -> Request {
    fixtures::request(&Subsample, params, &[("data", input)], dir)
}

fn chats(dir: &Path, count: usize) -> std::path::PathBuf {
    let line = |i: usize| {
        json!({"messages": [{"role": "user", "content": format!("q{i}")},
            {"role": "assistant", "content": format!("a{i}")}]})
        .to_string()
    };
    let path = dir.join("rows.jsonl");
    let mut lines: Vec<String> = (0..count).map(line).collect();
    lines[3] = "{broken".into();
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn splits_follow_the_order_of_datasets_and_malformed_rows_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let input = chats(dir.path(), 10);
    let params = json!({"format": "chat-jsonl", "train": [0, 6], "test": [6, 8], "dev": [8, 10]});
    let request = request(dir.path(), &input, &params);
    let outcome = Subsample.run(&request, &mut Reporter::silent()).unwrap();
    // permutation(10) with seed 42 is 5 6 0 7 3 2 | 4 9 | 1 8; row 3 is malformed.
    let ids = |name: &str| -> Vec<String> {
        let rows: Vec<Row> = read_jsonl(&request.outputs[name]).unwrap();
        rows.into_iter().map(|r| r.id).collect()
    };
    assert_eq!(ids("train"), ["5", "6", "0", "7", "2"]);
    assert_eq!(
        (ids("test"), ids("dev")),
        (vec!["4".into(), "9".into()], vec!["1".into(), "8".into()])
    );
    let stats: Value =
        serde_json::from_slice(&fs::read(&request.outputs["stats"]).unwrap()).unwrap();
    assert_eq!(stats["dropped_rows"][0]["row"], json!(3));
    assert!(
        stats["dropped_rows"][0]["reason"].as_str().unwrap().starts_with("rows.jsonl:4: column")
    );
    assert_eq!(outcome.warnings.len(), 1);
}

#[test]
fn overlap_and_empty_ranges_are_param_errors() {
    let overlap = json!({"format": "glaive", "train": [0, 10], "test": [9, 12]});
    assert_eq!(Subsample.resolve(&overlap).unwrap_err().path, ["test"]);
    let empty = json!({"format": "glaive", "train": [5, 5], "test": [9, 12]});
    assert_eq!(Subsample.resolve(&empty).unwrap_err().path, ["train"]);
}

#[test]
fn range_beyond_the_rows_and_an_empty_dataset_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let input = chats(dir.path(), 10);
    let params = json!({"format": "chat-jsonl", "train": [0, 6], "test": [6, 11]});
    let error = Subsample.run(&request(dir.path(), &input, &params), &mut Reporter::silent());
    assert!(error.unwrap_err().message.contains("there are 10"));
    fs::write(&input, "").unwrap();
    let error = Subsample.run(&request(dir.path(), &input, &params), &mut Reporter::silent());
    assert!(error.unwrap_err().message.contains("no rows"));
}

/// The real rows of the sample; `PIPE_DATA` names their folder.
#[test]
fn glaive_sample_parses_to_its_sharegpt_twin() {
    let Some(data) = std::env::var_os("PIPE_DATA") else {
        fixtures::skipped("PIPE_DATA is not set");
        return;
    };
    let data = std::path::PathBuf::from(data);
    let load = |name: &str| -> Vec<Value> {
        serde_json::from_slice(&fs::read(data.join(name)).unwrap()).unwrap()
    };
    let (raw, twin) = (load("glaive-sample-300.json"), load("glaive-sample-300.sharegpt.json"));
    assert_eq!(raw.len(), 300);
    for (i, (raw, twin)) in raw.into_iter().zip(twin).enumerate() {
        let row = glaive::parse(raw, i as u64).unwrap();
        let turns = twin["conversations"].as_array().unwrap();
        assert_eq!(row.messages.len(), turns.len(), "row {i}");
        for (message, turn) in row.messages.iter().zip(turns) {
            let value = turn["value"].as_str().unwrap();
            match (turn["from"].as_str().unwrap(), message.role) {
                ("function_call", Role::Assistant) => {
                    let expected: Value = serde_json::from_str(value).unwrap();
                    let calls: Vec<Value> = message
                        .tool_calls
                        .iter()
                        .map(
                            |c| json!({"name": c.function.name, "arguments": c.function.arguments}),
                        )
                        .collect();
                    let expected = if expected.is_array() { expected } else { json!([expected]) };
                    assert_eq!(Value::Array(calls), expected, "row {i}");
                }
                ("human", Role::User) | ("gpt", Role::Assistant) | ("observation", Role::Tool) => {
                    assert_eq!(message.content, value.trim(), "row {i}");
                }
                other => panic!("row {i}: {other:?}"),
            }
        }
        let tools: Value = match twin["tools"].as_str().unwrap_or_default() {
            "" => json!([]),
            text => serde_json::from_str(text).unwrap(),
        };
        let parsed: Vec<Value> =
            row.tools.iter().map(|t| Value::Object(t.function.clone())).collect();
        assert_eq!(Value::Array(parsed), tools, "row {i}");
    }
}
