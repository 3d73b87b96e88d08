//! What changed since when, what counts, and what is refused.

use std::fs;

use serde_json::Value;

use crate::space::{DIAMOND, Space};

/// A stage that lists a folder of the user's, one that makes a folder, and one that reads it.
const FOLDERS: &str = r"
params: {extra: one}
stages:
  list:
    kind: command
    inputs: {data: {path: data}}
    params: {run: 'ls $PIPE_INPUT_DATA > $PIPE_OUTPUT_OUT', outputs: {out: {file: list.txt}}}
  make:
    kind: command
    params: {run: 'cd $PIPE_OUTPUT_OUT; echo same > same; echo ${extra} > edited; echo new > ${extra}.txt', outputs: {out: {dir: made}}}
  use:
    kind: command
    inputs: {made: make}
    params: {run: 'cat $PIPE_INPUT_MADE/* > $PIPE_OUTPUT_OUT', outputs: {out: {file: all.txt}}}
";

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn why_names_the_files_of_a_folder_that_changed() {
    let space = Space::new(FOLDERS);
    for name in ["kept", "edited", "gone"] {
        space.write(&format!("data/{name}"), "1");
    }
    space.pipe(&["run"]).code(0);
    space.write("data/edited", "22");
    space.write("data/sub/added", "1");
    fs::remove_file(space.path("data/gone")).unwrap();
    let why = space.pipe(&["why", "list"]).code(0).out;
    let files = "(from data): added sub/added; removed gone; changed edited";
    assert!(why.contains(files), "{why}");
    let plan = json(&space.pipe(&["plan", "list", "--json"]).code(0).out);
    let files = &plan["stages"][0]["reasons"][0]["files"];
    assert_eq!(files["added"][0], "sub/added");
}

#[test]
fn why_compares_with_any_earlier_execution() {
    let space = Space::new(FOLDERS);
    space.write("data/a", "1");
    space.pipe(&["run"]).code(0);
    space.pipe(&["run", "--set", "extra=two"]).code(0);
    let listed = json(&space.pipe(&["why", "use", "--runs", "--json"]).code(0).out);
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 2);
    let mut same = 0;
    for run in listed {
        let id = &run["fingerprint"].as_str().unwrap()[..12];
        let why = space.pipe(&["why", "use", "--run", id, "--set", "extra=two"]).code(0).out;
        if why.contains("nothing differs") {
            same += 1;
        } else {
            let files = "(from make.out): added two.txt; removed one.txt; changed edited";
            assert!(why.contains(files), "{why}");
        }
    }
    assert_eq!(same, 1);
    let text = space.pipe(&["why", "use", "--runs"]).code(0).out;
    assert_eq!(text.lines().count(), 2, "{text}");
    let unknown = space.pipe(&["why", "use", "--run", "zz"]).code(2);
    assert!(unknown.err.contains("pipe why use --runs"), "{}", unknown.err);
    let many = space.pipe(&["why", "use", "--run", ""]).code(2);
    assert!(many.err.contains("more of its digits"), "{}", many.err);
}

#[test]
fn why_compares_with_a_run_by_its_id() {
    let space = Space::new(FOLDERS);
    space.write("data/a", "1");
    space.pipe(&["run"]).code(0);
    space.write("data/b", "1");
    space.pipe(&["run", "list"]).code(0);
    let runs = json(&space.pipe(&["runs", "ls", "--json"]).code(0).out);
    let first = runs[1]["id"].as_str().unwrap();
    let why = space.pipe(&["why", "list", "--run", first]).code(0).out;
    assert!(why.contains("(from data): added b"), "{why}");
    let why = space.pipe(&["why", "list", "--run", "last"]).code(0).out;
    assert!(why.contains("nothing differs"), "{why}");
    let absent = space.pipe(&["why", "use", "--run", "last"]).code(2);
    assert!(absent.err.contains("it was not part of it"), "{}", absent.err);
}

#[test]
fn comparing_with_an_earlier_execution_says_what_is_not_known_yet() {
    let space = Space::new(FOLDERS);
    space.write("data/a", "1");
    space.pipe(&["run"]).code(0);
    let listed = json(&space.pipe(&["why", "use", "--runs", "--json"]).code(0).out);
    let id = listed[0]["fingerprint"].as_str().unwrap();
    let why = space.pipe(&["why", "use", "--run", id, "--set", "extra=three"]).code(0).out;
    assert!(why.contains("what make will make is not known yet"), "{why}");
    let why = space.pipe(&["why", "make", "--run", id, "--set", "extra=three"]).code(0).out;
    assert!(why.contains("make differs from"), "{why}");
}

#[test]
fn early_cutoff_is_shown_by_plan_and_run() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    space.replace("echo ${left} >", "echo ${left}  >");
    let plan = space.pipe(&["plan"]).code(0).out;
    assert!(plan.contains("early cutoff: reused if they make what they made before"), "{plan}");
    let run = space.pipe(&["run"]).code(0).err;
    assert!(run.contains("early cutoff after left"), "{run}");
    assert!(run.contains("3 reused (1 by early cutoff)"), "{run}");
}

#[test]
fn folder_edited_by_its_own_stage_is_noticed_and_nothing_is_published() {
    let space = Space::new(FOLDERS);
    space.write("data/a", "1");
    space.replace("'ls $PIPE_INPUT_DATA", "'touch $PIPE_PIPELINE_DIR/data/b; ls $PIPE_INPUT_DATA");
    let run = space.pipe(&["run", "list"]).code(4);
    assert!(run.err.contains("data changed while the stage ran"), "{}", run.err);
    assert!(!space.cache().join("records-v1").exists());
    // The file is there now, and the stage changes nothing more.
    space.pipe(&["run", "list"]).code(0);
}

#[test]
fn only_declared_variables_reach_a_stage_and_only_env_counts() {
    let pipeline = r"
stages:
  s:
    kind: command
    env: [COUNTS]
    pass_env: [PASSED]
    params: {run: 'echo [$COUNTS] [$PASSED] [$HIDDEN] > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
";
    let space = Space::new(pipeline);
    let run = |args: &[&str], counts: &str, passed: &str| {
        let mut command = space.command(args);
        command.env("COUNTS", counts).env("PASSED", passed).env("HIDDEN", "h");
        crate::space::ran(&command.output().unwrap())
    };
    run(&["run"], "a", "b").code(0);
    run(&["outputs", "s", "--to", "kept"], "a", "b").code(0);
    assert_eq!(fs::read_to_string(space.path("kept/o")).unwrap(), "[a] [b] []\n");
    run(&["plan", "--check"], "a", "other").code(0);
    let plan = run(&["plan", "--check"], "c", "b").code(6);
    assert!(plan.out.contains("environment COUNTS: a -> c"), "{}", plan.out);
    // Unset is not the same as empty.
    run(&["run"], "", "b").code(0);
    space.pipe(&["plan", "--check"]).code(6);
}

#[test]
fn plan_check_fails_for_what_would_and_for_what_might_run() {
    let space = Space::new(DIAMOND);
    space.pipe(&["plan", "--check"]).code(6);
    space.pipe(&["run", "left"]).code(0);
    space.pipe(&["plan", "--check", "left"]).code(0);
    space.pipe(&["run"]).code(0);
    space.pipe(&["plan", "--check"]).code(0);
    let might = space.pipe(&["plan", "--check", "--json", "--set", "left=x"]).code(6);
    assert_eq!(json(&might.out)["stages"][3]["decision"], "maybe");
}

#[test]
fn requirement_on_provenance_makes_a_stage_stale_and_says_why() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    space.replace(
        "  last:\n    kind: command\n",
        "  last:\n    kind: command\n    require: {pipe: never}\n",
    );
    let plan = space.pipe(&["plan", "--check"]).code(6);
    assert!(plan.out.contains("requires pipe = \"never\""), "{}", plan.out);
    let version = format!("require: {{pipe: {}}}", env!("CARGO_PKG_VERSION"));
    space.replace("require: {pipe: never}", &version);
    space.pipe(&["plan", "--check"]).code(0);
}

#[test]
fn run_ends_with_what_it_waited_for() {
    let space = Space::new(DIAMOND);
    let run = space.pipe(&["run"]).code(0).err;
    let path = run.lines().find(|l| l.starts_with("critical path")).unwrap();
    assert!(path.ends_with("> join > last"), "{run}");
    let again = space.pipe(&["run"]).code(0).err;
    assert!(!again.contains("critical path"), "{again}");
}
