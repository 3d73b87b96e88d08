//! One report for every file of `tests/pipelines/invalid`, as snapshots; every file of
//! `tests/pipelines/valid` plans.

use std::fs;
use std::path::{Path, PathBuf};

use crate::space::Space;

fn files(kind: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pipelines").join(kind);
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "yaml"));
    files.sort();
    files
}

#[test]
fn every_invalid_pipeline_is_reported_with_place_and_advice() {
    let files = files("invalid");
    assert!(files.len() >= 15, "{}", files.len());
    for file in files {
        let space = Space::new(&fs::read_to_string(&file).unwrap());
        let ran = space.pipe(&["plan"]).code(3);
        assert!(ran.err.contains("pipeline.yaml:"), "{}: {}", file.display(), ran.err);
        assert!(!space.cache().exists(), "a wrong pipeline must write nothing");
        // Which kinds there are depends on what was built, and so where their list is wrapped.
        let mut report: Vec<String> = Vec::new();
        for line in ran.err.lines() {
            let in_list = report.last().is_some_and(|last| last.ends_with("help: kinds: …"));
            match line.split_once("help: kinds:") {
                Some((before, _)) => report.push(format!("{before}help: kinds: …")),
                None if in_list && !line.trim().is_empty() => {}
                None => report.push(line.to_owned()),
            }
        }
        let name = file.file_stem().unwrap().to_str().unwrap();
        insta::assert_snapshot!(name, report.join("\n"));
    }
}

#[test]
fn every_valid_pipeline_plans() {
    for file in files("valid") {
        let space = Space::new(&fs::read_to_string(&file).unwrap());
        space.pipe(&["plan"]).code(0);
    }
}

#[test]
fn wrong_set_is_reported_in_its_own_text() {
    let space = Space::new(
        "params: {seed: 1}\nstages:\n  s:\n    kind: command\n    params: {run: 'true'}\n",
    );
    let unknown = space.pipe(&["plan", "--set", "sede=2"]).code(3);
    assert!(
        unknown.err.contains("--set:1:1") && unknown.err.contains("did you mean `seed`?"),
        "{}",
        unknown.err
    );
    let param = space.pipe(&["plan", "--set", "s.rnu=x"]).code(3);
    assert!(
        param.err.contains("--set:1:1") && param.err.contains("did you mean `run`?"),
        "{}",
        param.err
    );
    let shape = space.pipe(&["plan", "--set", "seed"]).code(3);
    assert!(shape.err.contains("path=value"), "{}", shape.err);
}

#[test]
fn missing_pipeline_says_what_to_do() {
    let space = Space::new("");
    fs::remove_file(space.path("pipeline.yaml")).unwrap();
    let ran = space.pipe(&["run"]).code(2);
    assert!(ran.err.contains("pipe init"), "{}", ran.err);
}

#[test]
fn broken_lock_file_is_located() {
    let space = Space::new("stages:\n  s:\n    kind: command\n    params: {run: 'true'}\n");
    space.write("pipeline.lock", "{\n<<<<<<< ours\n");
    let ran = space.pipe(&["plan"]).code(3);
    assert!(ran.err.contains("pipeline.lock:2:1"), "{}", ran.err);
}
