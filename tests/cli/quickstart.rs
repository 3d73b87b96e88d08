//! What a change of the quickstart reruns, planned with the real kinds and without running any:
//! each stage has a record of an execution that wrote its own fingerprint.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

use contract::StageKind;
use pipe::pipeline::{Kinds, Overrides};
use serde_json::Value;

use crate::filled::filled;
use crate::space::Space;

const QUICKSTART: &str = include_str!("../../pipelines/quickstart.yaml");
const STAGES: [&str; 9] = [
    "model",
    "dataset",
    "subsample",
    "template",
    "tokenize-pack",
    "baseline-eval",
    "train",
    "tuned-eval",
    "report",
];

fn set<'a>(stages: impl IntoIterator<Item = &'a &'a str>) -> BTreeSet<String> {
    stages.into_iter().map(|stage| (*stage).to_owned()).collect()
}

/// Publishes a record of every stage that has none.
fn fill(space: &Space, changes: &[&str]) {
    let kinds: [&dyn StageKind; 7] = [
        &stage_download::Download,
        &stage_subsample::Subsample,
        &stage_template::Template,
        &stage_tokenize_pack::TokenizePack,
        &stage_evaluate::Evaluate,
        &stage_train::Train,
        &stage_report::Report,
    ];
    let set: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
    let overrides = Overrides { profile: None, set: &set };
    filled(&space.path("pipeline.yaml"), overrides, Kinds(&kinds), &space.cache()).unwrap();
}

/// Stages that would or might run.
fn reruns(space: &Space, args: &[&str]) -> BTreeSet<String> {
    let plan = space.pipe(&[&["plan", "--json"][..], args].concat()).code(0).out;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let stages = plan["stages"].as_array().unwrap();
    assert_eq!(stages.len(), STAGES.len());
    let rerun = stages.iter().filter(|stage| stage["decision"] != "reuse");
    rerun.map(|stage| stage["stage"].as_str().unwrap().to_owned()).collect()
}

fn quickstart() -> Space {
    let space = Space::new(QUICKSTART);
    assert_eq!(reruns(&space, &[]), set(&STAGES));
    fill(&space, &[]);
    assert_eq!(reruns(&space, &[]), set(&[]));
    space
}

#[test]
fn a_filled_cache_runs_nothing() {
    let run = quickstart().pipe(&["run"]).code(0).err;
    assert!(run.contains("0 run, 9 reused"), "{run}");
}

#[test]
fn a_change_reruns_what_it_touches_and_nothing_else() {
    let space = quickstart();
    let training = ["train", "tuned-eval", "report"];
    let cases: [(&str, &[&str]); 10] = [
        ("learning_rate=2e-3", &training),
        ("max_steps=60", &training),
        ("max_length=1024", &["tokenize-pack", "train", "tuned-eval", "report"]),
        ("tokenize-pack.loss_on=all", &["tokenize-pack", "train", "tuned-eval", "report"]),
        ("tuned-eval.max_new_tokens=64", &["tuned-eval", "report"]),
        ("report.title=Another", &["report"]),
        ("subsample.seed=7", &STAGES[2..]),
        ("seed=7", &STAGES[2..]),
        ("seed=42", &[]),
        ("learning_rate=0.001", &[]),
    ];
    for (change, expected) in cases {
        assert_eq!(reruns(&space, &["--set", change]), set(expected), "{change}");
    }
    let why = space.pipe(&["why", "train", "--set", "learning_rate=2e-3"]).code(0).out;
    assert!(why.contains("learning_rate: 0.001 -> 0.002"), "{why}");
}

#[test]
fn there_and_back_hits_the_cache() {
    let space = quickstart();
    let change = ["subsample.seed=7"];
    fill(&space, &change);
    assert_eq!(reruns(&space, &["--set", change[0]]), set(&[]));
    assert_eq!(reruns(&space, &[]), set(&[]));
}

/// The same document without comments, with the keys of every map the other way round.
fn backwards(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            map.iter().rev().map(|(key, value)| (key.clone(), backwards(value))).collect()
        }
        Value::Array(list) => list.iter().map(backwards).collect(),
        other => other.clone(),
    }
}

#[test]
fn comments_key_order_touch_and_another_folder_rerun_nothing() {
    let space = quickstart();
    space.write("pipeline.yaml", &QUICKSTART.replace('\n', "\n# why\n"));
    assert_eq!(reruns(&space, &[]), set(&[]));
    let document = pipe::yaml::parse(QUICKSTART, 0).unwrap().to_value();
    let text = backwards(&document).to_string();
    assert!(text.find("\"report\"").unwrap() < text.find("\"kind\":\"download\"").unwrap());
    space.write("pipeline.yaml", &text);
    assert_eq!(reruns(&space, &[]), set(&[]));
    touch(&space.path("pipeline.yaml"));
    assert_eq!(reruns(&space, &[]), set(&[]));
    let clone = Space::new(QUICKSTART);
    let cache = space.cache();
    assert_eq!(reruns(&clone, &["--cache", cache.to_str().unwrap()]), set(&[]));
}

fn touch(path: &Path) {
    let file = fs::File::options().append(true).open(path).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
}

#[test]
fn own_rows_count_by_content_alone() {
    let space = Space::new("");
    let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n";
    space.write("rows.jsonl", &row.repeat(20));
    space.pipe(&["init", "--force", "--from", "rows.jsonl"]).code(0);
    fill(&space, &[]);
    assert_eq!(reruns(&space, &[]), set(&[]));
    touch(&space.path("rows.jsonl"));
    assert_eq!(reruns(&space, &[]), set(&[]));
    let clone = Space::new(&fs::read_to_string(space.path("pipeline.yaml")).unwrap());
    clone.write("rows.jsonl", &row.repeat(20));
    let cache = space.cache();
    assert_eq!(reruns(&clone, &["--cache", cache.to_str().unwrap()]), set(&[]));
    space.write("rows.jsonl", &row.replace("\"a\"", "\"b\"").repeat(20));
    assert_eq!(reruns(&space, &[]), set(&STAGES[1..]));
}
