//! JSON Schema (draft 2020-12) of the pipeline file, for editors.
//!
//! Looser than `pipe plan`, which reports what a schema cannot say: an editor that rejects a
//! pipeline which runs would be worse than one that completes less. A kind describes its params in
//! [`contract::StageKind::params_schema`]; here is added that `${name}` may stand for any value.

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
            "variable": {
                "description": "text with the `${name}` of a variable",
                "type": "string",
                "pattern": r"\$\{",
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
    let mut params = kind.params_schema();
    let needed = params.get("required").is_some();
    or_variable(&mut params);
    if !needed && let Some(Value::Array(cases)) = params.get_mut("anyOf") {
        cases.push(json!({"type": "null"}));
    }
    let mut then = Map::from_iter([("params".to_owned(), params)]);
    if let Some(signature) = resolved {
        then.insert("inputs".to_owned(), inputs(&signature));
    }
    let mut case = json!({
        "if": {"properties": {"kind": {"const": kind.name()}}, "required": ["kind"]},
        "then": {"properties": then},
    });
    if needed {
        case["then"]["required"] = json!(["params"]);
    }
    case
}

fn inputs(signature: &Signature) -> Value {
    let named = signature.inputs.iter().map(|input| {
        let need = if input.required { "" } else { " (optional)" };
        let description = format!("{}{need}", input.help);
        (input.name.clone(), json!({"$ref": "#/$defs/input", "description": description}))
    });
    json!({"properties": named.collect::<Map<_, _>>()})
}

/// Lets text with a variable stand for a value and for every part of it.
fn or_variable(schema: &mut Value) {
    parts_or_variable(schema);
    let Value::Object(whole) = schema else { return };
    let anything =
        !["type", "anyOf", "oneOf", "enum", "const"].iter().any(|k| whole.contains_key(*k));
    let text = whole.get("type").is_some_and(|t| {
        t == "string" || t.as_array().is_some_and(|types| types.contains(&json!("string")))
    });
    if anything || text && !["enum", "pattern"].iter().any(|key| whole.contains_key(*key)) {
        return;
    }
    let (outer, inner): (Map<_, _>, Map<_, _>) = std::mem::take(whole)
        .into_iter()
        .partition(|(key, _)| ["description", "default", "examples"].contains(&key.as_str()));
    let mut cases = match <[_; 1]>::try_from(inner.into_iter().collect::<Vec<_>>()) {
        // Values with a description each.
        Ok([(key, Value::Array(cases))]) if ["anyOf", "oneOf"].contains(&key.as_str()) => cases,
        Ok([(key, value)]) => vec![json!({key: value})],
        Err(inner) => vec![Value::Object(inner.into_iter().collect())],
    };
    cases.push(json!({"$ref": "#/$defs/variable"}));
    *whole = outer;
    whole.insert("anyOf".to_owned(), Value::Array(cases));
}

fn parts_or_variable(schema: &mut Value) {
    let Value::Object(whole) = schema else { return };
    for (key, value) in whole.iter_mut() {
        match (key.as_str(), value) {
            ("properties", Value::Object(parts)) => parts.values_mut().for_each(or_variable),
            ("additionalProperties" | "items", part) => or_variable(part),
            ("prefixItems", Value::Array(parts)) => parts.iter_mut().for_each(or_variable),
            ("anyOf" | "oneOf", Value::Array(cases)) => {
                cases.iter_mut().for_each(parts_or_variable);
            }
            _ => {}
        }
    }
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
    fn a_variable_may_stand_for_any_value_and_any_part() {
        let mut schema = json!({
            "type": "object",
            "properties": {
                "rate": {"type": "number", "description": "how fast", "default": 1},
                "name": {"type": "string"},
                "how": {"oneOf": [{"const": "fast"}, {"const": "slow"}]},
                "range": {"type": "array", "items": {"type": "integer"}},
            },
        });
        or_variable(&mut schema);
        let variable = json!({"$ref": "#/$defs/variable"});
        assert_eq!(schema["anyOf"][1], variable);
        let properties = &schema["anyOf"][0]["properties"];
        assert_eq!(
            properties["rate"],
            json!({
                "description": "how fast", "default": 1,
                "anyOf": [{"type": "number"}, variable],
            })
        );
        assert_eq!(properties["name"], json!({"type": "string"}));
        assert_eq!(properties["how"]["anyOf"].as_array().map(Vec::len), Some(3));
        assert_eq!(properties["range"]["anyOf"][0]["items"]["anyOf"][1], variable);
    }
}
