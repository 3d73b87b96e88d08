//! Notices a run that diverges: a loss far above the running median for several steps in a row.

use crate::params::Spike;

/// Losses the median is taken of.
const WINDOW: usize = 25;
/// Losses there must be before any counts as far above them.
const LEAST: usize = 5;

/// The recent losses and the current streak.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    limits: Option<Spike>,
    recent: Vec<f64>,
    streak: u64,
}

impl Guard {
    /// A guard that has seen nothing; `None` never objects.
    pub(crate) fn new(limits: Option<Spike>) -> Self {
        Self { limits, recent: Vec::new(), streak: 0 }
    }

    /// Takes the loss of the next step. `Some(median)` when the run should end.
    pub(crate) fn observe(&mut self, loss: f64) -> Option<f64> {
        let limits = self.limits?;
        let median = self.median();
        if self.recent.len() >= LEAST && loss > limits.factor * median {
            self.streak += 1;
            return (self.streak >= limits.patience).then_some(median);
        }
        self.streak = 0;
        self.recent.push(loss);
        if self.recent.len() > WINDOW {
            self.recent.remove(0);
        }
        None
    }

    /// Whether the last loss was far above the median: not a state to keep.
    pub(crate) fn is_suspicious(&self) -> bool {
        self.streak > 0
    }

    fn median(&self) -> f64 {
        let mut sorted = self.recent.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::INFINITY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        let mut guard = Guard::new(Some(Spike { factor: 2.0, patience: 3 }));
        for loss in [1.0, 1.1, 0.9, 1.0, 1.2] {
            assert_eq!(guard.observe(loss), None);
        }
        guard
    }

    #[test]
    fn a_streak_of_high_losses_ends_the_run() {
        let mut guard = guard();
        assert_eq!(guard.observe(2.1), None);
        assert!(guard.is_suspicious());
        assert_eq!(guard.observe(2.1), None);
        assert_eq!(guard.observe(50.0), Some(1.0));
    }

    #[test]
    fn one_good_step_breaks_the_streak() {
        let mut guard = guard();
        for loss in [9.0, 9.0, 1.0, 9.0, 9.0, 1.0] {
            assert_eq!(guard.observe(loss), None);
        }
        assert!(!guard.is_suspicious());
    }

    #[test]
    fn the_first_steps_and_a_guard_that_is_off_never_object() {
        let mut early = Guard::new(Some(Spike { factor: 1.5, patience: 1 }));
        assert!([1.0, 100.0, 1e4, 1e6].into_iter().all(|l| early.observe(l).is_none()));
        let mut off = Guard::new(None);
        assert!((0..20).all(|i| off.observe(10f64.powi(i)).is_none()));
    }
}
