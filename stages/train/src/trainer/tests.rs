#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::float_cmp, reason = "equal bits are the claim")]

use std::cell::Cell;
use std::ops::Range;
use std::path::Path;

use contract::{Fault, Request, StageError};
use data::TokenFile;
use model::{Loss, MicroBatch};
use serde_json::{Value, json};

use super::*;
use crate::learner::{HostLearner, HostModel};

/// A model whose loss is known by hand: target `t` costs `(w[t % n] - t)² / 2`, plus noise of the
/// dropout key in the gradient alone.
struct Parabola {
    values: Vec<f32>,
    noisy: bool,
    calls: Cell<u64>,
    /// Calls of `loss_and_grad` after which it fails, as a killed process would.
    dies_after: u64,
    /// Calls from which losses are multiplied by this.
    blows_up: Option<(u64, f64)>,
}

impl Parabola {
    fn new() -> Self {
        let values = (0..7).map(|i| i as f32 / 3.0 - 1.0).collect();
        Self { values, noisy: false, calls: Cell::new(0), dies_after: u64::MAX, blows_up: None }
    }
}

impl HostModel for Parabola {
    fn values(&self) -> &[f32] {
        &self.values
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    fn tensors(&self) -> Vec<Range<usize>> {
        vec![0..3, 3..7]
    }

    fn loss_and_grad(
        &self,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: DropoutKey,
        grad: &mut [f32],
    ) -> Result<Loss, StageError> {
        let call = self.calls.get();
        self.calls.set(call + 1);
        if call >= self.dies_after {
            return Err(StageError::internal("killed"));
        }
        let noise = if self.noisy { (dropout.seed ^ (dropout.micro_step * 31)) % 5 } else { 0 };
        for target in batch.targets.iter().filter(|t| **t >= 0) {
            let at = *target as usize % 7;
            grad[at] += scale * (self.values[at] - *target as f32 + noise as f32 / 10.0);
        }
        let mut loss = self.loss(batch)?;
        if let Some((_, factor)) = self.blows_up.filter(|(from, _)| call >= *from) {
            loss.sum *= factor;
        }
        Ok(loss)
    }

    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError> {
        let mut loss = Loss::default();
        for target in batch.targets.iter().filter(|t| **t >= 0) {
            let off = self.values[*target as usize % 7] - *target as f32;
            loss.sum += f64::from(off * off / 2.0);
            loss.targets += 1;
        }
        Ok(loss)
    }
}

/// Eleven rows of three to six tokens between 0 and 6.
pub(super) fn rows() -> PackedRows {
    let mut file = TokenFile { cu_seqlens: vec![0], row_offsets: vec![0], ..TokenFile::default() };
    for row in 0..11 {
        let length = 3 + row % 4;
        file.tokens.extend((0..length).map(|i| (i * 5 + row * 3) % 7));
        file.label_mask.extend((0..length).map(|i| u8::from(i != 2)));
        file.cu_seqlens.push(file.tokens.len() as i32);
        file.row_offsets.push(file.tokens.len() as i32);
    }
    PackedRows::new(file)
}

pub(super) fn params(extra: Value) -> Params {
    let mut all = json!({
        "max_steps": 17, "learning_rate": 0.1, "warmup_steps": 2, "eval_steps": 4,
        "checkpoint_steps": 3, "select": "best", "gradient_accumulation": 3,
    });
    let (Value::Object(all_map), Value::Object(extra)) = (&mut all, extra) else { unreachable!() };
    all_map.extend(extra);
    Params::parse(&all).unwrap()
}

pub(super) fn checkpoints(own: &Path, earlier: &[&Path]) -> Checkpoints {
    let request = fixtures::request(&crate::Train, &json!({}), &[], own);
    let earlier_scratch = earlier.iter().map(|p| (*p).to_owned()).collect();
    Checkpoints::of(&Request { scratch: own.to_owned(), earlier_scratch, ..request })
}

fn run(
    params: &Params,
    model: Parabola,
    checkpoints: &Checkpoints,
) -> Result<Finished, TrainError> {
    let rows = rows();
    let mut learner = HostLearner::new(model, params);
    let trainer = Trainer::new(params, &mut learner, &rows, Some(&rows), checkpoints);
    trainer.run(&mut Reporter::silent())
}

#[test]
fn a_run_killed_at_any_micro_batch_ends_with_the_bytes_of_an_uninterrupted_one() {
    for optimizer in ["adamw", "adamw_8bit"] {
        let params = params(json!({"optimizer": optimizer}));
        let dir = tempfile::tempdir().unwrap();
        let learner = || Parabola { noisy: true, ..Parabola::new() };
        let whole = run(&params, learner(), &checkpoints(&dir.path().join("w"), &[])).unwrap();
        assert_eq!(whole.resumed_from, 0);
        let calls = 17 / 2 * 6 + 3;
        for dies_after in 0..calls {
            let [a, b] = ["a", "b"].map(|n| dir.path().join(format!("{n}{dies_after}")));
            let killed = Parabola { dies_after, ..learner() };
            run(&params, killed, &checkpoints(&a, &[])).unwrap_err();
            let resumed = run(&params, learner(), &checkpoints(&b, &[&a])).unwrap();
            assert_eq!(resumed.resumed_from, dies_after / 3 / 3 * 3, "{dies_after}");
            assert_eq!(resumed.log, whole.log);
            assert_eq!(resumed.values, whole.values);
            assert_eq!(resumed.selected_step, whole.selected_step);
        }
    }
}

#[test]
fn the_log_follows_the_schedule_and_weighs_every_target_the_same() {
    let params = params(json!({"max_steps": 3, "select": "last"}));
    let dir = tempfile::tempdir().unwrap();
    let finished = run(&params, Parabola::new(), &checkpoints(dir.path(), &[])).unwrap();
    let rates: Vec<f64> = finished.log.iter().map(|l| l.learning_rate).collect();
    assert_eq!(rates, [0.0, 0.05, 0.1]);
    let rows = rows();
    let mut order = DataOrder::new(11, 2, 3, 42);
    let all: Vec<usize> = order.step(0).micro_batches.concat();
    // The rate of the first step is zero, so both first losses are those of the initial values.
    let mut grad = vec![0.0; 7];
    let key = DropoutKey { seed: 42, micro_step: 0 };
    let expected = Parabola::new().loss_and_grad(rows.batch(&all).view(), 1.0, key, &mut grad);
    let expected = expected.unwrap();
    let line = &finished.log[0];
    assert_eq!(line.targets, expected.targets);
    assert!((line.loss - expected.sum / expected.targets as f64).abs() < 1e-6);
    let norm = grad.iter().map(|g| (g / expected.targets as f32).powi(2)).sum::<f32>().sqrt();
    assert!((line.grad_norm - f64::from(norm)).abs() < 1e-5);
    assert_eq!(finished.log[1].epoch, 1.0);
    assert!(finished.log[2].eval_loss.is_some() && finished.log[1].eval_loss.is_none());
}

#[test]
fn training_lowers_the_loss_and_best_is_the_lowest_evaluation() {
    let params = params(json!({"max_steps": 40, "schedule": "constant", "learning_rate": 0.9}));
    let dir = tempfile::tempdir().unwrap();
    let finished = run(&params, Parabola::new(), &checkpoints(dir.path(), &[])).unwrap();
    let evaluations: Vec<(u64, f64)> =
        finished.log.iter().filter_map(|l| Some((l.step, l.eval_loss?))).collect();
    assert_eq!(evaluations.len(), 10);
    let best = evaluations.iter().map(|(_, l)| *l).fold(f64::MAX, f64::min);
    assert!(best < finished.log[0].loss / 10.0);
    let first = evaluations.iter().find(|(_, l)| *l == best).unwrap();
    assert_eq!(finished.selected_step, first.0);
    let chosen = Parabola { values: finished.values, ..Parabola::new() };
    let all = rows().batch(&(0..11).collect::<Vec<_>>());
    let loss = chosen.loss(all.view()).unwrap();
    assert!((loss.sum / loss.targets as f64 - best).abs() < 1e-5);
}

#[test]
fn epochs_give_the_number_of_steps() {
    let dir = tempfile::tempdir().unwrap();
    let params = params(json!({"max_steps": null, "epochs": 1.5}));
    let finished = run(&params, Parabola::new(), &checkpoints(dir.path(), &[])).unwrap();
    assert_eq!(finished.log.len(), 3);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let learner = Parabola { blows_up: Some((24, f64::NAN)), ..Parabola::new() };
    let store = checkpoints(dir.path(), &[]);
    let error: StageError = run(&params(json!({})), learner, &store).unwrap_err().into();
    assert_eq!(error.fault, Fault::Input);
    assert_eq!(
        error.message,
        "the loss became NaN at step 9: the run diverged and nothing was published"
    );
    let help = error.help.unwrap();
    assert!(help.contains("lower `learning_rate`") && help.contains("of step 6"), "{help}");
    assert_eq!(store.latest().unwrap().0, 6);
}

#[test]
fn a_spike_stops_the_run_and_no_checkpoint_is_made_inside_it() {
    let dir = tempfile::tempdir().unwrap();
    // From the eleventh step on; the checkpoint of step 12 would fall into the streak.
    let learner = Parabola { blows_up: Some((30, 1e9)), ..Parabola::new() };
    let store = checkpoints(dir.path(), &[]);
    let params = params(json!({"spike": {"factor": 2.0, "patience": 4}}));
    let error = run(&params, learner, &store).unwrap_err();
    assert!(matches!(error, TrainError::Spike { step: 14, kept: 9, .. }), "{error:?}");
    assert_eq!(store.latest().unwrap().0, 9);
}

#[test]
fn a_checkpoint_of_another_run_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = checkpoints(dir.path(), &[]);
    store.save(900, b"something else").unwrap();
    let finished = run(&params(json!({})), Parabola::new(), &store).unwrap();
    assert_eq!((finished.resumed_from, finished.log.len()), (0, 17));
}

#[test]
fn states_of_another_shape_are_not_taken() {
    let mut learner = HostLearner::new(Parabola::new(), &params(json!({})));
    let mut bytes = Vec::new();
    learner.write_state(&mut bytes).unwrap();
    let mut takes = |bytes: &[u8]| learner.read_state(bytes, &mut Reporter::silent()).unwrap();
    assert!(takes(&bytes));
    assert!(!takes(&bytes[1..]));
    bytes.push(0);
    assert!(!takes(&bytes));
}

#[test]
fn the_estimate_comes_before_the_first_step_and_every_step_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let (params, rows) = (params(json!({})), rows());
    let path = dir.path().join("events");
    let sink = std::fs::File::create(&path).unwrap();
    let store = checkpoints(&dir.path().join("s"), &[]);
    let mut learner = HostLearner::new(Parabola::new(), &params);
    let trainer = Trainer::new(&params, &mut learner, &rows, Some(&rows), &store);
    trainer.run(&mut Reporter::new(Box::new(sink))).unwrap();
    let events: Vec<Progress> = data::read_jsonl(&path).unwrap();
    assert!(matches!(events[0], Progress::Estimate { seconds: Some(_), .. }));
    let done: Vec<u64> = events
        .iter()
        .filter_map(|e| match e {
            Progress::Advance { done, total: 17, .. } => Some(*done),
            _ => None,
        })
        .collect();
    assert_eq!(done, (1..=17).collect::<Vec<_>>());
}
