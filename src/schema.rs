//! JSON Schema (draft 2020-12) of the pipeline file, for editors.
//!
//! Looser than `pipe plan`, which reports what a schema cannot say: an editor that rejects a
//! pipeline which runs would be worse than one that completes less. A kind describes its params in
//! [`contract::StageKind::params_schema`]; for one that does not, names and types are taken from
//! its defaults.

use contract::{Signature, StageKind};
use serde_json::{Map, Value, json};

use crate::pipeline::{Kinds, STAGE_KEYS, TOP_KEYS};

/// The schema for a binary that knows these kinds. `example` gives params for a kind that has no
/// complete defaults.
pub fn of(kinds: Kinds<'_>, example: impl Fn(&str) -> Value) -> Value {
    let described: Vec<Value> = kinds
        .0
        .iter()
        .map(|kind| json!({"const": kind.name(), "description": kind.summary()}))
        .collect();
    let stage_keys = STAGE_KEYS.iter().map(|key| {
        let schema = if *key == "kind" { json!({"oneOf": described}) } else { stage_key(key) };
        ((*key).to_owned(), schema)
    });
    let top_keys = TOP_KEYS.iter().map(|key| ((*key).to_owned(), top_key(key)));
    let cases: Vec<Value> = kinds.0.iter().map(|kind| case(*kind, &example)).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pipeline",
        "type": "object",
        "required": ["stages"],
        "properties": top_keys.collect::<Map<_, _>>(),
        "additionalProperties": false,
        "$defs": {
            "stage": {
                "type": "object",
                "required": ["kind"],
                "properties": stage_keys.collect::<Map<_, _>>(),
                "additionalProperties": false,
                "allOf": cases,
            },
            "input": {
                "description": "STAGE.OUTPUT (STAGE alone: its first output), or {path: FILE}",
                "type": ["string", "object"],
                "properties": {"path": {
                    "type": "string",
                    "description": "file or folder, relative to the pipeline file",
                }},
            },
        },
    })
}

fn top_key(key: &str) -> Value {
    match key {
        "name" => json!({"type": "string", "description": "default: the stem of the file's name"}),
        "description" => json!({"type": "string"}),
        "params" => json!({
            "type": "object",
            "description": "variables, used as ${name} in stages; `--set name=value` changes one",
        }),
        "targets" => json!({
            "type": "object",
            "description": "names for lists of stages or other targets; `default` is what a run makes",
            "additionalProperties": {"type": ["array", "string"], "items": {"type": "string"}},
        }),
        "stages" => json!({
            "type": "object",
            "description": "stages by name; the order does not matter",
            "additionalProperties": {"$ref": "#/$defs/stage"},
        }),
        "remote" => json!({
            "type": "object",
            "description": "a shared cache: url, and who reads and writes it",
            "properties": {
                "url": {"type": "string"},
                "read": {"enum": ["never", "ci", "always"]},
                "write": {"enum": ["never", "ci", "always"]},
                "sign": {"type": "string", "description": "file of the key that signs records"},
                "trusted_keys": {"type": "array", "items": {"type": "string"}},
            },
        }),
        "profiles" => json!({
            "type": "object",
            "description": "named sets of changes; `--profile name` takes one",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "description": {"type": "string"},
                    "params": {
                        "type": "object",
                        "description": "variables, or STAGE.PARAM, as `--set` takes them",
                    },
                    "cache": {"type": "string", "description": "folder, relative to this file"},
                    "remote": {"type": "object", "description": "keys of `remote` that it replaces"},
                    "jobs": {"type": "integer", "minimum": 1, "description": "stages that may run at the same time"},
                },
            },
        }),
        _ => json!({}),
    }
}

fn stage_key(key: &str) -> Value {
    match key {
        "description" => json!({"type": "string"}),
        "params" => json!({"description": "what the kind takes"}),
        "inputs" => json!({
            "type": "object",
            "additionalProperties": {"$ref": "#/$defs/input"},
        }),
        "env" => json!({
            "type": ["array", "object"],
            "description": "environment variables that count: names, or names with values",
            "items": {"type": "string"},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        }),
        "matrix" => json!({
            "type": "object",
            "description": "a sweep: params (or variables) and their values",
            "properties": {
                "single": {"type": "object", "additionalProperties": {"type": ["array", "string"]},
                    "description": "one change at a time, beside the default"},
                "product": {"type": "object", "additionalProperties": {"type": ["array", "string"]},
                    "description": "every combination"},
                "include": {"type": "array", "items": {"type": "object"}},
                "exclude": {"type": "array", "items": {"type": "object"}},
            },
        }),
        "pass_env" => json!({
            "type": ["array", "string"],
            "description": "environment variables passed on and stored nowhere; `*` at the end matches any rest",
            "items": {"type": "string"},
        }),
        "require" => json!({
            "type": "object",
            "description": "what the provenance of the artifacts must hold, such as backend: cuda",
        }),
        _ => json!({}),
    }
}

/// What a stage of one kind may hold.
fn case(kind: &dyn StageKind, example: &impl Fn(&str) -> Value) -> Value {
    let resolved = kind.resolve(&Value::Null).or_else(|_| kind.resolve(&example(kind.name()))).ok();
    let params = kind
        .params_schema()
        .or_else(|| Some(derived(&resolved.as_ref()?.params, false)))
        .unwrap_or_else(|| json!({}));
    let mut then = Map::from_iter([("params".to_owned(), params)]);
    if let Some(signature) = resolved {
        then.insert("inputs".to_owned(), inputs(&signature));
    }
    json!({
        "if": {"properties": {"kind": {"const": kind.name()}}, "required": ["kind"]},
        "then": {"properties": then},
    })
}

fn inputs(signature: &Signature) -> Value {
    let named = signature.inputs.iter().map(|input| {
        let need = if input.required { "" } else { " (optional)" };
        let description = format!("{}{need}", input.help);
        (input.name.clone(), json!({"$ref": "#/$defs/input", "description": description}))
    });
    json!({"properties": named.collect::<Map<_, _>>()})
}

/// What can be said of a param whose default is known: text stands for a variable anywhere, and
/// `null` for the default.
fn derived(default: &Value, shown: bool) -> Value {
    let mut schema = Map::new();
    match default {
        Value::Bool(_) => {
            schema.insert("type".to_owned(), json!(["boolean", "string", "null"]));
        }
        Value::Number(_) => {
            schema.insert("type".to_owned(), json!(["number", "string", "null"]));
        }
        Value::Object(entries) => {
            let entries = entries.iter().map(|(key, value)| (key.clone(), derived(value, true)));
            schema.insert("properties".to_owned(), Value::Object(entries.collect()));
        }
        Value::Null | Value::String(_) | Value::Array(_) => {}
    }
    if shown && !default.is_object() {
        schema.insert("default".to_owned(), default.clone());
    }
    Value::Object(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_pipeline_file_is_in_the_schema() {
        let schema = of(Kinds(&[]), |_| Value::Null);
        for key in TOP_KEYS {
            assert!(schema["properties"].get(key).is_some(), "{key}");
        }
        for key in STAGE_KEYS {
            assert!(schema["$defs"]["stage"]["properties"].get(key).is_some(), "{key}");
        }
    }

    #[test]
    fn defaults_give_names_and_types() {
        let schema = derived(&json!({"lora": {"r": 16}, "name": "x", "none": null}), false);
        assert_eq!(schema["properties"]["lora"]["properties"]["r"]["type"][0], "number");
        assert_eq!(schema["properties"]["lora"]["properties"]["r"]["default"], 16);
        assert_eq!(schema["properties"]["name"], json!({"default": "x"}));
        assert_eq!(schema["properties"]["none"], json!({"default": null}));
    }
}
