//! What programs read: events, traces, exit codes, and the page that documents them.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::space::{DIAMOND, Space};

pub(crate) fn page() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.md")).unwrap()
}

pub(crate) fn events(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Events of runs in which stages run, are reused, cut off, fail and are skipped.
pub(crate) fn many_events() -> Vec<Value> {
    let space = Space::new(DIAMOND);
    let mut all = events(&space.pipe(&["run", "--json"]).code(0).out);
    space.replace("echo ${left} >", "echo ${left}  >");
    all.extend(events(&space.pipe(&["run", "--json"]).code(0).out));
    space.replace("cat $PIPE_INPUT_A", "echo fails; exit 3; cat $PIPE_INPUT_A");
    all.extend(events(&space.pipe(&["run", "--json"]).code(4).out));
    all
}

#[test]
fn exit_codes_are_documented() {
    use pipe::exit_code::{
        BAD_PIPELINE, BUG, CACHE, INTERRUPTED, OK, REMOTE, STAGE_FAILED, USAGE, WOULD_RUN,
    };
    let codes = [OK, BUG, USAGE, BAD_PIPELINE, STAGE_FAILED, CACHE, WOULD_RUN, REMOTE, INTERRUPTED];
    let page = page();
    let rows: Vec<&str> = page.split("## Exit codes").nth(1).unwrap().lines().collect();
    let rows: Vec<&str> = rows.into_iter().filter(|l| l.starts_with("| ")).skip(1).collect();
    let listed: Vec<String> =
        rows.iter().map(|r| r.split('|').nth(1).unwrap().trim().into()).collect();
    assert_eq!(listed, codes.map(|c| c.to_string()));
}

#[test]
fn trace_has_a_span_for_each_stage_that_ran() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run", "left"]).code(0);
    space.pipe(&["run", "--trace", "trace.json"]).code(0);
    let trace = fs::read_to_string(space.path("trace.json")).unwrap();
    let trace: Value = serde_json::from_str(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let mut spans: Vec<&str> =
        events.iter().filter(|e| e["ph"] == "X").map(|e| e["name"].as_str().unwrap()).collect();
    spans.sort_unstable();
    assert_eq!(spans, ["join", "last", "right"]);
    assert!(events.iter().any(|e| e["ph"] == "i" && e["name"] == "left: reused"));
    let end = |name: &str| {
        let span = events.iter().find(|e| e["name"] == name).unwrap();
        (span["ts"].as_f64().unwrap(), span["ts"].as_f64().unwrap() + span["dur"].as_f64().unwrap())
    };
    assert!(end("join").1 <= end("last").0, "a stage starts after what it needs");
    // Found out before anything ran.
    space.pipe(&["run", "--force", "--trace", "no/such/folder.json"]).code(2);
    assert_eq!(space.all_runs(), [1, 1, 1, 1]);
}

#[test]
fn git_merges_lock_files_with_the_documented_driver() {
    let space = Space::new(DIAMOND);
    let git = |args: &[&str]| {
        let mut command = std::process::Command::new("git");
        let command = command.args(["-c", "user.name=a", "-c", "user.email=a@b.c"]).args(args);
        let ran = crate::space::ran(&command.current_dir(space.path("")).output().unwrap());
        assert_eq!(ran.code, Some(0), "{args:?}: {}{}", ran.out, ran.err);
    };
    let lock = |sources: &str| {
        let text = format!("{{\"version\": 1, \"sources\": {sources}}}\n");
        space.write("pipeline.lock", &text);
        git(&["commit", "-qam", "lock"]);
    };
    space.write("pipeline.lock", "");
    space.write(".gitattributes", "pipeline.lock merge=pipe-lock\n");
    git(&["init", "-q", "-b", "main"]);
    let driver = format!("{} lock merge %O %A %B", env!("CARGO_BIN_EXE_pipe"));
    git(&["config", "merge.pipe-lock.driver", &driver]);
    git(&["add", "."]);
    lock("{\"m\": 1}");
    git(&["checkout", "-q", "-b", "other"]);
    lock("{\"m\": 1, \"b\": 1}");
    git(&["checkout", "-q", "main"]);
    lock("{\"m\": 1, \"a\": 1}");
    git(&["merge", "-q", "other"]);
    let merged = fs::read_to_string(space.path("pipeline.lock")).unwrap();
    let merged: Value = serde_json::from_str(&merged).unwrap();
    assert_eq!(merged["sources"].to_string(), "{\"a\":1,\"b\":1,\"m\":1}");
    space.pipe(&["plan"]).code(0);
}

#[test]
fn graph_is_drawn_without_anything_else() {
    let space = Space::new(DIAMOND);
    let svg = space.pipe(&["graph", "--format", "svg", "--plan"]).code(0).out;
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{svg}");
    // The background and a box a stage; a curve an edge and the head of the arrows.
    assert_eq!((svg.matches("<rect").count(), svg.matches("<path").count()), (5, 4));
    assert_eq!(svg.matches(">would run<").count(), 2);
    assert_eq!(svg.matches(">might run<").count(), 2);
    let column = |stage: &str| {
        let before = svg.split(&format!(">{stage}</text>")).next().unwrap();
        let x = before.rsplit("<text x=\"").next().unwrap().split('"').next().unwrap();
        x.parse::<u32>().unwrap()
    };
    assert_eq!(column("left"), column("right"));
    assert!(column("right") < column("join") && column("join") < column("last"));
    let html = space.pipe(&["graph", "--format", "html"]).code(0).out;
    assert!(html.starts_with("<!doctype html>") && html.contains("<svg "), "{html}");
    assert!(!html.contains("src=") && !html.contains("href="), "{html}");
}

#[test]
fn completions_know_the_commands() {
    let space = Space::new(DIAMOND);
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = space.pipe(&["completions", shell]).code(0).out;
        assert!(script.contains("outputs") && script.contains("keep-going"), "{shell}");
    }
}

#[test]
fn logs_of_reused_stages_are_shown_again() {
    let space = Space::new(DIAMOND);
    space.replace("cat $PIPE_INPUT_A", "echo said by join; cat $PIPE_INPUT_A");
    space.pipe(&["run"]).code(0);
    let quiet = space.pipe(&["run"]).code(0).err;
    assert!(!quiet.contains("said by join"), "{quiet}");
    let replayed = space.pipe(&["run", "--logs"]).code(0).err;
    assert!(replayed.lines().any(|l| l == "join: said by join"), "{replayed}");
    // The newest log is that of a failure; what would be reused has another.
    space.replace("said by join;", "broken; exit 3;");
    space.pipe(&["run"]).code(4);
    assert!(space.pipe(&["logs", "join"]).code(0).out.contains("\nbroken\n"));
    space.replace("broken; exit 3;", "said by join;");
    let log = space.pipe(&["logs", "join"]).code(0).out;
    assert!(log.contains("\nsaid by join\n") && !log.contains("broken"), "{log}");
}
