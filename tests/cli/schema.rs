//! The schema for editors accepts what runs and refuses the mistakes that a schema can see.

use std::fs;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::space::Space;

fn validator() -> Validator {
    let space = Space::new("");
    let schema: Value = serde_json::from_str(&space.pipe(&["schema"]).code(0).out).unwrap();
    assert!(jsonschema::meta::is_valid(&schema));
    jsonschema::validator_for(&schema).unwrap()
}

fn document(path: &Path) -> Value {
    pipe::yaml::parse(&fs::read_to_string(path).unwrap(), 0).unwrap().to_value()
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn pipelines(folder: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(repository(folder)).unwrap().map(|e| e.unwrap().path());
    files.filter(|f| f.extension().is_some_and(|e| e == "yaml")).collect()
}

#[test]
fn pipelines_of_this_repository_fit_the_schema() {
    let validator = validator();
    let mut files = pipelines("tests/pipelines/valid");
    files.extend(pipelines("pipelines"));
    files.push(repository("pipeline.yaml"));
    let mut checked = 0;
    for file in files {
        let document = document(&file);
        // Without the feature `stages` the binary knows the kind `command` only.
        let stages = document["stages"].as_object().unwrap().values();
        if cfg!(not(feature = "stages")) && stages.clone().any(|s| s["kind"] != "command") {
            continue;
        }
        checked += 1;
        let errors: Vec<String> = validator
            .iter_errors(&document)
            .map(|e| format!("{}: {e}", e.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{}: {errors:#?}", file.display());
    }
    assert!(checked >= 3, "{checked}");
}

#[test]
fn mistakes_do_not_fit_the_schema() {
    let validator = validator();
    for name in [
        "missing-kind",
        "stages-is-a-list",
        "unknown-kind",
        "unknown-param",
        "unknown-stage-key",
        "unknown-top-key",
        "missing-param",
    ] {
        let file = repository(&format!("tests/pipelines/invalid/{name}.yaml"));
        assert!(!validator.is_valid(&document(&file)), "{name}");
    }
}

/// The problems that an editor would show of one stage with these params.
fn of_params(validator: &Validator, kind: &str, params: Value) -> Vec<String> {
    let document = json!({"stages": {"one": {"kind": kind, "params": params}}});
    validator.iter_errors(&document).map(|e| e.to_string()).collect()
}

#[test]
fn variables_may_stand_for_any_param() {
    let validator = validator();
    for params in [
        json!({"run": "true", "nondeterministic": "${flag}", "resources": {"gpu": "${gpus}"}}),
        json!("${all}"),
        json!({"run": "true", "outputs": "${outputs}"}),
    ] {
        let errors = of_params(&validator, "command", params);
        assert!(errors.is_empty(), "{errors:?}");
    }
    for params in [
        json!({"run": "true", "nondeterministic": "yes"}),
        json!({"run": "true", "outputs": {"out": {"file": "a", "dir": "b"}}}),
        json!({"run": "true", "outputs": {"out": {"path": "a"}}}),
        json!({"run": "true", "resources": {"gpu": 1.5}}),
        json!({}),
        json!(null),
    ] {
        assert!(!of_params(&validator, "command", params.clone()).is_empty(), "{params}");
    }
    assert!(of_params(&validator, "select", json!({"metric": "a", "goal": "max"})).is_empty());
    assert!(!of_params(&validator, "select", json!({"metric": "a", "goal": "most"})).is_empty());
}

#[cfg(feature = "stages")]
#[test]
fn wrong_params_of_every_kind_are_seen_and_right_ones_are_not() {
    let validator = validator();
    let wrong = [
        ("download", json!({"source": {"path": "a", "url": "https://b/c"}})),
        ("download", json!({"source": {"hf": "a/b", "repo_type": "space"}})),
        ("download", json!({"source": {"path": "a"}, "sha256": "abc"})),
        ("subsample", json!({"format": "csv", "train": [0, 1], "test": [1, 2]})),
        ("subsample", json!({"format": "glaive", "train": [0], "test": [1, 2]})),
        ("subsample", json!({"format": "glaive", "train": [0, 1]})),
        ("template", json!({"turns": "last"})),
        ("template", json!({"manual_prompts": [{"system": "no question"}]})),
        ("tokenize-pack", json!({"max_length": 1})),
        ("tokenize-pack", json!({"pack": "best"})),
        ("train", json!({"learning_rat": 1e-4})),
        ("train", json!({"learning_rate": "fast"})),
        ("train", json!({"lora": {"rank": 8}})),
        ("train", json!({"lora": {"targets": ["qproj"]}})),
        ("train", json!({"optimizer": "sgd"})),
        ("train", json!({"betas": [0.9]})),
        ("train", json!({"device": "tpu"})),
        ("train", json!({"batch_size": 0})),
        ("evaluate", json!({"dtype": "f8"})),
        ("export", json!({"format": "gguf-q5"})),
        ("report", json!({"examples": -1})),
    ];
    for (kind, params) in wrong {
        assert!(!of_params(&validator, kind, params.clone()).is_empty(), "{kind}: {params}");
    }
    let right = [
        ("download", json!({"source": {"pypi": "a", "version": "1", "files": {"a/b": null}}})),
        ("subsample", json!({"format": "${f}", "train": ["${a}", 1], "test": "${t}", "dev": null})),
        ("template", json!(null)),
        ("tokenize-pack", json!({"max_length": "${n}", "loss_on": "response"})),
        ("train", json!({"epochs": 1.5, "max_steps": null, "spike": null, "device": "cuda:1"})),
        ("train", json!({"lora": "${lora}", "betas": ["${b}", 0.99]})),
        ("evaluate", json!({"batch_size": null, "limit": 3})),
        ("export", json!({"format": "gguf-q8_0"})),
        ("report", json!({})),
    ];
    for (kind, params) in right {
        // Inputs are not wired here, which the schema leaves to `plan`.
        let errors = of_params(&validator, kind, params.clone());
        assert!(errors.is_empty(), "{kind}: {params}: {errors:?}");
    }
}

#[cfg(feature = "stages")]
#[test]
fn every_param_is_explained() {
    let space = Space::new("");
    let schema: Value = serde_json::from_str(&space.pipe(&["schema"]).code(0).out).unwrap();
    let cases = schema["$defs"]["stage"]["allOf"].as_array().unwrap();
    assert_eq!(cases.len(), 10);
    for case in cases {
        let kind = &case["if"]["properties"]["kind"]["const"];
        let params = &case["then"]["properties"]["params"]["anyOf"][0];
        let properties = params["properties"].as_object().unwrap();
        for (name, param) in properties {
            assert!(param["description"].is_string(), "{kind}.{name}: {param:#}");
        }
    }
}
