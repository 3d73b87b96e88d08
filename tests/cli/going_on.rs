//! What goes wrong with one stage while others run is that stage's failure and nobody else's.

use crate::programs::events;
use crate::space::Space;

/// `gone` removes the file that `reader` is to read, while `long` runs.
const MEANWHILE: &str = r"
stages:
  long:
    kind: command
    pass_env: [RUNS]
    params: {run: 'touch $RUNS/long; until [ -e $RUNS/removed ]; do sleep 0.05; done; sleep 0.5; echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  gone:
    kind: command
    pass_env: [RUNS]
    params: {run: 'until [ -e $RUNS/long ]; do sleep 0.05; done; rm $PIPE_PIPELINE_DIR/f.txt; touch $RUNS/removed; echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  reader:
    kind: command
    inputs: {f: {path: f.txt}, after: gone}
    params: {run: 'cat $PIPE_INPUT_F > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  other:
    kind: command
    inputs: {after: gone}
    params: {run: 'echo 3 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
";

fn run(more: &[&str]) -> (Space, Vec<serde_json::Value>) {
    let space = Space::new(MEANWHILE);
    space.write("f.txt", "1\n");
    let ran = space.pipe(&[&["run", "--jobs", "2", "--json"], more].concat()).code(4);
    let events = events(&ran.out);
    (space, events)
}

#[test]
fn stage_that_cannot_be_decided_on_fails_and_what_runs_is_finished() {
    let (space, events) = run(&[]);
    let of = |name: &str| events.iter().filter(|e| e["event"] == name).collect::<Vec<_>>();
    let failed = of("stage-failed");
    assert_eq!(failed.len(), 1, "{events:?}");
    assert_eq!(failed[0]["stage"], "reader");
    assert_eq!(failed[0]["message"], "no file or folder `f.txt`");
    assert_eq!(failed[0]["help"], "paths are relative to the pipeline file");
    assert!(of("stage-finished").iter().any(|e| e["stage"] == "long"), "{events:?}");
    let end = events.last().unwrap();
    let counts = ["ran", "failed", "skipped"].map(|key| end[key].as_u64().unwrap());
    assert_eq!((&end["event"], counts), (&"run-finished".into(), [2, 1, 1]));
    assert!(space.pipe(&["runs", "ls"]).code(0).out.contains("2 ran"));
}

#[test]
fn stage_that_cannot_be_decided_on_keeps_nobody_from_going_on() {
    let (_space, events) = run(&["--keep-going"]);
    let end = events.last().unwrap();
    let counts = ["ran", "failed", "skipped"].map(|key| end[key].as_u64().unwrap());
    assert_eq!(counts, [3, 1, 0], "{events:?}");
}

#[test]
fn error_before_anything_runs_has_its_own_report_and_exit_code() {
    let space = Space::new(MEANWHILE);
    space.replace(", after: gone}\n    params: {run: 'cat", "}\n    params: {run: 'cat");
    let ran = space.pipe(&["run", "reader"]).code(3);
    assert!(ran.err.contains("needed here"), "{}", ran.err);
}
