//! `metrics`, `params`, `predictions` and `runs`: now, earlier runs, points and git revisions.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::space::{DIAMOND, Space};

/// An evaluation whose answers depend on `good`, over a local file.
const EVAL: &str = r#"
params: {good: 2}
stages:
  eval:
    kind: command
    inputs: {rows: {path: rows.txt}}
    matrix: {single: {good: [1, 3]}}
    params:
      run: |
        n=0
        while read -r id; do
          n=$((n+1)); right=false
          if [ "$n" -le ${good} ]; then right=true; fi
          printf '{"id": "%s", "user": "q %s", "strict_correct": %s, "output": "said %s"}\n' "$id" "$id" $right ${good}
        done < $PIPE_INPUT_ROWS > $PIPE_OUTPUT_PREDICTIONS
        printf '{"accuracy": {"value": 0.%s}, "rows": %s}' ${good} $n > $PIPE_OUTPUT_METRICS
      outputs: {metrics: {file: metrics.json}, predictions: {file: predictions.jsonl}}
"#;

fn evaluated() -> Space {
    let space = Space::new(EVAL);
    space.write("rows.txt", "a\nb\nc\n");
    space.pipe(&["run", "eval@*"]).code(0);
    space
}

fn read(space: &Space, args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.push("--json");
    serde_json::from_str(&space.pipe(&all).code(0).out).unwrap()
}

fn git(space: &Space, args: &[&str]) {
    let mut command = Command::new("git");
    command.args(["-c", "user.name=t", "-c", "user.email=t@example.org"]).args(args);
    command.current_dir(space.path("")).env("GIT_CONFIG_GLOBAL", "/dev/null");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn metrics_are_shown_and_compared_between_points() {
    let space = evaluated();
    let shown = space.pipe(&["metrics", "show", "eval@*", "--metric", "accuracy"]).code(0).out;
    let expected =
        "stage        accuracy.value\neval         0.2\neval@good=1  0.1\neval@good=3  0.3\n";
    assert_eq!(shown, expected);
    let one = space.pipe(&["metrics", "show", "last:eval"]).code(0).out;
    assert_eq!(one, "last:eval  accuracy.value  0.2\nlast:eval  rows            3\n");
    let all = read(&space, &["metrics", "show"]);
    assert_eq!(all[1]["point"], json!({"good": 1}));
    assert_eq!(all[1]["metrics"], json!({"accuracy.value": 0.1, "rows": 3.0}));
    let diff = read(&space, &["metrics", "diff", "eval@good=3"]);
    assert_eq!(diff["changes"][0]["metric"], "accuracy.value");
    assert_eq!(
        (&diff["changes"][0]["before"], &diff["changes"][0]["after"]),
        (&json!(0.2), &json!(0.3))
    );
    assert_eq!(diff["changes"].as_array().unwrap().len(), 1);
    let each = read(&space, &["metrics", "diff", "eval", "eval@*"]);
    assert_eq!(each["changes"][0]["stage"], "eval -> eval@good=1");
    assert_eq!(each["changes"].as_array().unwrap().len(), 2);
    let several = space.pipe(&["why", "eval@*"]).code(2);
    assert!(several.err.contains("`eval@*` is 3 stages"), "{}", several.err);
    let same = space.pipe(&["metrics", "diff", "eval", "eval@good=2.0"]).code(0);
    assert!(same.out.contains("no metric differs"), "{}", same.out);
}

#[test]
fn params_are_compared_between_points() {
    let space = evaluated();
    let diff = read(&space, &["params", "diff", "eval@good=1", "eval@good=3"]);
    let changes = diff["changes"].as_array().unwrap();
    assert!(
        changes.contains(&json!({"stage": "eval@good=1 -> eval@good=3", "param": "good", "before": 1, "after": 3})),
        "{diff}"
    );
    assert_eq!(changes.len(), 2, "{diff}");
}

#[test]
fn predictions_are_compared_row_by_row() {
    let space = evaluated();
    let diff = read(&space, &["predictions", "diff", "eval@good=1", "eval@good=3"]);
    assert_eq!(diff["wins"].as_array().unwrap().len(), 2);
    assert_eq!(diff["wins"][0]["id"], "b");
    assert_eq!((&diff["both_right"], &diff["both_wrong"]), (&json!(1), &json!(0)));
    let back = space.pipe(&["predictions", "diff", "eval@good=3", "eval@good=1"]).code(0).out;
    assert!(back.starts_with("0 wins, 2 regressions, 1 right in both, 0 wrong"), "{back}");
    assert!(back.contains("regression c\n  user      q c\n  before    said 3\n"), "{back}");
    let wrong =
        space.pipe(&["predictions", "diff", "eval", "eval@good=1", "--by", "rihgt"]).code(2);
    assert!(wrong.err.contains("line 1: no `rihgt`"), "{}", wrong.err);
}

#[test]
fn rows_that_ask_something_else_are_not_compared() {
    let space = evaluated();
    space.replace("\"user\": \"q %s\"", "\"user\": \"other %s\"");
    space.pipe(&["run", "eval"]).code(0);
    let diff = read(&space, &["predictions", "diff", "last:eval"]);
    assert_eq!(diff["both_right"], 2);
    let first = read(&space, &["runs", "ls"])[1]["id"].as_str().unwrap().to_owned();
    let diff = read(&space, &["predictions", "diff", &format!("{first}:eval"), "eval"]);
    assert_eq!((&diff["mismatched"], &diff["both_right"]), (&json!(3), &json!(0)));
}

#[test]
fn runs_that_did_something_are_listed_shown_and_compared() {
    let space = evaluated();
    assert_eq!(fs::read_dir(space.cache().join("runs")).unwrap().count(), 1);
    space.pipe(&["run", "eval@*"]).code(0);
    assert_eq!(fs::read_dir(space.cache().join("runs")).unwrap().count(), 1, "a no-op writes none");
    space.pipe(&["run", "--set", "good=4"]).code(0);
    let runs = read(&space, &["runs", "ls"]);
    assert_eq!(runs.as_array().unwrap().len(), 2);
    assert_eq!((&runs[0]["set"], &runs[1]["selection"]), (&json!(["good=4"]), &json!(["eval@*"])));
    let shown = read(&space, &["runs", "show", "last"]);
    assert_eq!(shown, runs[0]);
    let statuses: Vec<&str> =
        shown["stages"].as_array().unwrap().iter().map(|s| s["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["ran", "reused", "reused"]);
    let first = runs[1]["id"].as_str().unwrap();
    let compared = read(&space, &["runs", "compare", first, "last"]);
    let eval = &compared["stages"][0];
    assert_eq!((&eval["stage"], &eval["verdict"]), (&json!("eval"), &json!("changed")));
    assert_eq!(eval["metrics"][0]["after"], 0.4);
    let people = space.pipe(&["runs", "compare", first, "last"]).code(0).out;
    assert!(people.contains("eval@good=1  same"), "{people}");
    let unknown = space.pipe(&["runs", "show", "nothing"]).code(2);
    assert!(unknown.err.contains("no stage, run or git revision"), "{}", unknown.err);
}

#[test]
fn failed_run_is_remembered_with_what_failed() {
    let space = Space::new(DIAMOND);
    space.replace("cat $PIPE_INPUT_A", "exit 3; cat $PIPE_INPUT_A");
    space.pipe(&["run"]).code(4);
    let run = read(&space, &["runs", "show"]);
    let status = |stage: &str| {
        let stages = run["stages"].as_array().unwrap();
        let found = stages.iter().find(|s| s["stage"] == stage).unwrap();
        found["status"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (status("left"), status("join"), status("last")),
        ("ran".into(), "failed".into(), "skipped".into())
    );
}

#[test]
fn a_git_revision_is_planned_with_its_own_files() {
    let space = evaluated();
    space.write(".gitignore", "/cache/\n");
    git(&space, &["init", "-q", "-b", "main"]);
    git(&space, &["add", "."]);
    git(&space, &["commit", "-qm", "first"]);
    space.replace("params: {good: 2}", "params: {good: 4}");
    space.write("rows.txt", "a\nb\nc\nd\ne\n");
    space.pipe(&["run", "eval"]).code(0);
    let params = read(&space, &["params", "diff", "HEAD:eval"]);
    assert_eq!(
        params["changes"][0],
        json!({"stage": "eval", "param": "good", "before": 2, "after": 4})
    );
    let metrics = read(&space, &["metrics", "diff", "HEAD:eval"]);
    assert_eq!(
        (&metrics["changes"][1]["metric"], &metrics["changes"][1]["before"]),
        (&json!("rows"), &json!(3.0))
    );
    let predictions = read(&space, &["predictions", "diff", "main:eval"]);
    assert_eq!(
        (&predictions["wins"][0]["id"], &predictions["only_after"]),
        (&json!("c"), &json!(2))
    );
    let compared = space.pipe(&["runs", "compare", "HEAD"]).code(0).out;
    assert!(compared.contains("eval         changed"), "{compared}");
    let missing = space.pipe(&["metrics", "diff", "HEAD~1:eval"]).code(2);
    assert!(missing.err.contains("no run or git revision"), "{}", missing.err);
    assert_eq!(fs::read_to_string(space.path("rows.txt")).unwrap().lines().count(), 5);
}
