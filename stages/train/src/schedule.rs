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
    /// Rate of the step that follows `completed` steps; the first of a warmup is zero.
    pub(crate) fn rate(&self, completed: u64) -> f64 {
        if completed < self.warmup_steps {
            return self.peak * completed as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let left = self.total_steps.saturating_sub(completed) as f64 / span;
        match self.kind {
            ScheduleKind::Linear => self.peak * left,
            ScheduleKind::Constant => self.peak,
            ScheduleKind::Cosine => {
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left)).cos())
            }
        }
    }
}

#[cfg(test)]
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
