//! The learning rate of every step, as transformers' `get_scheduler` computes it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Shape of the learning rate after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ScheduleKind {
    /// Straight down to zero at the last step.
    Linear,
    /// The peak throughout.
    Constant,
    /// Half a cosine wave down to zero at the last step.
    Cosine,
}

/// Learning rate by step: up from zero over the warmup, then by kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) kind: ScheduleKind,
    pub(crate) peak: f64,
    pub(crate) warmup_steps: u64,
    pub(crate) total_steps: u64,
}

impl Schedule {
    /// Rate of the step that follows `completed` steps; the first of a warmup is zero. Every
    /// operation is one that transformers does, in its order.
    pub(crate) fn rate(&self, completed: u64) -> f64 {
        self.peak * self.factor(completed as f64, self.warmup_steps as f64)
    }

    fn factor(&self, completed: f64, warmup: f64) -> f64 {
        if completed < warmup {
            return completed / warmup.max(1.0);
        }
        let total = self.total_steps as f64;
        let span = (total - warmup).max(1.0);
        match self.kind {
            ScheduleKind::Linear => ((total - completed) / span).max(0.0),
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => {
                let progress = (completed - warmup) / span;
                (0.5 * (1.0 + (std::f64::consts::PI * 0.5 * 2.0 * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
#[allow(clippy::float_cmp, reason = "equal bits are the claim")]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule { kind, peak: 2e-4, warmup_steps: 10, total_steps: 120 }
    }

    #[test]
    fn linear_rates_equal_the_assignment_run_of_transformers() {
        let s = schedule(ScheduleKind::Linear);
        let expected = [(0, 0.0), (1, 2e-5), (9, 1.8e-4), (10, 2e-4), (11, 1.981_818e-4)];
        for (completed, rate) in expected {
            assert!((s.rate(completed) - rate).abs() < 1e-9, "{completed}");
        }
        assert!((s.rate(119) - 1.818_18e-6).abs() < 1e-11);
    }

    /// `benches/fixtures/schedules.py` has transformers compute them.
    #[test]
    fn rates_are_those_of_transformers_to_the_bit() {
        let golden = include_str!("../../../tests/fixtures/schedules.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        let cases = golden.as_array().unwrap();
        assert_eq!(cases.len(), 12);
        for case in cases {
            let kind = serde_json::from_value(case["kind"].clone()).unwrap();
            let number = |key: &str| case[key].as_u64().unwrap();
            let (warmup_steps, total_steps) = (number("warmup_steps"), number("total_steps"));
            let peak = case["peak"].as_f64().unwrap();
            let s = Schedule { kind, peak, warmup_steps, total_steps };
            let rates: Vec<f64> = (0..=total_steps).map(|step| s.rate(step)).collect();
            let expected: Vec<f64> = serde_json::from_value(case["rates"].clone()).unwrap();
            if kind == ScheduleKind::Cosine {
                // The cosine is that of the platform's library.
                let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-15 * peak;
                assert!(rates.iter().zip(&expected).all(near), "{s:?}");
            } else {
                assert_eq!(rates, expected, "{s:?}");
            }
        }
    }

    #[test]
    fn cosine_is_half_way_in_the_middle_and_constant_stays() {
        let s = schedule(ScheduleKind::Cosine);
        assert!((s.rate(65) - 1e-4).abs() < 1e-12);
        assert!(s.rate(120).abs() < 1e-12);
        assert!((schedule(ScheduleKind::Constant).rate(119) - 2e-4).abs() < 1e-18);
    }

    #[test]
    fn a_warmup_longer_than_the_run_only_rises() {
        let s = Schedule { total_steps: 5, ..schedule(ScheduleKind::Linear) };
        assert!((0..4).all(|i| s.rate(i) < s.rate(i + 1)));
    }
}
