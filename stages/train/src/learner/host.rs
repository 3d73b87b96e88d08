//! Training a model that gives losses and gradients over a flat buffer in this process's memory.

use std::ops::Range;

use contract::{Reporter, StageError};
use model::{DropoutKey, Loss, MicroBatch};

use super::Learner;
use crate::optimizer::{Optimizer, clip, global_norm, read_f32};
use crate::params::Params;

/// A model with a trainable buffer.
pub(crate) trait HostModel {
    /// The parameters.
    fn values(&self) -> &[f32];

    /// The parameters, for the optimiser.
    fn values_mut(&mut self) -> &mut [f32];

    /// The tensors inside the buffer, which they tile.
    fn tensors(&self) -> Vec<Range<usize>>;

    /// Adds the gradient of `scale * sum of token losses` to `grad`.
    fn loss_and_grad(
        &self,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: DropoutKey,
        grad: &mut [f32],
    ) -> Result<Loss, StageError>;

    /// Sum of token losses, without dropout.
    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError>;
}

/// A model with its gradient and optimiser.
pub(crate) struct HostLearner<M> {
    model: M,
    optimizer: Optimizer,
    grad: Vec<f32>,
    /// Sum of token losses of the step so far.
    loss: f64,
    /// Global norm of the gradient.
    norm: f64,
    max_grad_norm: f64,
}

impl<M: HostModel> HostLearner<M> {
    /// A learner that has done no step.
    pub(crate) fn new(model: M, params: &Params) -> Self {
        let grad = vec![0.0; model.values().len()];
        let optimizer = Optimizer::new(params.adam(), &model.tensors());
        let max_grad_norm = params.max_grad_norm;
        Self { model, optimizer, grad, loss: 0.0, norm: 0.0, max_grad_norm }
    }

    /// The model.
    pub(crate) fn model(&self) -> &M {
        &self.model
    }
}

impl<M: HostModel> Learner for HostLearner<M> {
    fn micro_batch(
        &mut self,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: DropoutKey,
    ) -> Result<(), StageError> {
        self.loss += self.model.loss_and_grad(batch, scale, dropout, &mut self.grad)?.sum;
        Ok(())
    }

    fn gradient(&mut self) -> Result<(f64, f64), StageError> {
        self.norm = global_norm(&self.grad);
        Ok((std::mem::take(&mut self.loss), self.norm))
    }

    fn update(&mut self, learning_rate: f64) -> Result<(), StageError> {
        clip(&mut self.grad, self.norm, self.max_grad_norm);
        self.optimizer.update(learning_rate, self.model.values_mut(), &self.grad);
        self.grad.fill(0.0);
        Ok(())
    }

    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError> {
        self.model.loss(batch)
    }

    fn values(&self) -> Result<Vec<f32>, StageError> {
        Ok(self.model.values().to_vec())
    }

    fn write_state(&self, out: &mut Vec<u8>) -> Result<(), StageError> {
        out.extend(self.model.values().iter().flat_map(|v| v.to_le_bytes()));
        self.optimizer.write(out);
        Ok(())
    }

    fn read_state(&mut self, bytes: &[u8], _: &mut Reporter) -> Result<bool, StageError> {
        let (mut values, mut rest) = (self.model.values().to_vec(), bytes);
        let mut optimizer = self.optimizer.clone();
        if read_f32(&mut values, &mut rest).is_none() || optimizer.read(rest).is_none() {
            return Ok(false);
        }
        self.model.values_mut().copy_from_slice(&values);
        self.optimizer = optimizer;
        Ok(true)
    }
}
