//! Names of the points of a sweep: `train@learning_rate=0.0001,max_steps=200`.
//!
//! A name holds what differs from the plain stage, sorted by param, every value in its one
//! canonical spelling. The point that differs in nothing has the plain stage's own name.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::fingerprint::canonical;
use crate::yaml::{self, Tree};

/// Longest spelling of one value inside a name; longer ones are cut and told apart by a hash.
const LONGEST_VALUE: usize = 32;
/// Longest name in bytes: names are also names of files.
const LONGEST_NAME: usize = 160;
/// What the plain point is called where points stand beside each other.
const PLAIN: &str = "default";

/// Param values by the name of the param.
pub type PointParams = BTreeMap<String, Value>;

/// The points that `matrix` gives the stages of a pipeline.
#[derive(Clone, Debug, Default)]
pub struct Points {
    /// Value of every swept param in the plain pipeline.
    pub(super) plain: PointParams,
    /// Names of the points by plain stage, in the order of the matrix.
    pub(super) of: BTreeMap<String, Vec<String>>,
    /// All swept params that count for a point, the unchanged ones included, by stage name.
    pub(super) params: BTreeMap<String, PointParams>,
}

impl Points {
    /// Names of the points of a plain stage; empty where no matrix reaches it.
    pub fn of(&self, stage: &str) -> &[String] {
        self.of.get(stage).map_or(&[], Vec::as_slice)
    }

    /// Swept params of a point (the plain one too), the unchanged ones included.
    pub fn params(&self, stage: &str) -> Option<&PointParams> {
        self.params.get(stage)
    }

    /// The stages that a name stands for: `STAGE@*` for all points of a stage, else the one name
    /// in its canonical spelling. Whether such a stage exists is the caller's question.
    pub fn resolve(&self, name: &str) -> Vec<String> {
        let Some((base, changes)) = name.split_once('@') else { return vec![name.to_owned()] };
        if changes == "*" {
            return self.of(base).to_vec();
        }
        if self.params.contains_key(name) {
            return vec![name.to_owned()];
        }
        let mut parsed = PointParams::new();
        for change in changes.split(',') {
            let Some((param, text)) = change.split_once('=') else { return vec![name.to_owned()] };
            let value = match yaml::parse(text, 0) {
                Ok(node) => node.to_value(),
                Err(_) => Value::String(text.to_owned()),
            };
            if self.plain.get(param).map(canonical) != Some(canonical(&value)) {
                parsed.insert(param.to_owned(), value);
            }
        }
        vec![point_name(base, &parsed)]
    }
}

/// The plain stage of a point.
pub fn plain_stage(name: &str) -> &str {
    name.split_once('@').map_or(name, |(base, _)| base)
}

/// What tells a point from the others of its stage: `learning_rate=0.0001`, or `default`.
pub fn point_label(name: &str) -> &str {
    name.split_once('@').map_or(PLAIN, |(_, changes)| changes)
}

/// Name of the point of `stage` that differs from the plain one in `changes`.
pub(super) fn point_name(stage: &str, changes: &PointParams) -> String {
    if changes.is_empty() {
        return stage.to_owned();
    }
    let spelled = changes.iter().map(|(param, value)| format!("{param}={}", spelling(value)));
    let name = format!("{stage}@{}", spelled.collect::<Vec<_>>().join(","));
    if name.len() <= LONGEST_NAME {
        return name;
    }
    let hash = blake3::hash(name.as_bytes()).to_hex();
    format!("{stage}@{}", &hash[..16])
}

/// A value as part of a name: its canonical text where that is short and plain, else a readable
/// rest of it with a hash.
fn spelling(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        other => canonical(other),
    };
    let safe = |c: char| c.is_alphanumeric() || "-_.+".contains(c);
    // Text such as "8" must not look like the number 8.
    let reads_back = match value {
        Value::String(text) => yaml::parse(text, 0)
            .is_ok_and(|node| matches!(node.tree, Tree::Text(read) if read == *text)),
        _ => true,
    };
    if reads_back && !text.is_empty() && text.len() <= LONGEST_VALUE && text.chars().all(safe) {
        return text;
    }
    let words = text.split(|c: char| !safe(c)).filter(|w| !w.is_empty());
    let readable: String = words.collect::<Vec<_>>().join("_").chars().take(24).collect();
    let hash = blake3::hash(canonical(value).as_bytes()).to_hex();
    format!("{readable}~{}", &hash[..8])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn name(value: Value) -> String {
        point_name("s", &[("p".to_owned(), value)].into())
    }

    #[test]
    fn equal_values_have_one_name_and_different_ones_two() {
        assert_eq!(name(json!(1e-4)), "s@p=0.0001");
        assert_eq!(name(json!(200.0)), name(json!(200)));
        assert_eq!(name(json!("linear")), "s@p=linear");
        assert_ne!(name(json!("8")), name(json!(8)));
        assert_ne!(name(json!(["q", "v"])), name(json!(["qv"])));
        assert!(name(json!("../../x y")).chars().all(|c| c != '/' && c != ' '));
        assert!(name(json!("x".repeat(5000))).len() < 60);
    }

    #[test]
    fn a_name_is_understood_in_any_spelling_and_order() {
        let points = Points {
            plain: [("a".to_owned(), json!(2e-4)), ("b".to_owned(), json!(1))].into(),
            ..Points::default()
        };
        assert_eq!(points.resolve("s@b=3.0,a=1e-4"), ["s@a=0.0001,b=3"]);
        assert_eq!(points.resolve("s@a=0.0002,b=1"), ["s"]);
        assert_eq!(points.resolve("s"), ["s"]);
    }
}
