//! The other subcommands.

use std::fs;

use crate::space::{DIAMOND, Space};

#[test]
fn outputs_are_listed_and_copied_out_and_never_overwrite_silently() {
    let space = Space::new(DIAMOND);
    space.pipe(&["outputs", "join"]).code(2);
    space.pipe(&["run"]).code(0);
    let listed = space.pipe(&["outputs", "join"]).code(0);
    assert!(listed.out.starts_with("out  "), "{}", listed.out);
    space.pipe(&["outputs", "join", "--to", "kept"]).code(0);
    assert_eq!(fs::read_to_string(space.path("kept/join.txt")).unwrap(), "one\ntwo\n");
    space.write("kept/join.txt", "mine");
    space.pipe(&["outputs", "join", "--to", "kept"]).code(2);
    assert_eq!(fs::read_to_string(space.path("kept/join.txt")).unwrap(), "mine");
    space.pipe(&["outputs", "join", "--to", "kept", "--force"]).code(0);
    assert_eq!(fs::read_to_string(space.path("kept/join.txt")).unwrap(), "one\ntwo\n");
    space.pipe(&["plan", "--check"]).code(0);
}

#[test]
fn graph_draws_every_stage_and_edge() {
    let space = Space::new(DIAMOND);
    let dot = space.pipe(&["graph", "--format", "dot"]).code(0).out;
    assert!(dot.contains("\"join\" -> \"last\" [label=\"out\"]"), "{dot}");
    let mermaid = space.pipe(&["graph", "--format", "mermaid"]).code(0).out;
    assert!(mermaid.starts_with("flowchart LR") && mermaid.contains("-->|out|"), "{mermaid}");
}

#[test]
fn why_explains_with_old_and_new_value() {
    let space = Space::new(DIAMOND);
    assert!(space.pipe(&["why", "left"]).code(0).out.contains("never ran before"));
    space.pipe(&["run"]).code(0);
    assert!(space.pipe(&["why", "left"]).code(0).out.contains("would not run"));
    let changed = space.pipe(&["why", "left", "--set", "left=new"]).code(0).out;
    assert!(changed.contains("echo one > ") && changed.contains("echo new > "), "{changed}");
    let unknown = space.pipe(&["why", "lft"]).code(2);
    assert!(unknown.err.contains("did you mean `left`?"), "{}", unknown.err);
}

#[test]
fn plan_and_run_speak_json() {
    let space = Space::new(DIAMOND);
    let plan = space.pipe(&["plan", "--json"]).code(0).out;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["stages"][0]["decision"], "run");
    let events = space.pipe(&["run", "--json"]).code(0).out;
    let events: Vec<serde_json::Value> =
        events.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(events[0]["event"], "run-started");
    assert_eq!(events[events.len() - 1]["ran"], 4);
}

#[test]
fn targets_select_stages() {
    let space =
        Space::new(&format!("targets: {{default: [left], both: [left, right]}}\n{DIAMOND}"));
    space.pipe(&["run"]).code(0);
    assert_eq!(space.all_runs(), [1, 0, 0, 0]);
    space.pipe(&["run", "both"]).code(0);
    assert_eq!(space.all_runs(), [1, 1, 0, 0]);
    let unknown = space.pipe(&["run", "bth"]).code(3);
    assert!(unknown.err.contains("did you mean `both`?"), "{}", unknown.err);
}

#[test]
fn init_writes_a_starter_and_does_not_overwrite_it() {
    let space = Space::new(DIAMOND);
    space.pipe(&["init"]).code(2);
    space.pipe(&["init", "new"]).code(0);
    let text = fs::read_to_string(space.path("new/pipeline.yaml")).unwrap();
    assert!(text.contains("kind: train") && !text.contains("pipelines/"), "{text}");
    assert_eq!(fs::read_to_string(space.path("new/.gitignore")).unwrap(), "/cache/\n");
}

#[test]
fn init_takes_rows_of_the_user_s_own() {
    let space = Space::new(DIAMOND);
    let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n";
    space.write("mine/rows.jsonl", &row.repeat(20));
    space.pipe(&["init", "mine", "--from", "mine/rows.jsonl"]).code(0);
    let text = fs::read_to_string(space.path("mine/pipeline.yaml")).unwrap();
    assert!(text.contains("path: \"rows.jsonl\"") && text.contains("test: [16, 20]"), "{text}");
    space.write("mine/rows.jsonl", &format!("{row}{{\"messages\": 1}}\n"));
    let bad = space.pipe(&["init", "mine", "--force", "--from", "mine/rows.jsonl"]).code(2);
    assert!(bad.err.contains("rows.jsonl:2"), "{}", bad.err);
}
