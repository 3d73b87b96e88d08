//! What a stage had in its hands counts, not what became of the cache while it ran.

use std::fs;

use crate::space::Space;

/// `slow` reads what `first` made twice, and between that `bad` writes to it and fails, and `good`
/// has it made anew.
const BESIDE: &str = r"
stages:
  first:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/first; echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  slow:
    kind: command
    inputs: {a: first}
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/slow; for i in $(seq 600); do [ -e $RUNS/good ] && break; sleep 0.05; done; cat $PIPE_INPUT_A > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  bad:
    kind: command
    inputs: {a: first}
    pass_env: [RUNS]
    params: {run: 'until [ -e $RUNS/slow ]; do sleep 0.05; done; chmod u+w $PIPE_INPUT_A; echo bad >> $PIPE_INPUT_A; exit 7', outputs: {out: {file: out}}}
  good:
    kind: command
    inputs: {a: first}
    pass_env: [RUNS]
    params: {run: 'cat $PIPE_INPUT_A > $PIPE_OUTPUT_OUT; echo x >> $RUNS/good', outputs: {out: {file: out}}}
";

#[test]
fn stage_that_read_what_another_changed_fails_although_its_input_was_made_anew() {
    let space = Space::new(BESIDE);
    let ran = space.pipe(&["run", "--keep-going", "--jobs", "2"]).code(4);
    if !space.cache().join("quarantine").exists() {
        println!("not tried: inputs are copies here");
        return;
    }
    assert_eq!((space.runs("first"), space.runs("good")), (2, 1), "{}", ran.err);
    let said = "input `a` (made by `first`) changed while the stage ran";
    assert!(ran.err.contains(&format!("slow: failed: {said}")), "{}", ran.err);
    let plan = space.pipe(&["plan", "--check"]).code(6).out;
    assert!(plan.contains("2 would run") && plan.contains("2 would be reused"), "{plan}");
}

#[test]
fn stage_whose_input_was_removed_from_the_cache_while_it_ran_is_published() {
    // Removed as object, removed by the stage from its own folder, and put back as something else.
    for own in ["true", "rm -f $PIPE_INPUT_A", "rm -f $PIPE_INPUT_A; echo own > $PIPE_INPUT_A"] {
        let thief = "rm -f $PIPE_PIPELINE_DIR/cache/objects-v1/*/*";
        let thief = if own == "true" { thief } else { "true" };
        let space = Space::new(&format!(
            "stages:\n  first:\n    kind: command\n    params: {{run: 'echo 1 > $PIPE_OUTPUT_OUT', outputs: {{out: {{file: out}}}}}}\n  \
             reader:\n    kind: command\n    inputs: {{a: first}}\n    params: {{run: 'cat $PIPE_INPUT_A > $PIPE_OUTPUT_OUT; {thief}; {own}', outputs: {{out: {{file: out}}}}}}\n"
        ));
        space.pipe(&["run"]).code(0);
        space.pipe(&["run", "reader"]).code(0);
        space.pipe(&["outputs", "reader", "--to", "kept"]).code(0);
        assert_eq!(fs::read_to_string(space.path("kept/out")).unwrap(), "1\n");
    }
}
