#![allow(clippy::unwrap_used, reason = "tests")]

use contract::StageError;
use model::{DropoutKey, Loss, MicroBatch};
use serde_json::json;

use super::tests::{checkpoints, params, rows};
use super::*;
use crate::learner::{Learner, Longest};

/// One number that moves by the rate, with gradients that overflow while the scale is above a limit.
struct Narrow {
    value: f32,
    scale: f32,
    limit: f32,
    zeroed: u64,
    /// Of a token; twice as many after a resume.
    seconds: f64,
    prepared: Option<Longest>,
}

impl Narrow {
    fn new(limit: f32) -> Self {
        Self { value: 0.0, scale: 64.0, limit, zeroed: 0, seconds: 0.5, prepared: None }
    }
}

impl Learner for Narrow {
    fn prepare(&mut self, longest: Longest, _: &mut Reporter) -> Result<(), StageError> {
        self.prepared = Some(longest);
        Ok(())
    }

    fn seconds_per_token(&self) -> Option<f64> {
        Some(self.seconds)
    }

    fn micro_batch(&mut self, _: MicroBatch<'_>, _: f32, _: DropoutKey) -> Result<(), StageError> {
        Ok(())
    }

    fn gradient(&mut self) -> Result<(f64, f64), StageError> {
        Ok((1.0, if self.scale > self.limit { f64::INFINITY } else { 2.0 }))
    }

    fn overflowed(&mut self) -> Result<bool, StageError> {
        self.scale /= 2.0;
        self.zeroed += 1;
        Ok(self.scale >= 1.0)
    }

    fn update(&mut self, learning_rate: f64) -> Result<(), StageError> {
        self.value += learning_rate as f32;
        Ok(())
    }

    fn loss(&self, _: MicroBatch<'_>) -> Result<Loss, StageError> {
        Ok(Loss { sum: 1.0, targets: 1 })
    }

    fn values(&self) -> Result<Vec<f32>, StageError> {
        Ok(vec![self.value])
    }

    fn write_state(&self, out: &mut Vec<u8>) -> Result<(), StageError> {
        out.extend(self.value.to_le_bytes().into_iter().chain(self.scale.to_le_bytes()));
        Ok(())
    }

    fn read_state(&mut self, bytes: &[u8], _: &mut Reporter) -> Result<bool, StageError> {
        let mut numbers = [0.0; 2];
        let whole = crate::optimizer::read_f32(&mut numbers, &mut &bytes[..]);
        [self.value, self.scale] = numbers;
        self.seconds *= 2.0;
        Ok(whole.is_some())
    }
}

#[test]
fn steps_that_overflow_move_nothing_and_leave_the_schedule_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (params, rows) = (params(json!({"max_steps": 8, "checkpoint_steps": 1})), rows());
    let mut learner = Narrow::new(8.0);
    let store = checkpoints(&dir.path().join("a"), &[]);
    let trainer = Trainer::new(&params, &mut learner, &rows, None, &store);
    let whole = trainer.run(&mut Reporter::silent()).unwrap();
    assert_eq!(learner.zeroed, 3);
    assert_eq!(learner.prepared, Some(Longest { batch: 12, row: 6, sequence: 6 }));
    let skipped: Vec<bool> = whole.log.iter().map(LogLine::is_skipped).collect();
    assert_eq!(skipped, [true, true, true, false, false, false, false, false]);
    let rates: Vec<f64> = whole.log.iter().map(|l| l.learning_rate).collect();
    // Warm-up of two steps, which begins with the first step that counts.
    assert_eq!(rates[..6], [0.0, 0.0, 0.0, 0.0, 0.05, 0.1]);
    assert_eq!(whole.log[0].values()["grad_norm"], json!(null));

    // The checkpoint of step 7 knows what was skipped.
    let mut learner = Narrow::new(8.0);
    let store = checkpoints(&dir.path().join("b"), &[&dir.path().join("a")]);
    let trainer = Trainer::new(&params, &mut learner, &rows, None, &store);
    let events = dir.path().join("events");
    let sink = std::fs::File::create(&events).unwrap();
    let resumed = trainer.run(&mut Reporter::new(Box::new(sink))).unwrap();
    assert_eq!(resumed.resumed_from, 7);
    assert_eq!(resumed.values, whole.values);
    assert_eq!(resumed.log.last(), whole.log.last());
    // A token takes a second as the run goes on.
    let events: Vec<Progress> = data::read_jsonl(&events).unwrap();
    let told = events.iter().find_map(|event| match event {
        Progress::Estimate { seconds, .. } => *seconds,
        _ => None,
    });
    assert_eq!(told, Some(whole.log[7].tokens as f64));
}

#[test]
fn a_gradient_that_no_smaller_scale_helps_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (params, rows) = (params(json!({})), rows());
    let mut learner = Narrow::new(0.0);
    let store = checkpoints(dir.path(), &[]);
    let trainer = Trainer::new(&params, &mut learner, &rows, None, &store);
    let error = trainer.run(&mut Reporter::silent()).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 7, .. }), "{error:?}");
}
