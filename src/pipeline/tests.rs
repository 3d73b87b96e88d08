//! The shipped `pipeline.yaml` without its kinds: what `tuning` expands to.

#![allow(clippy::unwrap_used, reason = "tests")]

use contract::{
    Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError, StageKind,
};

use proptest::prelude::*;

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

    fn params_schema(&self) -> Value {
        serde_json::json!({})
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

/// A stage and everything upstream of it, without names.
fn meaning(pipeline: &Pipeline, stage: &str) -> String {
    let stage = pipeline.stage(stage).unwrap();
    let inputs = stage.inputs.iter().map(|(name, input)| match &input.from {
        InputRef::Output { stage, output } => {
            format!("{name}: ({}).{output}", meaning(pipeline, stage))
        }
        other => format!("{name}: {other:?}"),
    });
    let inputs: Vec<String> = inputs.collect();
    format!(
        "{} {} {inputs:?}",
        stage.kind,
        crate::fingerprint::canonical(&stage.signature.identity)
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    /// A point is the pipeline with its changes `--set`, whatever the order of the changes.
    #[test]
    fn a_point_is_the_pipeline_with_its_changes_set(
        steps in prop::sample::subsequence(vec![60_u32, 120, 200], 1..=3),
        rates in prop::sample::subsequence(vec![1e-4, 2e-4, 5e-4], 1..=3),
        lengths in prop::sample::subsequence(vec![1024_u32, 2048, 4096], 1..=3),
        ranks in prop::sample::subsequence(vec![8_u32, 16], 1..=2),
    ) {
        let from = SHIPPED.find("      single:").unwrap();
        let to = SHIPPED[from..].find("    params:").unwrap() + from;
        let text = format!(
            "{}      product: {{max_steps: {steps:?}, learning_rate: {rates:?}, max_length: {lengths:?}, lora.r: {ranks:?}}}\n{}",
            &SHIPPED[..from], &SHIPPED[to..]
        );
        let swept = load(&text, &[]);
        let points = swept.points.of("dev-eval");
        prop_assert_eq!(points.len(), steps.len() * rates.len() * lengths.len() * ranks.len());
        for point in points {
            let changes = point.split_once('@').map_or("", |(_, changes)| changes);
            let sets: Vec<String> = changes
                .split(',')
                .filter(|c| !c.is_empty())
                .map(|c| if c.starts_with("max_length") { c.to_owned() } else { format!("train.{c}") })
                .collect();
            let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
            let set = load(SHIPPED, &sets);
            prop_assert_eq!(meaning(&swept, point), meaning(&set, "dev-eval"), "{}", point);
            prop_assert_eq!(swept.points.resolve(point), vec![point.clone()]);
        }
    }
}
