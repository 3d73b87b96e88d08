//! The schema for editors accepts what runs and refuses the mistakes that a schema can see.

use std::fs;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use serde_json::Value;

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
