//! What `evaluate` makes: predictions and metrics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The model's answer to one prompt, scored. One line of `predictions.jsonl`, in prompt order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "a flat line of JSON for other tools")]
pub struct Prediction {
    /// [`crate::Prompt::id`].
    pub id: String,
    /// [`crate::Prompt::index`].
    pub index: u64,
    /// [`crate::Prompt::class`].
    pub class: String,
    /// Last user message, for people.
    pub user: String,
    /// Generated text without its end mark.
    pub output: String,
    /// The model ended its turn within the token limit.
    pub ended: bool,
    /// Generated tokens.
    pub tokens: u64,
    /// What the strict parser (the trained format only) made of it.
    pub strict: Parse,
    /// What the lenient parser (any common call format) made of it.
    pub lenient: Parse,
    /// Strict parse is a right call, or rightly no call.
    pub strict_correct: bool,
    /// Lenient parse is a right call, or rightly no call.
    pub lenient_correct: bool,
    /// Lenient parse calls if and only if it should.
    pub decision_correct: bool,
    /// Reference answer, for people.
    pub expected: String,
}

/// Calls found in a generated text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parse {
    /// The text attempts a call, well-formed or not.
    pub attempted: bool,
    /// Well-formed calls as `{"name", "arguments"}`.
    pub calls: Vec<Map<String, Value>>,
    /// Why an attempted call is not well-formed or not right; empty where it is.
    pub fault: String,
}

/// A fraction with its Wilson 95% interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Between 0 and 1.
    pub value: f64,
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
    /// Numerator.
    pub hits: u64,
    /// Denominator.
    pub of: u64,
}

/// Counts of one class of prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassCounts {
    /// Prompts of the class.
    pub prompts: u64,
    /// Answers whose lenient parse attempts a call.
    pub calls: u64,
    /// Strictly right.
    pub strict_correct: u64,
    /// Leniently right.
    pub lenient_correct: u64,
    /// Right decision.
    pub decision_correct: u64,
}

/// Two runs over the same prompts: exact McNemar test on the discordant pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paired {
    /// Metric compared, such as `strict_accuracy`.
    pub metric: String,
    /// This run minus the other, between -1 and 1.
    pub difference: f64,
    /// 95% interval of the difference (Wald for paired proportions).
    pub low: f64,
    /// Upper bound.
    pub high: f64,
    /// Prompts right here and wrong there.
    pub wins: u64,
    /// Prompts wrong here and right there.
    pub losses: u64,
    /// Two-sided exact p-value.
    pub p_value: f64,
}

/// `metrics.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Scored prompts.
    pub prompts: u64,
    /// Right call in the trained format, or rightly no call.
    pub strict_accuracy: Rate,
    /// Right call in any common format, or rightly no call.
    pub lenient_accuracy: Rate,
    /// Call or no call, lenient parser.
    pub decision_accuracy: Rate,
    /// Calls among the prompts that want none.
    pub false_call_rate: Rate,
    /// Prompts that want a call and got none.
    pub missed_call_rate: Rate,
    /// Decision accuracy of never calling, on the same prompts.
    pub never_call_baseline: f64,
    /// Decision accuracy of always calling, on the same prompts.
    pub always_call_baseline: f64,
    /// Counts by class.
    pub classes: BTreeMap<String, ClassCounts>,
    /// Answers that ran into the token limit.
    pub unended: u64,
    /// Digest of the prompts file: two runs are comparable only where it is equal.
    pub prompts_digest: String,
    /// How the answers were decoded (`max_new_tokens`, ...): likewise.
    pub decoding: Map<String, Value>,
    /// Comparison with the run given as `baseline`, one entry a metric.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub against_baseline: Vec<Paired>,
}

/// Answer to a prompt that is not scored. One line of `manual.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManualAnswer {
    /// [`crate::Prompt::id`].
    pub id: String,
    /// What the user said.
    pub user: String,
    /// Names of the tools on offer.
    pub tools: Vec<String>,
    /// Generated text without its end mark.
    pub output: String,
    /// The model ended its turn within the token limit.
    pub ended: bool,
}
