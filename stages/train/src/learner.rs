//! What the training loop needs of a model: the one place where a device is chosen.
//!
//! The loop knows steps made of micro-batches; parameters, gradient and optimiser are the learner's,
//! wherever they lie. On a CPU a [`HostModel`] gives a loss and a gradient over a flat buffer.

use std::ops::Range;
use std::path::Path;

#[cfg(feature = "cuda")]
mod gpu;
mod host;
#[cfg(feature = "cuda")]
mod scaler;
mod start;
#[cfg(feature = "cuda")]
mod ways;

use contract::{Reporter, StageError};
use model::{Adapter, DropoutKey, Init, Loss, MicroBatch, Model, ModelConfig};
use serde_json::Value;

use crate::params::Params;

#[cfg(feature = "cuda")]
pub(crate) use gpu::CudaLearner;
pub(crate) use host::{HostLearner, HostModel};

/// Tokens of the longest that a run will meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Longest {
    /// Of all micro-batches.
    pub(crate) batch: usize,
    /// Of all packed rows.
    pub(crate) row: usize,
    /// Of the sequences inside them.
    pub(crate) sequence: usize,
}

/// A model in training: its parameters, their gradient and the optimiser.
pub(crate) trait Learner {
    /// Makes ready for micro-batches of up to that many tokens.
    fn prepare(&mut self, _longest: Longest, _reporter: &mut Reporter) -> Result<(), StageError> {
        Ok(())
    }

    /// Seconds that a token takes, where that is known before training starts.
    fn seconds_per_token(&self) -> Option<f64> {
        None
    }

    /// Adds the gradient of `scale * sum of token losses` to the step's, and that sum to its loss.
    fn micro_batch(
        &mut self,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: DropoutKey,
    ) -> Result<(), StageError>;

    /// Ends the step's micro-batches: the sum of their token losses, and the gradient's global norm.
    fn gradient(&mut self) -> Result<(f64, f64), StageError>;

    /// Judges a gradient that is not finite: true where the learner had scaled the loss too far, has
    /// lowered the scale and zeroed the gradient, so that the step is to be skipped.
    fn overflowed(&mut self) -> Result<bool, StageError> {
        Ok(false)
    }

    /// Clips the gradient, moves the parameters, and zeroes the gradient.
    fn update(&mut self, learning_rate: f64) -> Result<(), StageError>;

    /// Sum of token losses, without dropout.
    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError>;

    /// The parameters.
    fn values(&self) -> Result<Vec<f32>, StageError>;

    /// Appends to `out` all that the next step depends on: parameters and the optimiser's states.
    fn write_state(&self, out: &mut Vec<u8>) -> Result<(), StageError>;

    /// Takes back what [`Learner::write_state`] wrote; false, and nothing changed, where it is of
    /// another shape or kind. The reporter hears where the steps to come may differ from those of an
    /// uninterrupted run.
    fn read_state(&mut self, bytes: &[u8], reporter: &mut Reporter) -> Result<bool, StageError>;
}

/// A learner of a decoder's adapter.
pub(crate) trait DecoderLearner: Learner {
    /// Shape of the model.
    fn config(&self) -> &ModelConfig;

    /// Backend and device, for provenance.
    fn backend(&self) -> (String, String);

    /// What it did on its own judgement and what that took, for telemetry.
    fn choices(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// Writes `values` as a PEFT folder.
    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError>;
}

/// A decoder with its adapter on the CPU, in f32.
pub(crate) struct CpuModel {
    model: Model,
    adapter: Adapter,
    /// What was taken away from the weights before training.
    subtracted: Option<Adapter>,
}

impl HostLearner<CpuModel> {
    /// Loads the model, and the adapter to start from where there is one.
    pub(crate) fn load(
        params: &Params,
        model: &Path,
        init_adapter: Option<&Path>,
    ) -> Result<Self, StageError> {
        params.device.check_cpu(params.dtype, "trains")?;
        let mut model = Model::load(model)?;
        let mut subtracted = None;
        let adapter = match init_adapter {
            Some(folder) => start::continued(params, model.load_adapter(folder)?)?,
            None if params.lora.init == Init::Pissa => {
                let adapter = Adapter::pissa(&model, &params.lora_config())?;
                model.subtract(&adapter);
                subtracted.insert(adapter).clone()
            }
            None => {
                let wanted = params.lora_config();
                let mut adapter = match params.lora.loftq_iter {
                    Some(iterations) => model.start_loftq(&wanted, iterations)?,
                    None => start::new_adapter(params, model.config())?,
                };
                if adapter.config.use_dora {
                    adapter.set_magnitudes(&model)?;
                }
                adapter
            }
        };
        Ok(Self::new(CpuModel { model, adapter, subtracted }, params))
    }
}

impl DecoderLearner for HostLearner<CpuModel> {
    fn config(&self) -> &ModelConfig {
        self.model().model.config()
    }

    fn backend(&self) -> (String, String) {
        self.model().model.backend()
    }

    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError> {
        let CpuModel { model, adapter, subtracted } = self.model();
        let adapter = Adapter { values: values.to_vec(), ..adapter.clone() };
        let whole = subtracted.as_ref().map(|start| adapter.relative_to(start, model));
        Ok(whole.transpose()?.unwrap_or(adapter).save_peft(folder, base)?)
    }
}

impl HostModel for CpuModel {
    fn values(&self) -> &[f32] {
        &self.adapter.values
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.adapter.values
    }

    fn tensors(&self) -> Vec<Range<usize>> {
        self.adapter.tensors()
    }

    fn loss_and_grad(
        &self,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: DropoutKey,
        grad: &mut [f32],
    ) -> Result<Loss, StageError> {
        let dropout = (self.adapter.config.dropout > 0.0).then_some(dropout);
        Ok(self.model.loss_and_grad(&self.adapter, batch, scale, dropout, grad)?)
    }

    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError> {
        Ok(self.model.loss(Some(&self.adapter), batch)?)
    }
}
