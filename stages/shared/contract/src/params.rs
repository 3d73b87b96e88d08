//! Typed params: defaults, unknown keys and wrong types, with the path of the offending key.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// A param that does not fit, located by its path inside `params`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ParamError {
    /// Keys (or list indices) from the params' top to the offending value; empty for the whole.
    pub path: Vec<String>,
    /// What is wrong: lowercase, no full stop.
    pub message: String,
    /// Names that would have been accepted here, for a suggestion.
    pub expected: Vec<String>,
}

impl ParamError {
    /// An error at a dotted path such as `lora.r`.
    pub fn at(path: &str, message: impl Into<String>) -> Self {
        let path = path.split('.').filter(|s| !s.is_empty()).map(str::to_owned).collect();
        Self { path, message: message.into(), expected: Vec::new() }
    }
}

/// Parses params into the kind's struct (`#[serde(deny_unknown_fields, default)]`).
///
/// # Errors
/// [`ParamError`] for an unknown key, a missing key or a wrong type.
pub fn parse_params<P: DeserializeOwned>(params: &Value) -> Result<P, ParamError> {
    let empty = Value::Object(serde_json::Map::new());
    let params = if params.is_null() { &empty } else { params };
    serde_path_to_error::deserialize(params).map_err(|error| {
        let path = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                serde_path_to_error::Segment::Map { key } => Some(key.clone()),
                serde_path_to_error::Segment::Seq { index } => Some(index.to_string()),
                _ => None,
            })
            .collect();
        let message = error.inner().to_string();
        let expected = expected_names(&message);
        ParamError { path, message, expected }
    })
}

/// Names quoted after "expected" in serde's messages for unknown fields and variants.
fn expected_names(message: &str) -> Vec<String> {
    let Some((_, list)) = message.split_once("expected") else { return Vec::new() };
    if !message.starts_with("unknown") {
        return Vec::new();
    }
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Deserialize, Debug, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Outer {
        lora: Inner,
    }

    #[derive(Deserialize, Debug, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        r: u32,
    }

    #[test]
    fn unknown_key_names_its_path_and_the_accepted_names() {
        let error = parse_params::<Outer>(&json!({"lora": {"rank": 8}})).unwrap_err();
        assert_eq!(error.path, ["lora", "rank"]);
        assert_eq!(error.expected, ["r"]);
    }

    #[test]
    fn wrong_type_names_its_path() {
        let error = parse_params::<Outer>(&json!({"lora": {"r": "eight"}})).unwrap_err();
        assert_eq!(error.path, ["lora", "r"]);
        assert!(error.message.contains("expected u32"), "{}", error.message);
    }

    #[test]
    fn null_params_are_all_defaults() {
        assert_eq!(parse_params::<Outer>(&Value::Null).unwrap().lora.r, 0);
    }
}
