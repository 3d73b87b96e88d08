//! The loss log: one JSON line a step, nothing in it that two equal runs would write differently.

use serde::Serialize;
use serde_json::{Map, Value};

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LogLine {
    /// Step, from 1.
    pub(crate) step: u64,
    /// Passes over the rows after this step.
    pub(crate) epoch: f64,
    /// Mean loss over the step's targets in nats, before the update.
    pub(crate) loss: f64,
    /// Rate of this step's update.
    pub(crate) learning_rate: f64,
    /// Global norm of the gradient, before clipping; not finite (null in JSON) where an f16 gradient
    /// overflowed under the scale of the loss and the step was skipped.
    pub(crate) grad_norm: f64,
    /// Tokens that counted in the loss.
    pub(crate) targets: u64,
    /// Tokens read.
    pub(crate) tokens: u64,
    /// Mean loss over the targets of `eval_tokens` after the update, at the steps that evaluate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eval_loss: Option<f64>,
}

impl LogLine {
    /// Whether the gradient overflowed, so that nothing moved.
    pub(crate) fn is_skipped(&self) -> bool {
        !self.grad_norm.is_finite()
    }

    /// The line's fields, for programs that listen.
    pub(crate) fn values(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            _ => Map::new(),
        }
    }
}
