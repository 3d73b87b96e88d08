//! What a checkpoint holds, as bytes: everything that the next step depends on.
//!
//! Layout, little-endian: `pipe-train`, format version u32, number of steps done u64, one
//! [`LogLine`] a step (eight numbers of 8 bytes), best evaluation loss f64 (NaN for none), the number
//! of values of the best adapter so far u64 (0 for none) and those values f32; then what the learner
//! writes. Numbers are bits, never text: a resumed run must write the same log. Rows and dropout
//! masks follow from the step alone.

use crate::log::LogLine;
use crate::optimizer::read_f32;

const MAGIC: &[u8] = b"pipe-train";
/// Changes with the layout; a checkpoint of another version is not adopted.
const FORMAT: u32 = 2;

/// A run after some of its steps, the learner's part apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct State {
    /// One line for each step done.
    pub(crate) log: Vec<LogLine>,
    /// The best adapter so far and its evaluation loss, where the best is wanted.
    pub(crate) best: Option<(f64, Vec<f32>)>,
}

impl State {
    /// Steps done.
    pub(crate) fn step(&self) -> u64 {
        self.log.len() as u64
    }

    /// Steps whose gradient overflowed, so that nothing moved.
    pub(crate) fn skipped(&self) -> u64 {
        self.log.iter().filter(|line| line.is_skipped()).count() as u64
    }

    /// The state as bytes, which the learner's follow.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let (loss, values) = self.best.as_ref().map_or((f64::NAN, &[][..]), |(l, v)| (*l, v));
        let mut out = Vec::with_capacity(64 * (self.log.len() + 1) + 4 * values.len());
        out.extend_from_slice(MAGIC);
        out.extend(FORMAT.to_le_bytes());
        out.extend(self.step().to_le_bytes());
        for line in &self.log {
            out.extend(numbers(line).into_iter().flat_map(u64::to_le_bytes));
        }
        out.extend(loss.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        out
    }

    /// The state at the front of `bytes`, and the rest; `None` where they are of another format.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<(Self, &[u8])> {
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
        let loss = f64::from_bits(read_u64(&mut rest)?);
        let count = usize::try_from(read_u64(&mut rest)?).ok()?;
        if count > rest.len() / 4 {
            return None;
        }
        let mut values = vec![0.0; count];
        read_f32(&mut values, &mut rest)?;
        let best = (!loss.is_nan()).then_some((loss, values));
        Some((Self { log, best }, rest))
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

    #[test]
    fn written_state_reads_back_exactly() {
        let line = LogLine {
            step: 1,
            epoch: 1.0 / 3.0,
            loss: 0.7,
            learning_rate: 1e-2,
            grad_norm: 50.0,
            targets: 3,
            tokens: 4,
            eval_loss: Some(0.1 + 0.2),
        };
        let values: Vec<f32> = (0..5003).map(|i| (i as f32).sin()).collect();
        for best in [None, Some((0.1 + 0.2, values))] {
            let state = State { log: vec![line.clone(); 2], best };
            let mut bytes = state.to_bytes();
            let end = bytes.len();
            bytes.extend(b"the learner's");
            assert_eq!(State::from_bytes(&bytes), Some((state, &b"the learner's"[..])));
            for cut in [0, 5, 20, end - 1] {
                assert_eq!(State::from_bytes(&bytes[..cut]), None);
            }
        }
    }
}
