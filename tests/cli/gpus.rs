//! GPUs of the host: each stage that asks for one sees its own. The names here are of no real GPU.

use std::fs;

use crate::space::{Ran, Space, ran};

/// Waits until two stages are at work, and says which GPUs it sees.
const BESIDE: &str = "touch $RUNS/$PIPE_STAGE; for i in $(seq 600); do \
     [ -e $RUNS/one ] && [ -e $RUNS/two ] && break; sleep 0.05; done; \
     [ -e $RUNS/one ] && [ -e $RUNS/two ] && echo $CUDA_VISIBLE_DEVICES > $PIPE_OUTPUT_O";

fn stage(name: &str, resources: &str, run: &str) -> String {
    format!(
        "  {name}:\n    kind: command\n    pass_env: [RUNS]\n    params:\n      run: '{run}'\n      \
         resources: {resources}\n      outputs: {{o: {{file: o}}}}\n"
    )
}

fn run(space: &Space, gpus: &str) -> Ran {
    let mut command = space.command(&["run", "--jobs", "4"]);
    ran(&command.env("CUDA_VISIBLE_DEVICES", gpus).output().unwrap())
}

fn seen(space: &Space, stage: &str) -> String {
    let to = space.outside().join(stage);
    space.pipe(&["outputs", stage, "--to", to.to_str().unwrap()]).code(0);
    fs::read_to_string(to.join("o")).unwrap().trim().to_owned()
}

#[test]
fn stages_side_by_side_see_a_gpu_each() {
    let beside = |name: &str| BESIDE.replace("$PIPE_STAGE", name);
    let see = "echo $CUDA_VISIBLE_DEVICES > $PIPE_OUTPUT_O";
    let text = ["stages:\n".to_owned(), stage("one", "{gpu: 1}", &beside("one"))]
        .into_iter()
        .chain([stage("two", "{gpu: 1}", &beside("two")), stage("both", "{gpu: 2}", see)])
        .chain([stage("second", "{\"gpu:1\": 1}", see)]);
    let space = Space::new(&text.collect::<String>());
    run(&space, "9101,9102").code(0);
    let mut own = [seen(&space, "one"), seen(&space, "two")];
    own.sort();
    assert_eq!(own, ["9101", "9102"]);
    assert_eq!(seen(&space, "both"), "9101,9102");
    assert_eq!(seen(&space, "second"), "9101,9102", "a stage that names its GPU sees all");
}

#[test]
fn more_gpus_than_there_are_is_an_error() {
    let space = Space::new(&format!("stages:\n{}", stage("a", "{gpu: 2}", "true")));
    let refused = run(&space, "9103").code(4);
    assert!(refused.err.contains("stage `a` asks for 2 GPUs at once"), "{}", refused.err);
    let space = Space::new(&format!("stages:\n{}", stage("a", "{\"gpu:1\": 1}", "true")));
    let refused = run(&space, "9103").code(4);
    assert!(refused.err.contains("this host has 1, counted from 0"), "{}", refused.err);
}
