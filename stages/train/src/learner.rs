//! What the training loop needs of a model: the one place where a device is chosen.
//!
//! The loop knows a flat buffer of parameters and how to get a loss and a gradient for it; a backend
//! is an implementation of [`Learner`].

use std::ops::Range;
use std::path::Path;

#[cfg(feature = "cuda")]
mod gpu;

use contract::StageError;
use model::{Adapter, DropoutKey, Loss, MicroBatch, Model, ModelConfig};

use crate::params::{Device, Dtype, Params};

#[cfg(feature = "cuda")]
pub(crate) use gpu::CudaLearner;

/// A model with a trainable buffer.
pub(crate) trait Learner {
    /// The parameters.
    fn values(&self) -> &[f32];

    /// The parameters, for the optimiser.
    fn values_mut(&mut self) -> &mut [f32];

    /// The tensors inside the buffer, which they tile.
    fn tensors(&self) -> Vec<Range<usize>>;

    /// Makes ready for micro-batches of up to `tokens` tokens.
    fn prepare(&mut self, _tokens: usize) -> Result<(), StageError> {
        Ok(())
    }

    /// Adds the gradient of `scale * sum of token losses` to `grad`, here or when it is collected.
    fn loss_and_grad(
        &self,
        batch: MicroBatch<'_>,
        scale: f32,
        dropout: DropoutKey,
        grad: &mut [f32],
    ) -> Result<Loss, StageError>;

    /// Adds to `grad` what the micro-batches of a step left elsewhere.
    fn collect(&self, _grad: &mut [f32]) -> Result<(), StageError> {
        Ok(())
    }

    /// Sum of token losses, without dropout.
    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError>;
}

/// A learner of a decoder's adapter.
pub(crate) trait DecoderLearner: Learner {
    /// Shape of the model.
    fn config(&self) -> &ModelConfig;

    /// Backend and device, for provenance.
    fn backend(&self) -> (String, String);

    /// Most bytes of device memory held so far, where the device has its own.
    fn peak_device_bytes(&self) -> Option<u64> {
        None
    }

    /// Writes `values` as a PEFT folder.
    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError>;
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
        check_cpu(params)?;
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
}

impl DecoderLearner for CpuLearner {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn backend(&self) -> (String, String) {
        self.model.backend()
    }

    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError> {
        let adapter = Adapter { values: values.to_vec(), ..self.adapter.clone() };
        Ok(adapter.save_peft(folder, base)?)
    }
}

/// Refuses what the CPU does not do.
fn check_cpu(params: &Params) -> Result<(), StageError> {
    if let Device::Cuda(_) = params.device {
        return Err(StageError::input("this `pipe` was built without CUDA")
            .help("build it with `--features cuda`, or set `device: cpu`"));
    }
    if params.dtype == Dtype::Bf16 {
        return Err(StageError::input("the CPU trains in f32")
            .help("set `dtype: auto`, or `device: cuda` where there is a GPU"));
    }
    Ok(())
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
