//! Objects that are lost in the middle of a run, between the stage that made them and those that
//! read them.

use crate::space::Space;

/// Two stages that start at once read what `first` made and `thief` has removed meanwhile.
const TWO_READERS: &str = r"
stages:
  first:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/first; echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  thief:
    kind: command
    inputs: {a: first}
    params: {run: 'echo 2 > $PIPE_OUTPUT_OUT; rm -f $PIPE_PIPELINE_DIR/cache/objects-v1/*/*', outputs: {out: {file: out}}}
  left:
    kind: command
    inputs: {a: first, b: thief}
    params: {run: 'cat $PIPE_INPUT_A $PIPE_INPUT_B > $PIPE_OUTPUT_OUT; echo left >> $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  right:
    kind: command
    inputs: {a: first, b: thief}
    params: {run: 'cat $PIPE_INPUT_A $PIPE_INPUT_B > $PIPE_OUTPUT_OUT; echo right >> $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
";

#[test]
fn object_that_two_stages_miss_at_once_is_lost_once() {
    let space = Space::new(TWO_READERS);
    let ran = space.pipe(&["run", "--jobs", "2"]).code(0);
    assert_eq!(space.runs("first"), 2);
    assert!(ran.err.contains("4 run, 0 reused"), "{}", ran.err);
    space.pipe(&["plan", "--check"]).code(0);
}

#[cfg(feature = "remote")]
#[test]
fn stage_that_is_fetched_again_counts_once() {
    let space = Space::new(&format!("remote: {{url: ../remote, write: always}}\n{TWO_READERS}"));
    space.pipe(&["run", "first"]).code(0);
    std::fs::remove_dir_all(space.cache()).unwrap();
    let ran = space.pipe(&["run", "--jobs", "2", "--json"]).code(0);
    assert_eq!(space.runs("first"), 1);
    let events = crate::programs::events(&ran.out);
    let fetched = events.iter().filter(|e| e["event"] == "stage-fetched").count();
    assert_eq!(fetched, 2, "{}", ran.out);
    let end = events.last().unwrap();
    let counts = ["ran", "reused", "fetched", "failed"].map(|key| end[key].as_u64().unwrap());
    assert_eq!(counts, [3, 1, 1, 0], "{end}");
}
