//! The training loop: step, evaluate, remember, in that order, from wherever a checkpoint left off.
//!
//! A step is a function of the state before it and of the params. Time is measured but decides
//! nothing, so an interrupted run ends with the bytes of an uninterrupted one.

use contract::{Checkpoints, Progress, Reporter};
use model::DropoutKey;

use crate::error::TrainError;
use crate::guard::Guard;
use crate::learner::{Learner, Longest};
use crate::log::LogLine;
use crate::meter::Meter;
use crate::order::DataOrder;
use crate::params::{Params, Select};
use crate::rows::PackedRows;
use crate::schedule::Schedule;
use crate::state::State;

/// Everything a run works with.
pub(crate) struct Trainer<'a, L> {
    params: &'a Params,
    learner: &'a mut L,
    train: &'a PackedRows,
    eval: Option<&'a PackedRows>,
    checkpoints: &'a Checkpoints,
    order: DataOrder,
    schedule: Schedule,
    /// Step of the newest checkpoint, 0 for none.
    kept: u64,
}

/// What a finished run leaves.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The chosen adapter's values.
    pub(crate) values: Vec<f32>,
    /// One line a step.
    pub(crate) log: Vec<LogLine>,
    /// Step after which the chosen adapter was.
    pub(crate) selected_step: u64,
    /// Steps taken over from an earlier attempt.
    pub(crate) resumed_from: u64,
    /// What this attempt measured.
    pub(crate) meter: Meter,
}

impl<'a, L: Learner> Trainer<'a, L> {
    /// A run over `train`, which has rows and targets.
    pub(crate) fn new(
        params: &'a Params,
        learner: &'a mut L,
        train: &'a PackedRows,
        eval: Option<&'a PackedRows>,
        checkpoints: &'a Checkpoints,
    ) -> Self {
        let Params { batch_size, gradient_accumulation, seed, .. } = *params;
        let order = DataOrder::new(train.len(), batch_size, gradient_accumulation, seed);
        let by_epochs =
            |epochs: f64| (epochs * order.steps_per_epoch() as f64).ceil().max(1.0) as u64;
        let total_steps = params.max_steps.or(params.epochs.map(by_epochs)).unwrap_or(1);
        let schedule = Schedule {
            kind: params.schedule,
            peak: params.learning_rate,
            warmup_steps: params.warmup_steps,
            total_steps,
        };
        Self { params, learner, train, eval, checkpoints, order, schedule, kept: 0 }
    }

    /// Optimiser steps of the whole run.
    pub(crate) fn total_steps(&self) -> u64 {
        self.schedule.total_steps
    }

    /// Runs all steps that no checkpoint has done yet.
    pub(crate) fn run(mut self, reporter: &mut Reporter) -> Result<Finished, TrainError> {
        let total = self.total_steps();
        self.learner.prepare(self.longest(), reporter)?;
        let (mut state, resumed_from) = self.start(reporter)?;
        let mut guard = Guard::new(self.params.spike);
        state.log.iter().filter(|line| !line.is_skipped()).for_each(|line| {
            guard.observe(line.loss);
        });
        let (train_tokens, eval_tokens) = self.tokens_from(resumed_from);
        let mut meter = Meter::start(train_tokens, eval_tokens);
        // A checkpoint may have the learner run otherwise than it was prepared to.
        if let Some(seconds) = self.learner.seconds_per_token() {
            meter.send_estimate(seconds, "measured on a micro-batch", reporter);
        }
        while state.step() < total {
            let mut line = self.step(&state, &mut guard, &mut meter, reporter)?;
            if let Some(eval) = self.eval.filter(|_| self.evaluates_after(line.step)) {
                let loss = meter.evaluation(|| self.evaluate(eval))?;
                line.eval_loss = Some(loss);
                self.remember_best(&mut state, loss)?;
            }
            report(&line, total, &meter, reporter);
            let done = line.step;
            state.log.push(line);
            let due = done.is_multiple_of(self.params.checkpoint_steps);
            if due && done < total && !guard.is_suspicious() {
                let mut bytes = state.to_bytes();
                self.learner.write_state(&mut bytes)?;
                self.checkpoints.save(done, &bytes)?;
                self.kept = done;
            }
        }
        self.finish(state, resumed_from, meter)
    }

    fn longest(&self) -> Longest {
        let all = || std::iter::once(self.train).chain(self.eval);
        let rows = |count| all().map(|rows| rows.longest(count)).max().unwrap_or(0);
        Longest {
            batch: rows(self.params.batch_size),
            row: rows(1),
            sequence: all().map(PackedRows::longest_segment).max().unwrap_or(0),
        }
    }

    /// The newest checkpoint, which the learner takes its part of; else the beginning.
    fn start(&mut self, reporter: &mut Reporter) -> Result<(State, u64), TrainError> {
        let Some((sequence, bytes)) = self.checkpoints.latest() else {
            return Ok((State::default(), 0));
        };
        if let Some((state, rest)) = State::from_bytes(&bytes)
            && state.step() <= self.total_steps()
            && self.learner.read_state(rest, reporter)?
        {
            let step = state.step();
            reporter.log(format!("resumed after step {step}"));
            self.kept = step;
            return Ok((state, step));
        }
        reporter.warn(format!("checkpoint {sequence} is of another run: starting anew"));
        Ok((State::default(), 0))
    }

    /// One optimiser step; its log line lacks the evaluation.
    fn step(
        &mut self,
        state: &State,
        guard: &mut Guard,
        meter: &mut Meter,
        reporter: &mut Reporter,
    ) -> Result<LogLine, TrainError> {
        let before = state.step();
        // As in transformers, a skipped step reads its rows and leaves the schedule where it is.
        let learning_rate = self.schedule.rate(before - state.skipped());
        let rows = self.order.step(before);
        let all: Vec<usize> = rows.micro_batches.concat();
        let targets = self.train.targets(&all);
        let scale = 1.0 / targets.max(1) as f32;
        for (i, rows_of_batch) in rows.micro_batches.iter().enumerate() {
            let batch = self.train.batch(rows_of_batch);
            let micro_step = rows.first_micro_batch + i as u64;
            let dropout = DropoutKey { seed: self.params.seed, micro_step };
            let learner = &mut *self.learner;
            meter.micro_batch(batch.len(), reporter, || {
                learner.micro_batch(batch.view(), scale, dropout)
            })?;
        }
        let (sum, grad_norm) = meter.training(|| self.learner.gradient())?;
        let loss = sum / targets.max(1) as f64;
        let step = before + 1;
        let is_skipped = loss.is_finite()
            && !grad_norm.is_finite()
            && meter.training(|| self.learner.overflowed())?;
        if !is_skipped {
            self.judge(step, loss, grad_norm, learning_rate, guard)?;
            meter.training(|| self.learner.update(learning_rate))?;
        }
        meter.step_done();
        Ok(LogLine {
            step,
            epoch: self.order.epochs_after(step),
            loss,
            learning_rate,
            grad_norm,
            targets,
            tokens: self.train.tokens(&all),
            eval_loss: None,
        })
    }

    /// Ends a run that diverges.
    fn judge(
        &self,
        step: u64,
        loss: f64,
        grad_norm: f64,
        learning_rate: f64,
        guard: &mut Guard,
    ) -> Result<(), TrainError> {
        let kept = self.kept;
        for (what, value) in [("loss", loss), ("norm of the gradient", grad_norm)] {
            if !value.is_finite() {
                return Err(TrainError::NotFinite { what, value, step, learning_rate, kept });
            }
        }
        match guard.observe(loss) {
            Some(median) => Err(TrainError::Spike { loss, median, step, learning_rate, kept }),
            None => Ok(()),
        }
    }

    fn evaluates_after(&self, step: u64) -> bool {
        step.is_multiple_of(self.params.eval_steps) || step == self.total_steps()
    }

    /// Mean loss over all targets of `eval`.
    fn evaluate(&self, eval: &PackedRows) -> Result<f64, TrainError> {
        let rows: Vec<usize> = (0..eval.len()).collect();
        let (mut sum, mut targets) = (0.0, 0);
        for rows in rows.chunks(self.params.batch_size) {
            let loss = self.learner.loss(eval.batch(rows).view())?;
            sum += loss.sum;
            targets += loss.targets;
        }
        Ok(sum / targets.max(1) as f64)
    }

    fn remember_best(&self, state: &mut State, loss: f64) -> Result<(), TrainError> {
        let improves = state.best.as_ref().is_none_or(|(best, _)| loss < *best);
        if self.params.select == Select::Best && improves && loss.is_finite() {
            state.best = Some((loss, self.learner.values()?));
        }
        Ok(())
    }

    /// Tokens left to train on and to evaluate after `done` steps.
    fn tokens_from(&mut self, done: u64) -> (u64, u64) {
        let (total, train) = (self.total_steps(), self.train);
        let tokens = |step| train.tokens(&self.order.step(step).micro_batches.concat());
        let training = (done..total).map(tokens).sum();
        let evaluations = (done + 1..=total).filter(|s| self.evaluates_after(*s)).count() as u64;
        let per_evaluation = self.eval.map_or(0, |e| e.tokens(&(0..e.len()).collect::<Vec<_>>()));
        (training, evaluations * per_evaluation)
    }

    fn finish(
        &self,
        state: State,
        resumed_from: u64,
        meter: Meter,
    ) -> Result<Finished, TrainError> {
        let State { log, best } = state;
        let (values, selected_step) = match best {
            Some((loss, best)) => {
                let at = log.iter().find(|line| line.eval_loss == Some(loss));
                (best, at.map_or(self.total_steps(), |line| line.step))
            }
            None => (self.learner.values()?, self.total_steps()),
        };
        Ok(Finished { values, log, selected_step, resumed_from, meter })
    }
}

/// Tells the outside about a step.
fn report(line: &LogLine, total: u64, meter: &Meter, reporter: &mut Reporter) {
    let rate = meter.tokens_per_second();
    let mut values = line.values();
    values.insert("tokens_per_second".to_owned(), rate.into());
    reporter.send(&Progress::Metrics { values });
    let note = format!("loss {:.3} · {rate:.0} tok/s", line.loss);
    reporter.advance(line.step, total, "steps", note);
    if let Some(loss) = line.eval_loss {
        reporter.log(format!("evaluation loss {loss:.4} after step {}", line.step));
    }
}

#[cfg(test)]
mod skip_tests;
#[cfg(test)]
mod tests;
