//! What is run although it is cached, what is not run although it is not, and what a stage sees.

use std::fs;

use serde_json::Value;

use crate::space::{DIAMOND, Ran, Space, ran};

/// Stages that a plan would run, in its order.
fn would_run(space: &Space, args: &[&str]) -> Vec<String> {
    let mut all = vec!["plan", "--json"];
    all.extend(args);
    let plan: Value = serde_json::from_str(&space.pipe(&all).code(0).out).unwrap();
    let run = |stage: &&Value| stage["decision"] == "run";
    let stages = plan["stages"].as_array().unwrap().iter().filter(run);
    stages.map(|s| s["stage"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn plan_says_what_a_run_with_the_same_wishes_does() {
    let space = Space::new(DIAMOND);
    let refused = space.pipe(&["plan", "--only", "join"]).code(2);
    assert!(refused.err.contains("`--only` keeps it from running"), "{}", refused.err);
    space.pipe(&["run"]).code(0);
    for (args, forced, runs) in [
        (&["--from", "join"][..], &["join", "last"][..], [1, 1, 2, 2]),
        (&["--from", "join", "join"], &["join"], [1, 1, 3, 2]),
        (&["--force", "--only", "left"], &["left"], [2, 1, 3, 2]),
        (&["--only", "last"], &[], [2, 1, 3, 2]),
    ] {
        assert_eq!(would_run(&space, args), forced, "{args:?}");
        let mut run = vec!["run"];
        run.extend(args);
        space.pipe(&run).code(0);
        assert_eq!(space.all_runs(), runs, "{args:?}");
    }
    space.pipe(&["plan", "--from", "nothing"]).code(2);
}

/// Runs in somebody's locale.
fn in_locale(space: &Space, args: &[&str], locale: &str) -> Ran {
    let mut command = space.command(args);
    ran(&command
        .env("LANG", locale)
        .env("LC_ALL", locale)
        .env("LC_COLLATE", locale)
        .output()
        .unwrap())
}

#[test]
fn locale_of_a_user_reaches_a_stage_only_where_it_counts() {
    let space = Space::new(
        "stages:\n  seen:\n    kind: command\n    params: {run: 'env | grep -E \"^(LANG|LC_)\" | sort > $PIPE_OUTPUT_OUT; printf \"b\\nB\\na\\n\" | sort >> $PIPE_OUTPUT_OUT', outputs: {out: {file: seen}}}\n",
    );
    let seen = |locale: &str| {
        in_locale(&space, &["run"], locale).code(0);
        in_locale(&space, &["outputs", "seen", "--to", "kept", "--force"], locale).code(0);
        fs::read_to_string(space.path("kept/seen")).unwrap()
    };
    assert_eq!(seen("en_US.UTF-8"), "LANG=C.UTF-8\nB\na\nb\n");
    in_locale(&space, &["plan", "--check"], "C").code(0);

    space.replace("    params", "    env: [LC_ALL]\n    params");
    assert_eq!(seen("C"), "LANG=C.UTF-8\nLC_ALL=C\nB\na\nb\n");
    in_locale(&space, &["plan", "--check"], "de_DE.UTF-8").code(6);

    space.replace("env: [LC_ALL]", "env: {LANG: fr_FR.UTF-8}");
    let french = seen("C");
    assert!(french.starts_with("LANG=fr_FR.UTF-8\n"), "{french}");
}

/// A sweep whose points are gathered, as folders where `FORM` says so.
const GATHERED: &str = "params: {rate: 1}\nstages:\n  point:\n    kind: command\n    matrix: {single: {rate: [1, 2, 3]}}\n    params: {run: 'cd $PIPE_OUTPUT_O; echo same > same; echo ${rate} ${word} > rate', outputs: {o: {dir: made}}}\n  all:\n    kind: command\n    inputs: {points: {gather: point}}\n    params: {run: 'cat $PIPE_INPUT_POINTS/*/made/rate > $PIPE_OUTPUT_O', outputs: {o: {file: all}}}\n";

#[test]
fn why_names_the_files_of_a_gathered_input() {
    let space = Space::new(&GATHERED.replace("params: {rate: 1}", "params: {rate: 1, word: a}"));
    space.pipe(&["run"]).code(0);
    let runs = space.pipe(&["runs", "ls", "--json"]).code(0).out;
    let runs: Value = serde_json::from_str(&runs).unwrap();
    let first = runs[0]["id"].as_str().unwrap().to_owned();
    space.replace("[1, 2, 3]", "[1, 2, 4]");
    space.pipe(&["run", "point@*"]).code(0);
    let files = "(from point@*.o): added rate=4/made/rate, rate=4/made/same; \
                 removed rate=3/made/rate, rate=3/made/same";
    for args in [&["why", "all"][..], &["why", "all", "--run", &first]] {
        let why = space.pipe(args).code(0).out;
        assert!(why.contains(files), "{args:?}: {why}");
    }
    space.pipe(&["run"]).code(0);
    space.pipe(&["run", "point@*", "--set", "word=b"]).code(0);
    let why = space.pipe(&["why", "all", "--set", "word=b"]).code(0).out;
    let files = "changed default/made/rate, rate=2/made/rate, rate=4/made/rate";
    assert!(why.contains(files), "{why}");

    fs::remove_dir_all(space.cache().join("runs")).unwrap();
    let why = space.pipe(&["why", "all", "--set", "word=b"]).code(0).out;
    assert!(why.contains("its old listing is gone"), "{why}");
}
