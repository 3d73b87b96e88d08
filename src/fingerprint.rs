//! Everything that makes a stage stale: the hash and its explanation come from one struct.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::{Digest, Fingerprint};

/// Version of the layout of [`Identity`].
pub const SCHEMA: u32 = 1;

/// Everything that can change a stage's outputs. Two equal identities may share outputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Kind of the stage.
    pub kind: String,
    /// Version of the kind.
    pub version: String,
    /// [`contract::Signature::identity`].
    pub params: Value,
    /// Digest of every wired input by name, local files included.
    pub inputs: BTreeMap<String, Digest>,
    /// Declared environment variables; `None` is unset, which differs from empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Option<String>>,
    /// What `pipeline.lock` pins for the stage's source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<Value>,
    /// Fingerprints of all stages upstream by name, for kinds that read their records.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub upstream: BTreeMap<String, Fingerprint>,
}

impl Identity {
    /// The hash: blake3 of the canonical JSON.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(*blake3::hash(self.canonical().as_bytes()).as_bytes())
    }

    /// [`canonical`] of its JSON, without the detour over a [`Value`]: a plan asks for it twice a
    /// stage.
    fn canonical(&self) -> String {
        let Self { schema, kind, version, params, inputs, env, lock, upstream } = self;
        let mut out = String::with_capacity(1024);
        let mut open = '{';
        let mut key = |name: &str, out: &mut String| {
            out.push(std::mem::replace(&mut open, ','));
            write_string(name, out);
            out.push(':');
        };
        if !env.is_empty() {
            key("env", &mut out);
            let value = |value: &Option<String>, out: &mut String| match value {
                Some(text) => write_string(text, out),
                None => out.push_str("null"),
            };
            write_map(env, value, &mut out);
        }
        key("inputs", &mut out);
        write_map(inputs, |digest, out| write_string(&digest.to_hex(), out), &mut out);
        key("kind", &mut out);
        write_string(kind, &mut out);
        if let Some(lock) = lock {
            key("lock", &mut out);
            write_canonical(lock, &mut out);
        }
        key("params", &mut out);
        write_canonical(params, &mut out);
        key("schema", &mut out);
        out.push_str(&schema.to_string());
        if !upstream.is_empty() {
            key("upstream", &mut out);
            write_map(upstream, |print, out| write_string(&print.to_hex(), out), &mut out);
        }
        key("version", &mut out);
        write_string(version, &mut out);
        out.push('}');
        out
    }
}

fn write_map<V>(map: &BTreeMap<String, V>, value: impl Fn(&V, &mut String), out: &mut String) {
    out.push('{');
    for (i, (key, entry)) in map.iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        write_string(key, out);
        out.push(':');
        value(entry, out);
    }
    out.push('}');
}

/// A JSON string.
fn write_string(text: &str, out: &mut String) {
    if text.bytes().all(|b| b >= b' ' && b != b'"' && b != b'\\') {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        out.push_str(&Value::from(text).to_string());
    }
}

/// JSON with sorted keys, no white space, and one spelling for every number: `1`, `1.0` and `1e0`
/// are equal.
pub fn canonical(value: &Value) -> String {
    let mut out = String::new();
    write_canonical(value, &mut out);
    out
}

fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            out.push('{');
            for (i, (key, value)) in sorted.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_string(key, out);
                out.push(':');
                write_canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, value) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(value, out);
            }
            out.push(']');
        }
        Value::Number(number) => match number.as_f64() {
            // Whole floats up to 2^53 are written as the integers they are.
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < 9.0e15 => {
                out.push_str(&(float as i64).to_string());
            }
            _ => out.push_str(&number.to_string()),
        },
        Value::String(text) => write_string(text, out),
        other => out.push_str(&other.to_string()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn identity() -> Identity {
        Identity {
            schema: SCHEMA,
            kind: "train".into(),
            version: "1".into(),
            params: json!({"r": 16, "lr": 2e-4, "targets": ["q", "v"]}),
            inputs: [("tokens".to_owned(), Digest::of(b"tokens"))].into(),
            env: BTreeMap::new(),
            lock: None,
            upstream: BTreeMap::new(),
        }
    }

    #[test]
    fn every_field_changes_the_fingerprint() {
        let base = identity();
        let fp = Fingerprint([7; 32]);
        type Change = Box<dyn Fn(&mut Identity)>;
        let changes: Vec<Change> = vec![
            Box::new(|i| i.schema += 1),
            Box::new(|i| i.kind = "evaluate".into()),
            Box::new(|i| i.version = "2".into()),
            Box::new(|i| i.params["r"] = json!(8)),
            Box::new(|i| i.params["targets"] = json!(["v", "q"])),
            Box::new(|i| i.inputs.extend([("tokens".into(), Digest::of(b"other"))])),
            Box::new(|i| i.inputs.extend([("more".into(), Digest::of(b"tokens"))])),
            Box::new(|i| i.env.extend([("A".into(), None)])),
            Box::new(|i| i.env.extend([("A".into(), Some(String::new()))])),
            Box::new(|i| i.lock = Some(json!({"revision": "x"}))),
            Box::new(move |i| i.upstream.extend([("s".into(), fp)])),
        ];
        let mut seen = vec![base.fingerprint()];
        for change in changes {
            let mut changed = base.clone();
            change(&mut changed);
            seen.push(changed.fingerprint());
        }
        let distinct: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!(distinct.len(), seen.len());
    }

    #[test]
    fn short_way_and_json_agree() {
        let mut one = identity();
        let check = |one: &Identity| {
            let value = serde_json::to_value(one).unwrap();
            assert_eq!(one.canonical(), canonical(&value));
        };
        check(&one);
        one.params =
            json!({"b": "a \"quoted\" \\ line\n\u{7f}é", "a": [1.0, null, {"y": 1, "x": 2.5}]});
        one.env.extend([("A".into(), None), ("B".into(), Some("tab\t".into()))]);
        one.lock = Some(json!({"revision": "x"}));
        one.upstream.extend([("s".into(), Fingerprint([7; 32]))]);
        check(&one);
    }

    #[test]
    fn key_order_and_spelling_of_numbers_do_not_matter() {
        let a = json!({"a": 1.0, "b": {"x": 0.0001, "y": 2}});
        let b: Value = serde_json::from_str(r#"{"b": {"y": 2.0, "x": 1e-4}, "a": 1}"#).unwrap();
        assert_eq!(canonical(&a), canonical(&b));
    }

    proptest! {
        #[test]
        fn fingerprint_survives_the_record_s_json(r in any::<i64>(), lr in any::<f64>(), key in ".*") {
            prop_assume!(lr.is_finite());
            let mut one = identity();
            one.params = json!({"r": r, "lr": lr, key: "text"});
            let text = serde_json::to_string(&one).unwrap();
            let two: Identity = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(one.fingerprint(), two.fingerprint());
        }
    }
}
