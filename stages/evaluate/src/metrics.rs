//! Sums scored predictions up.

use std::collections::{BTreeMap, BTreeSet};

use contract::StageError;
use data::{ClassCounts, Metrics, Paired, Prediction};
use serde_json::{Map, Value};

use crate::statistics::{mcnemar, paired_difference, rate};

/// Class of prompts where a call is right; in every other class none is.
const CALL: &str = "call";

/// Metrics of all predictions, without a comparison.
pub(crate) fn summarise(
    predictions: &[Prediction],
    prompts_digest: String,
    decoding: Map<String, Value>,
) -> Metrics {
    let count = |holds: &dyn Fn(&Prediction) -> bool| {
        predictions.iter().filter(|p| holds(p)).count() as u64
    };
    let all = predictions.len() as u64;
    let wanting = count(&|p| p.class == CALL);
    let false_calls = count(&|p| p.class != CALL && p.lenient.attempted);
    let missed_calls = count(&|p| p.class == CALL && !p.lenient.attempted);
    Metrics {
        prompts: all,
        strict_accuracy: rate(count(&|p| p.strict_correct), all),
        lenient_accuracy: rate(count(&|p| p.lenient_correct), all),
        decision_accuracy: rate(count(&|p| p.decision_correct), all),
        false_call_rate: rate(false_calls, all - wanting),
        missed_call_rate: rate(missed_calls, wanting),
        never_call_baseline: rate(all - wanting, all).value,
        always_call_baseline: rate(wanting, all).value,
        classes: classes(predictions),
        unended: count(&|p| !p.ended),
        prompts_digest,
        decoding,
        against_baseline: Vec::new(),
    }
}

fn classes(predictions: &[Prediction]) -> BTreeMap<String, ClassCounts> {
    let mut classes: BTreeMap<String, ClassCounts> = BTreeMap::new();
    for prediction in predictions {
        let counts = classes.entry(prediction.class.clone()).or_default();
        counts.prompts += 1;
        counts.calls += u64::from(prediction.lenient.attempted);
        counts.strict_correct += u64::from(prediction.strict_correct);
        counts.lenient_correct += u64::from(prediction.lenient_correct);
        counts.decision_correct += u64::from(prediction.decision_correct);
    }
    classes
}

/// An earlier evaluation of the same prompts.
pub(crate) struct Baseline {
    /// Its `metrics.json`.
    pub(crate) metrics: Metrics,
    /// Its `predictions.jsonl`.
    pub(crate) predictions: Vec<Prediction>,
}

impl Baseline {
    /// Refuses a baseline that answered other prompts or decoded otherwise.
    pub(crate) fn check(
        &self,
        prompts_digest: &str,
        decoding: &Map<String, Value>,
    ) -> Result<(), StageError> {
        if self.metrics.prompts_digest != prompts_digest {
            let message = "the baseline answered other prompts than this evaluation";
            return Err(StageError::input(message)
                .help("wire both evaluations to the same `prompts` and run again"));
        }
        if &self.metrics.decoding != decoding {
            let keys: BTreeSet<&String> =
                decoding.keys().chain(self.metrics.decoding.keys()).collect();
            let differing: Vec<String> = keys
                .into_iter()
                .filter(|key| decoding.get(*key) != self.metrics.decoding.get(*key))
                .map(|key| {
                    let shown = |map: &Map<String, Value>| map.get(key).map(Value::to_string);
                    let [ours, theirs] = [decoding, &self.metrics.decoding].map(shown);
                    let unset = || "unset".to_owned();
                    format!(
                        "`{key}` is {} here and {} there",
                        ours.unwrap_or_else(unset),
                        theirs.unwrap_or_else(unset)
                    )
                })
                .collect();
            let differing = differing.join(", ");
            let message = format!("the baseline decoded otherwise: {differing}");
            return Err(StageError::input(message)
                .help("give both evaluations the same params and run again"));
        }
        Ok(())
    }

    /// Mean length of its answers in tokens, the end mark included.
    pub(crate) fn mean_tokens(&self) -> Option<f64> {
        let tokens: u64 = self.predictions.iter().map(|p| p.tokens + u64::from(p.ended)).sum();
        let count = self.predictions.len();
        (count > 0).then(|| tokens as f64 / count as f64)
    }

    /// Compares prompt by prompt.
    ///
    /// # Errors
    /// [`StageError`] where the baseline's predictions are not of the same prompts.
    pub(crate) fn compare(&self, predictions: &[Prediction]) -> Result<Vec<Paired>, StageError> {
        let theirs = &self.predictions;
        let is_paired = theirs.len() == predictions.len()
            && theirs.iter().zip(predictions).all(|(a, b)| a.id == b.id);
        if !is_paired {
            let message = "`baseline_predictions` does not belong to `baseline_metrics`: its prompts are others";
            return Err(StageError::input(message).help("wire both to the same stage"));
        }
        type Criterion = fn(&Prediction) -> bool;
        let criteria: [(&str, Criterion); 3] = [
            ("strict_accuracy", |p| p.strict_correct),
            ("lenient_accuracy", |p| p.lenient_correct),
            ("decision_accuracy", |p| p.decision_correct),
        ];
        let compared = criteria.into_iter().map(|(metric, is_right)| {
            let pairs = || theirs.iter().zip(predictions).map(|(a, b)| (is_right(a), is_right(b)));
            let wins = pairs().filter(|pair| *pair == (false, true)).count() as u64;
            let losses = pairs().filter(|pair| *pair == (true, false)).count() as u64;
            let (difference, low, high) = paired_difference(wins, losses, predictions.len() as u64);
            let metric = metric.to_owned();
            Paired { metric, difference, low, high, wins, losses, p_value: mcnemar(wins, losses) }
        });
        Ok(compared.collect())
    }
}

#[cfg(test)]
#[path = "metrics/tests.rs"]
mod tests;
