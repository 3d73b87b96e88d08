//! JSON Schema of params, from the struct that parses them: names, types, defaults and comments
//! cannot drift from what is accepted.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

/// What [`crate::StageKind::params_schema`] says of a params struct. Comments of its fields become
/// descriptions.
pub fn schema_of<P: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|s| {
        s.inline_subschemas = true;
        s.meta_schema = None;
    });
    let mut schema = Value::from(settings.into_generator().into_root_schema_for::<P>());
    tidy(&mut schema);
    if let Value::Object(whole) = &mut schema {
        // The comment on the struct is for readers of the code.
        whole.remove("description");
    }
    schema
}

/// Drops what says nothing to people: names of Rust types and sizes of integers, defaults that are
/// null, and those of structs, whose fields have their own. Comments lose their links and line breaks.
fn tidy(schema: &mut Value) {
    let Value::Object(map) = schema else {
        if let Value::Array(items) = schema {
            items.iter_mut().for_each(tidy);
        }
        return;
    };
    map.remove("title");
    map.remove("format");
    if map.contains_key("properties") || map.get("default").is_some_and(Value::is_null) {
        map.remove("default");
    }
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    for (key, value) in map.iter_mut() {
        match key.as_str() {
            // Names of params, which may be called as keywords are.
            "properties" => {
                if let Value::Object(properties) = value {
                    properties.values_mut().for_each(tidy);
                }
            }
            "default" | "const" | "enum" | "examples" => {}
            _ => tidy(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    use super::*;

    /// All of it.
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    #[allow(dead_code, reason = "only its schema is looked at")]
    struct Outer {
        /// How many,
        /// and why.
        #[schemars(range(min = 1))]
        title: u32,
        how: How,
        inner: Inner,
    }

    #[derive(Default, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        rate: Option<f64>,
    }

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum How {
        /// In haste.
        Fast,
    }

    impl Default for Outer {
        fn default() -> Self {
            Self { title: 2, how: How::Fast, inner: Inner::default() }
        }
    }

    #[test]
    fn comments_defaults_and_limits_are_in_the_schema() {
        assert_eq!(
            schema_of::<Outer>(),
            json!({
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "title": {
                        "type": "integer", "minimum": 1, "default": 2,
                        "description": "How many, and why.",
                    },
                    "how": {
                        "default": "fast",
                        "oneOf": [{"type": "string", "const": "fast", "description": "In haste."}],
                    },
                    "inner": {
                        "type": "object",
                        "additionalProperties": false,
                        "properties": {"rate": {"type": ["number", "null"]}},
                    },
                },
            })
        );
    }
}
