//! The shipped `pipeline.yaml` without its kinds: what `tuning` expands to.

#![allow(clippy::unwrap_used, reason = "tests")]

use contract::{
    Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError, StageKind,
};

use super::*;

/// Stands for a kind that is not built here: takes any params and inputs.
struct Fake(&'static str, &'static [&'static str]);

impl StageKind for Fake {
    fn name(&self) -> &'static str {
        self.0
    }

    fn summary(&self) -> &'static str {
        "a fake"
    }

    fn version(&self) -> String {
        "1".to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        Ok(Signature {
            params: params.clone(),
            identity: params.clone(),
            free_inputs: true,
            outputs: self.1.iter().map(|name| OutputSpec::file(name, name)).collect(),
            ..Signature::default()
        })
    }

    fn run(&self, _: &Request, _: &mut Reporter) -> Result<Outcome, StageError> {
        Err(StageError::input("a fake"))
    }
}

const KINDS: [Fake; 8] = [
    Fake("download", &["files"]),
    Fake("subsample", &["train", "test", "dev", "stats"]),
    Fake("template", &["train", "dev", "prompts", "dev_prompts", "manual", "stats"]),
    Fake("tokenize-pack", &["train", "dev", "stats"]),
    Fake("evaluate", &["metrics", "predictions", "manual"]),
    Fake("train", &["adapter", "log"]),
    Fake("select", &["choice", "chosen"]),
    Fake("report", &["html", "markdown"]),
];

fn load(text: &str, sets: &[&str]) -> Pipeline {
    let kinds: Vec<&dyn StageKind> = KINDS.iter().map(|k| k as &dyn StageKind).collect();
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    Pipeline::parse(Path::new("pipeline.yaml"), PathBuf::new(), text, &sets, Kinds(&kinds))
        .map_err(|e| e.to_string())
        .unwrap()
}

fn needed(pipeline: &Pipeline, target: &str) -> Vec<String> {
    let graph = crate::graph::StageGraph::new(pipeline);
    graph.with_upstream(&pipeline.select(&[target.to_owned()]).unwrap())
}

const SHIPPED: &str = include_str!("../../pipeline.yaml");

#[test]
fn tuning_trains_six_times_and_the_test_rows_are_read_for_the_chosen_alone() {
    let pipeline = load(SHIPPED, &[]);
    let trainings = [
        "train",
        "train@max_steps=200",
        "train@max_steps=300",
        "train@learning_rate=0.0001",
        "train@learning_rate=0.0005",
        "train@max_length=1024",
    ];
    assert_eq!(pipeline.points.of("train"), trainings);
    let tuning = needed(&pipeline, "tuning");
    let named = |prefix: &str| tuning.iter().filter(|s| s.starts_with(prefix)).count();
    assert_eq!((named("train"), named("dev-eval"), named("tokenize-pack")), (6, 6, 2));
    assert_eq!(named("template"), 1);
    let reads_test = |stage: &&String| {
        let stage = pipeline.stage(stage).unwrap();
        stage.kind == "evaluate" && format!("{:?}", stage.inputs).contains("\"prompts\" }")
    };
    let on_test: Vec<&String> = tuning.iter().filter(reads_test).collect();
    assert_eq!(on_test, ["baseline-eval", "best-eval"]);
}

#[test]
fn the_default_target_has_no_points_in_it() {
    let pipeline = load(SHIPPED, &[]);
    let stages = needed(&pipeline, "default");
    assert!(stages.iter().all(|s| !s.contains('@')), "{stages:?}");
    assert!(stages.len() == 9, "{stages:?}");
}

#[test]
fn the_default_point_moves_with_set() {
    let pipeline = load(SHIPPED, &["max_steps=300"]);
    let names = pipeline.points.of("train");
    assert!(names.contains(&"train@max_steps=120".to_owned()), "{names:?}");
    assert_eq!(names.len(), 6);
}

#[test]
fn a_copy_differs_from_the_plain_stage_in_its_change_alone() {
    let pipeline = load(SHIPPED, &[]);
    let plain = pipeline.stage("train").unwrap();
    let copy = pipeline.stage("train@max_steps=200").unwrap();
    let mut expected = plain.signature.params.clone();
    expected["max_steps"] = 200.into();
    assert_eq!((&copy.signature.params, &copy.inputs), (&expected, &plain.inputs));
    let longer = pipeline.stage("train@max_length=1024").unwrap();
    assert_eq!(longer.signature, plain.signature);
    assert!(longer.needs().any(|n| n == "tokenize-pack@max_length=1024"));
}
