//! What a checkpoint holds, as bytes: everything that the next step depends on.
//!
//! Layout, little-endian: `pipe-train`, format version u32, number of steps done u64, one
//! [`LogLine`] a step (eight numbers of 8 bytes), best evaluation loss f64 (NaN for none), then f32
//! the adapter's values, those of the best adapter so far where there is one, and the optimiser's
//! states. Numbers are bits, never text: a resumed run must write the same log. Rows and dropout
//! masks follow from the step alone.

use crate::log::LogLine;
use crate::optimizer::{Optimizer, read_f32};

const MAGIC: &[u8] = b"pipe-train";
/// Changes with the layout; a checkpoint of another version is not adopted.
const FORMAT: u32 = 1;

/// A run after some of its steps.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct State {
    /// One line for each step done.
    pub(crate) log: Vec<LogLine>,
    /// The adapter.
    pub(crate) values: Vec<f32>,
    /// The best adapter so far and its evaluation loss, where the best is wanted.
    pub(crate) best: Option<(f64, Vec<f32>)>,
    /// The optimiser.
    pub(crate) optimizer: Optimizer,
}

impl State {
    /// Steps done.
    pub(crate) fn step(&self) -> u64 {
        self.log.len() as u64
    }

    /// The state as bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 * self.log.len() + 16 * self.values.len());
        out.extend_from_slice(MAGIC);
        out.extend(FORMAT.to_le_bytes());
        out.extend(self.step().to_le_bytes());
        for line in &self.log {
            out.extend(numbers(line).into_iter().flat_map(u64::to_le_bytes));
        }
        let best_loss = self.best.as_ref().map_or(f64::NAN, |(loss, _)| *loss);
        out.extend(best_loss.to_le_bytes());
        out.extend(self.values.iter().flat_map(|v| v.to_le_bytes()));
        if let Some((_, best)) = &self.best {
            out.extend(best.iter().flat_map(|v| v.to_le_bytes()));
        }
        self.optimizer.write(&mut out);
        out
    }

    /// The state in `bytes`, in the shape of `self`; `None` where they are of another run or format.
    pub(crate) fn adopt(&self, bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let (format, mut rest) = rest.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*format) != FORMAT {
            return None;
        }
        let steps = read_u64(&mut rest)?;
        let mut log = Vec::new();
        for _ in 0..steps {
            let mut line = [0; FIELDS];
            for number in &mut line {
                *number = read_u64(&mut rest)?;
            }
            log.push(from_numbers(line));
        }
        let best_loss = f64::from_bits(read_u64(&mut rest)?);
        let mut values = self.values.clone();
        read_f32(&mut values, &mut rest)?;
        let mut best = None;
        if !best_loss.is_nan() {
            let mut values = self.values.clone();
            read_f32(&mut values, &mut rest)?;
            best = Some((best_loss, values));
        }
        let mut optimizer = self.optimizer.clone();
        optimizer.read(rest)?;
        Some(Self { log, values, best, optimizer })
    }
}

/// Numbers of a log line.
const FIELDS: usize = 8;

fn numbers(line: &LogLine) -> [u64; FIELDS] {
    [
        line.step,
        line.epoch.to_bits(),
        line.loss.to_bits(),
        line.learning_rate.to_bits(),
        line.grad_norm.to_bits(),
        line.targets,
        line.tokens,
        line.eval_loss.unwrap_or(f64::NAN).to_bits(),
    ]
}

fn from_numbers([step, epoch, loss, rate, norm, targets, tokens, eval]: [u64; FIELDS]) -> LogLine {
    LogLine {
        step,
        epoch: f64::from_bits(epoch),
        loss: f64::from_bits(loss),
        learning_rate: f64::from_bits(rate),
        grad_norm: f64::from_bits(norm),
        targets,
        tokens,
        eval_loss: Some(f64::from_bits(eval)).filter(|loss| !loss.is_nan()),
    }
}

fn read_u64(bytes: &mut &[u8]) -> Option<u64> {
    let (own, rest) = bytes.split_first_chunk::<8>()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*own))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::optimizer::{AdamConfig, OptimizerKind};

    fn state(kind: OptimizerKind) -> State {
        let config = AdamConfig { kind, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };
        let optimizer = Optimizer::new(config, &[0..5000, 5000..5003]);
        State { log: vec![], values: vec![0.0; 5003], best: None, optimizer }
    }

    #[test]
    fn written_state_reads_back_exactly() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Adamw8bit] {
            let mut trained = state(kind);
            let grad: Vec<f32> = (0..5003).map(|i| (i as f32).sin()).collect();
            trained.optimizer.update(1e-2, &mut trained.values, &grad);
            trained.best = Some((0.1 + 0.2, grad));
            trained.log.push(LogLine {
                step: 1,
                epoch: 1.0 / 3.0,
                loss: 0.7,
                learning_rate: 1e-2,
                grad_norm: 50.0,
                targets: 3,
                tokens: 4,
                eval_loss: Some(0.1 + 0.2),
            });
            let bytes = trained.to_bytes();
            assert_eq!(state(kind).adopt(&bytes), Some(trained));
            for cut in [0, 5, 20, bytes.len() - 1] {
                assert_eq!(state(kind).adopt(&bytes[..cut]), None);
            }
        }
    }

    #[test]
    fn a_checkpoint_of_another_optimiser_is_not_adopted() {
        let bytes = state(OptimizerKind::Adamw).to_bytes();
        assert_eq!(state(OptimizerKind::Adamw8bit).adopt(&bytes), None);
    }
}
