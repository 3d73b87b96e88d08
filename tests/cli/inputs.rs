//! What stages read must be what was decided on, from just before they run until they have ended.

use std::fs;

use crate::space::Space;

/// `bad` writes to what `good` reads too, and `first` makes.
const VANDAL: &str = r"
stages:
  first:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/first; echo 1 > $PIPE_OUTPUT_OUT; echo 2 > $PIPE_OUTPUT_MORE/2', outputs: {out: {file: out}, more: {dir: more}}}
  bad:
    kind: command
    inputs: {a: first.out, b: first.more}
    params: {run: 'chmod u+w $PIPE_INPUT_A; echo bad >> $PIPE_INPUT_A; cat $PIPE_INPUT_A > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  good:
    kind: command
    inputs: {a: first.out, b: first.more}
    params: {run: 'cat $PIPE_INPUT_A $PIPE_INPUT_B/2 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
";

fn made(space: &Space, stage: &str) -> String {
    let to = format!("kept-{stage}");
    space.pipe(&["outputs", stage, "--to", &to]).code(0);
    fs::read_to_string(space.path(&to).join("out")).unwrap()
}

/// Whether inputs turned out to be copies, which a file system that shares blocks makes of them:
/// then nobody reads what a stage writes there.
fn are_copies(space: &Space) -> bool {
    let copies = space.pipe(&["cache", "verify"]).code == Some(0)
        && !space.cache().join("quarantine").exists();
    if copies {
        println!("not tried: inputs are copies here");
    }
    copies
}

#[test]
fn stage_that_writes_to_its_input_fails_and_nobody_reads_what_it_wrote() {
    for (target, input) in [("$PIPE_INPUT_A", "input `a`"), ("$PIPE_INPUT_B/2", "input `b`")] {
        let space = Space::new(&VANDAL.replace("u+w $PIPE_INPUT_A", &format!("u+w {target}")));
        space.replace("bad >> $PIPE_INPUT_A", &format!("bad >> {target}"));
        let ran = space.pipe(&["run", "--keep-going", "--jobs", "1"]);
        if are_copies(&space) {
            return;
        }
        let ran = ran.code(4);
        for said in [input, "changed while the stage ran", "must not write to their inputs"] {
            assert!(ran.err.contains(said), "{said}: {}", ran.err);
        }
        // The other one reads what was made anew, in the same run.
        assert_eq!(made(&space, "good"), "1\n2\n");
        assert_eq!(space.runs("first"), 2);
        assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
        let plan = space.pipe(&["plan", "--check"]).code(6).out;
        assert!(plan.contains("1 would run") && plan.contains("2 would be reused"), "{plan}");
    }
}

#[test]
fn damage_by_a_stage_that_fails_is_found_before_the_next_one_reads() {
    let space = Space::new(&VANDAL.replace("$PIPE_INPUT_A; cat", "$PIPE_INPUT_A; exit 7; cat"));
    let ran = space.pipe(&["run", "--keep-going", "--jobs", "1"]).code(4);
    assert!(ran.err.contains("exit code 7"), "{}", ran.err);
    if are_copies(&space) {
        return;
    }
    assert_eq!(made(&space, "good"), "1\n2\n");
    assert_eq!(space.runs("first"), 2);
    assert!(ran.err.contains("2 run, 0 reused, 1 failed"), "{}", ran.err);
}

#[test]
fn object_lost_in_the_middle_of_a_run_is_made_anew_in_the_same_run() {
    // `thief` removes what `first` made after it was decided on, and before `last` reads it.
    let space = Space::new(
        r"
stages:
  first:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/first; echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  early:
    kind: command
    pass_env: [RUNS]
    inputs: {a: first}
    params: {run: 'echo x >> $RUNS/early; cp $PIPE_INPUT_A $PIPE_OUTPUT_OUT; echo early >> $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  thief:
    kind: command
    inputs: {b: early}
    params: {run: 'cp $PIPE_INPUT_B $PIPE_OUTPUT_OUT; for o in $PIPE_PIPELINE_DIR/cache/objects-v1/*/*; do cmp -s $o $PIPE_INPUT_B || rm -f $o; done', outputs: {out: {file: out}}}
  last:
    kind: command
    pass_env: [RUNS]
    inputs: {a: first, b: thief}
    params: {run: 'echo x >> $RUNS/last; cat $PIPE_INPUT_A $PIPE_INPUT_B > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
",
    );
    let ran = space.pipe(&["run"]).code(0);
    assert_eq!(["first", "early", "last"].map(|stage| space.runs(stage)), [2, 1, 1]);
    assert!(ran.err.contains("4 run, 0 reused"), "{}", ran.err);
    assert_eq!(made(&space, "last"), "1\n1\nearly\n");
    space.pipe(&["plan", "--check"]).code(0);
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
}
