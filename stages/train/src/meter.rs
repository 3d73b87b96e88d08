//! Rates, memory and the estimate of a run: for the eye, never for the artifacts.

use std::time::Instant;

use contract::{Progress, Reporter};

/// Cost of a token that is only evaluated, over that of one that is trained on: a forward pass is
/// one of the three products that training does a weight, and head and attention behave alike.
const EVALUATION_COST: f64 = 0.4;

/// What an attempt has measured so far.
#[derive(Clone, Debug)]
pub(crate) struct Meter {
    train_tokens_left: u64,
    eval_tokens_left: u64,
    trained_tokens: u64,
    train_seconds: f64,
    eval_seconds: f64,
    steps: u64,
    has_estimated: bool,
}

impl Meter {
    /// A meter for that many tokens to come.
    pub(crate) fn start(train_tokens: u64, eval_tokens: u64) -> Self {
        Self {
            train_tokens_left: train_tokens,
            eval_tokens_left: eval_tokens,
            trained_tokens: 0,
            train_seconds: 0.0,
            eval_seconds: 0.0,
            steps: 0,
            has_estimated: false,
        }
    }

    /// Times one micro-batch; after the first says how long the run will take.
    pub(crate) fn micro_batch<T>(
        &mut self,
        tokens: usize,
        reporter: &mut Reporter,
        work: impl FnOnce() -> T,
    ) -> T {
        let start = Instant::now();
        let result = work();
        self.train_seconds += start.elapsed().as_secs_f64();
        self.trained_tokens += tokens as u64;
        if !self.has_estimated {
            let per_token = self.train_seconds / self.trained_tokens.max(1) as f64;
            self.send_estimate(per_token, "measured on one micro-batch", reporter);
        }
        result
    }

    /// Says how long the run will take where a token of training takes that many seconds.
    pub(crate) fn send_estimate(&mut self, per_token: f64, basis: &str, reporter: &mut Reporter) {
        self.has_estimated = true;
        let tokens = self.train_tokens_left as f64 + EVALUATION_COST * self.eval_tokens_left as f64;
        reporter.send(&Progress::Estimate {
            seconds: Some(tokens * per_token),
            bytes: peak_memory(),
            basis: basis.to_owned(),
        });
    }

    /// Times what else belongs to a step.
    pub(crate) fn training<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.train_seconds += start.elapsed().as_secs_f64();
        result
    }

    /// Times one evaluation.
    pub(crate) fn evaluation<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.eval_seconds += start.elapsed().as_secs_f64();
        result
    }

    /// Counts a finished step.
    pub(crate) fn step_done(&mut self) {
        self.steps += 1;
    }

    /// Tokens trained on per second of this attempt.
    pub(crate) fn tokens_per_second(&self) -> f64 {
        self.trained_tokens as f64 / self.train_seconds.max(1e-9)
    }

    /// Mean seconds of a step, evaluation apart.
    pub(crate) fn step_seconds(&self) -> f64 {
        self.train_seconds / self.steps.max(1) as f64
    }

    /// Seconds spent evaluating.
    pub(crate) fn eval_seconds(&self) -> f64 {
        self.eval_seconds
    }
}

/// The most memory this process has held, in bytes, where the system says.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
