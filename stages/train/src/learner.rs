//! What the training loop needs of a model: the one place where a device is chosen.
//!
//! The loop knows a flat buffer of parameters and how to get a loss and a gradient for it; a backend
//! is an implementation of [`Learner`].

use std::ops::Range;
use std::path::Path;

use contract::StageError;
use model::{Adapter, DropoutKey, Loss, MicroBatch, Model};

use crate::params::{Device, Dtype, Params};

/// A model with a trainable buffer.
pub(crate) trait Learner {
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

/// A decoder with its adapter on the CPU, in f32.
pub(crate) struct CpuLearner {
    model: Model,
    adapter: Adapter,
}

impl CpuLearner {
    /// Loads the model, and the adapter to start from where there is one.
    pub(crate) fn load(
        params: &Params,
        model: &Path,
        init_adapter: Option<&Path>,
    ) -> Result<Self, StageError> {
        match (params.device, params.dtype) {
            (Device::Auto | Device::Cpu, Dtype::Auto | Dtype::F32) => {}
        }
        let model = Model::load(model)?;
        let wanted = params.lora_config();
        let adapter = match init_adapter {
            None => model.new_adapter(&wanted, params.seed)?,
            Some(folder) => {
                let mut adapter = Adapter::load_peft(folder, &model)?;
                check_same(params, &adapter)?;
                adapter.config = wanted;
                adapter
            }
        };
        Ok(Self { model, adapter })
    }

    /// The model.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Writes `values` as a PEFT folder.
    pub(crate) fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError> {
        let adapter = Adapter { values: values.to_vec(), ..self.adapter.clone() };
        Ok(adapter.save_peft(folder, base)?)
    }
}

/// Refuses an adapter that is not of the shape the params ask for.
fn check_same(params: &Params, adapter: &Adapter) -> Result<(), StageError> {
    let sorted = |targets: &[String]| {
        let mut targets = targets.to_vec();
        targets.sort();
        targets
    };
    let (wanted, found) = (params.lora_config(), &adapter.config);
    let fault = if wanted.r != found.r {
        format!("has r {}, the params say {}", found.r, wanted.r)
    } else if (wanted.alpha - found.alpha).abs() > 1e-6 * wanted.alpha {
        format!("has alpha {}, the params say {}", found.alpha, wanted.alpha)
    } else if sorted(&wanted.targets) != sorted(&found.targets) {
        let [found, wanted] = [&found.targets, &wanted.targets].map(|t| t.join(", "));
        format!("adapts {found}; the params say {wanted}")
    } else {
        return Ok(());
    };
    let error = StageError::input(format!("the adapter of input `init_adapter` {fault}"));
    Err(error.help("set `lora` to what the adapter was trained with"))
}

impl Learner for CpuLearner {
    fn values(&self) -> &[f32] {
        &self.adapter.values
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.adapter.values
    }

    fn tensors(&self) -> Vec<Range<usize>> {
        self.adapter.factors.iter().flat_map(|f| [f.a.clone(), f.b.clone()]).collect()
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
