//! Sweeps: points, their names, what they share, who follows and who gathers.

use std::fs;

use serde_json::{Value, json};

use crate::space::Space;

/// Two stages upstream of a swept one; a score, a choice and a last look at the chosen one.
const SWEEP: &str = r#"
params: {length: 10, rate: 2e-4}
targets: {default: [report], tuning: [final], every: ['train@*']}
stages:
  pack:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/pack; echo ${length} > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
  train:
    kind: command
    pass_env: [RUNS]
    inputs: {pack: pack}
    matrix:
      single: {rate: [1e-4, 0.0002, 5e-4], length: [10, 20]}
    params: {run: 'echo x >> $RUNS/train; echo ${rate} $(cat $PIPE_INPUT_PACK) > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
  dev:
    kind: command
    pass_env: [RUNS]
    inputs: {train: train}
    params: {run: 'echo x >> $RUNS/dev; read rate length < $PIPE_INPUT_TRAIN; printf "{\"score\": %s, \"rate\": %s}" $length $rate > $PIPE_OUTPUT_METRICS', outputs: {metrics: {file: metrics.json}}}
  choose:
    kind: select
    inputs: {metrics: {gather: dev.metrics}, candidates: {gather: train}}
    params: {metric: score}
  final:
    kind: command
    inputs: {chosen: choose.chosen, all: {gather: dev}}
    params: {run: 'cat $PIPE_INPUT_CHOSEN/o > $PIPE_OUTPUT_O; cp $PIPE_INPUT_ALL/index.json $PIPE_OUTPUT_INDEX; (cd $PIPE_INPUT_ALL; ls */*) > $PIPE_OUTPUT_LIST', outputs: {o: {file: o}, index: {file: index.json}, list: {file: list}}}
  report:
    kind: command
    pass_env: [RUNS]
    inputs: {train: {from: train.o, at: {}}, fast: {from: train, at: {rate: 0.5e-3}}}
    params: {run: 'echo x >> $RUNS/report; cat $PIPE_INPUT_TRAIN $PIPE_INPUT_FAST > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
"#;

fn space() -> Space {
    Space::new(SWEEP)
}

fn stages(space: &Space, args: &[&str]) -> Vec<String> {
    let mut all = vec!["plan", "--json"];
    all.extend(args);
    let plan: Value = serde_json::from_str(&space.pipe(&all).code(0).out).unwrap();
    let stages = plan["stages"].as_array().unwrap();
    stages.iter().map(|s| s["stage"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn points_share_what_no_change_reaches() {
    let space = space();
    let expected = [
        "pack",
        "pack@length=20",
        "train",
        "train@rate=0.0001",
        "train@rate=0.0005",
        "train@length=20",
    ];
    assert_eq!(stages(&space, &["train@*"]), expected);
    assert_eq!(stages(&space, &["every"]), expected);
    assert_eq!(stages(&space, &["train"]), ["pack", "train"]);
    assert_eq!(stages(&space, &[]), ["pack", "train", "train@rate=0.0005", "report"]);
    space.pipe(&["run", "train@*"]).code(0);
    assert_eq!((space.runs("pack"), space.runs("train")), (2, 4));
}

#[test]
fn names_have_one_spelling_and_the_default_point_is_the_plain_stage() {
    let space = space();
    for name in ["train@rate=1e-4", "train@rate=0.0001", "train@length=10,rate=1.0e-4"] {
        assert_eq!(stages(&space, &[name]), ["pack", "train@rate=0.0001"]);
    }
    assert_eq!(stages(&space, &["train@rate=2e-4"]), ["pack", "train"]);
    space.pipe(&["run", "train@rate=1e-4"]).code(0);
    assert!(space.pipe(&["why", "train@rate=0.00010"]).code(0).out.contains("would not run"));
    // The same params from elsewhere are the same execution.
    space.pipe(&["plan", "train", "--set", "rate=1e-4", "--check"]).code(0);
    let wrong = space.pipe(&["run", "train@rate=3e-4"]).code(3);
    assert!(wrong.err.contains("did you mean `train@rate=0.000"), "{}", wrong.err);
}

#[test]
fn gathered_points_arrive_with_an_index_and_the_best_is_handed_on() {
    let space = space();
    space.pipe(&["run", "tuning"]).code(0);
    space.pipe(&["outputs", "final", "--to", "kept"]).code(0);
    assert_eq!(fs::read_to_string(space.path("kept/o")).unwrap(), "0.0002 20\n");
    let index = fs::read_to_string(space.path("kept/index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index.as_array().unwrap().len(), 4);
    assert_eq!(
        index[0],
        json!({"point": "default", "path": "default/metrics.json", "params": {"rate": 0.0002, "length": 10}})
    );
    let listed = fs::read_to_string(space.path("kept/list")).unwrap();
    assert_eq!(
        listed,
        "default/metrics.json\nlength=20/metrics.json\nrate=0.0001/metrics.json\nrate=0.0005/metrics.json\n"
    );
    space.pipe(&["outputs", "choose", "--to", "kept"]).code(0);
    let choice: Value =
        serde_json::from_slice(&fs::read(space.path("kept/choice.json")).unwrap()).unwrap();
    assert_eq!(choice["best"]["point"], "length=20");
    space.pipe(&["plan", "tuning", "--check"]).code(0);
    let second = space.pipe(&["run", "tuning"]).code(0);
    assert!(second.err.contains("0 run"), "{}", second.err);
}

#[test]
fn adding_a_point_runs_that_point_alone_and_what_gathers_it() {
    let space = space();
    space.pipe(&["run", "tuning"]).code(0);
    space.replace("[10, 20]", "[10, 20, 5]");
    let why = space.pipe(&["why", "choose"]).code(0);
    assert!(why.out.contains("dev@length=5"), "{}", why.out);
    space.pipe(&["run", "tuning"]).code(0);
    assert_eq!((space.runs("pack"), space.runs("train"), space.runs("dev")), (3, 5, 5));
    let why = space.pipe(&["why", "final"]).code(0);
    assert!(why.out.contains("would not run"), "{}", why.out);
}

#[test]
fn a_stage_that_follows_one_point_is_not_expanded() {
    let space = space();
    space.pipe(&["run"]).code(0);
    space.pipe(&["outputs", "report", "--to", "kept"]).code(0);
    assert_eq!(fs::read_to_string(space.path("kept/o")).unwrap(), "0.0002 10\n0.0005 10\n");
    space.pipe(&["run", "tuning"]).code(0);
    assert_eq!(space.runs("report"), 1);
    let none = space.pipe(&["run", "report@*"]).code(3);
    assert!(none.err.contains("report@*"), "{}", none.err);
    let unknown = space.pipe(&["run", "trian@*"]).code(3);
    assert!(unknown.err.contains("did you mean `train`?"), "{}", unknown.err);
}

#[test]
fn product_exclude_include_and_repeats() {
    let space = space();
    space.replace(
        "      single: {rate: [1e-4, 0.0002, 5e-4], length: [10, 20]}",
        "      single: {rate: [1e-4, 2e-4]}\n      product: {shell: [sh, bash]}\n      \
         exclude: [{rate: 1e-4, shell: bash}]\n      include: [{rate: 5e-4}, {length: 7, shell: sh}, {shell: bash}]",
    );
    let mut found = stages(&space, &["dev@*"]);
    found.retain(|s| s.starts_with("dev"));
    assert_eq!(
        found,
        ["dev", "dev@shell=bash", "dev@rate=0.0001", "dev@rate=0.0005", "dev@length=7"]
    );
    space.replace("single: {rate: [1e-4, 2e-4]}", "product: {rate: [1, 2], length: [1, 2]}");
    space.replace("      product: {shell: [sh, bash]}\n", "");
    space.replace("      exclude: [{rate: 1e-4, shell: bash}]\n", "");
    let mut found = stages(&space, &["train@*"]);
    found.retain(|s| s.starts_with("train"));
    assert_eq!(found.len(), 4 + 3, "{found:?}");
}

#[test]
fn sweeps_of_two_stages_are_crossed_where_they_meet() {
    let space = space();
    space.replace(
        "    inputs: {train: train}\n",
        "    inputs: {train: train}\n    matrix: {product: {shell: [sh, bash]}}\n",
    );
    let mut found = stages(&space, &["dev@*"]);
    found.retain(|s| s.starts_with("dev"));
    assert_eq!(found.len(), 8, "{found:?}");
    assert!(found.contains(&"dev@rate=0.0001,shell=bash".to_owned()), "{found:?}");
    let graph = space.pipe(&["graph", "--format", "dot"]).code(0).out;
    assert!(graph.contains("\"train@length=20\" -> \"dev@length=20,shell=bash\""), "{graph}");
    assert!(graph.contains("\"dev@length=20,shell=bash\" -> \"choose\""), "{graph}");
}

#[test]
fn exec_bit_of_a_point_is_a_change_of_what_gathers_it() {
    let space = Space::new(
        r"
params: {x: 1, mode: 644}
stages:
  make:
    kind: command
    matrix: {single: {x: [1, 2]}}
    params: {run: 'echo ${x} > $PIPE_OUTPUT_O; chmod ${mode} $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
  all:
    kind: command
    inputs: {all: {gather: make}}
    params: {run: 'ls -lR $PIPE_INPUT_ALL > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
",
    );
    space.pipe(&["run", "all"]).code(0);
    space.replace("mode: 644", "mode: 755");
    space.pipe(&["run", "make@*"]).code(0);
    let why = space.pipe(&["why", "all"]).code(0).out;
    assert!(why.contains("changed default/o, x=2/o"), "{why}");
}
