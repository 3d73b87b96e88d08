//! Failing stages, and inputs that change under a stage.

use std::fs;

use crate::space::{DIAMOND, Space};

#[test]
fn failed_stage_stops_its_dependants_keeps_its_log_and_publishes_nothing() {
    let space = Space::new(DIAMOND);
    space.replace("cat $PIPE_INPUT_A", "echo about to fail; exit 3; cat $PIPE_INPUT_A");
    let run = space.pipe(&["run"]).code(4);
    assert!(run.err.contains("join: failed: the command ended with exit code 3"), "{}", run.err);
    assert!(run.err.contains("| about to fail"), "{}", run.err);
    assert!(run.err.contains("last: skipped, because join failed"), "{}", run.err);
    assert_eq!(space.all_runs(), [1, 1, 1, 0]);
    let log = space.pipe(&["logs", "join"]).code(0);
    assert!(log.out.contains("about to fail"), "{}", log.out);
    space.replace("exit 3; ", "");
    space.pipe(&["run"]).code(0);
    assert_eq!(space.all_runs(), [1, 1, 2, 1]);
}

#[test]
fn keep_going_runs_what_does_not_depend_on_the_failure() {
    let space = Space::new(
        "stages:\n  bad:\n    kind: command\n    params: {run: 'exit 1', outputs: {o: {file: o}}}\n  \
         good:\n    kind: command\n    pass_env: [RUNS]\n    params: {run: 'sleep 0.3; echo x >> $RUNS/good; echo 1 > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}\n  \
         after:\n    kind: command\n    pass_env: [RUNS]\n    inputs: {g: good}\n    params: {run: 'echo x >> $RUNS/after; echo 1 > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}\n",
    );
    space.pipe(&["run"]).code(4);
    assert_eq!((space.runs("good"), space.runs("after")), (1, 0));
    space.pipe(&["run", "--keep-going"]).code(4);
    assert_eq!((space.runs("good"), space.runs("after")), (1, 1));
}

#[test]
fn missing_or_extra_output_is_an_error() {
    let space = Space::new(
        "stages:\n  s:\n    kind: command\n    params: {run: 'true', outputs: {o: {file: o}}}\n",
    );
    let run = space.pipe(&["run"]).code(4);
    assert!(run.err.contains("did not write its output `o`"), "{}", run.err);
    space.replace("run: 'true'", "run: 'echo 1 > $PIPE_OUTPUT_O; echo 2 > $PIPE_OUTPUT_O.more'");
    let run = space.pipe(&["run"]).code(4);
    assert!(run.err.contains("o.more"), "{}", run.err);
    assert!(!space.cache().join("records-v1").exists());
}

#[test]
fn input_that_changes_while_a_stage_runs_is_noticed_and_nothing_is_published() {
    let space = Space::new(
        "stages:\n  s:\n    kind: command\n    inputs: {f: {path: f.txt}}\n    params: {run: 'cat $PIPE_INPUT_F > $PIPE_OUTPUT_O; echo more >> $PIPE_PIPELINE_DIR/f.txt', outputs: {o: {file: o}}}\n",
    );
    space.write("f.txt", "one\n");
    let run = space.pipe(&["run"]).code(4);
    assert!(run.err.contains("f.txt changed while the stage ran"), "{}", run.err);
    assert!(!space.cache().join("records-v1").exists());
}

#[test]
fn secrets_that_are_passed_on_are_stored_nowhere() {
    let space = Space::new(
        "stages:\n  s:\n    kind: command\n    pass_env: [MY_TOKEN]\n    params: {run: 'test -n \"$MY_TOKEN\" && echo ok > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}\n",
    );
    let run = space.command(&["run"]).env("MY_TOKEN", "hunter2-secret").output().unwrap();
    assert!(run.status.success());
    let mut open = vec![space.outside().to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            if entry.path().is_dir() {
                open.push(entry.path());
            } else {
                let text = fs::read(entry.path()).unwrap();
                let found = text.windows(14).any(|w| w == b"hunter2-secret");
                assert!(!found, "{}", entry.path().display());
            }
        }
    }
}

#[test]
fn requirement_that_cannot_be_met_publishes_nothing() {
    let space = Space::new(DIAMOND);
    space.replace(
        "  last:\n    kind: command\n",
        "  last:\n    kind: command\n    require: {backend: cuda}\n",
    );
    let run = space.pipe(&["run"]).code(4);
    assert!(run.err.contains("requires backend = \"cuda\""), "{}", run.err);
}
