//! A decoder with its adapter on an NVIDIA GPU.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::Path;

use checkpoint::{ModelConfig, ModelFolder};
use contract::{Fault, StageError};
use cuda::{Activations, CudaError, Device as Gpu, Dtype as GpuDtype, Frozen, Lora, Step};
use model::{Adapter, DropoutKey, Loss, MicroBatch, Model};

use super::{DecoderLearner, Learner, check_same};
use crate::params::{self, Device, Dtype, Params};

/// A decoder with its adapter on a GPU; the masters are mirrored here, for the optimiser.
pub(crate) struct CudaLearner {
    adapter: Adapter,
    config: ModelConfig,
    activations: params::Activations,
    /// Before the device, since buffers must go first.
    step: Option<Step>,
    lora: RefCell<Lora>,
    frozen: Frozen,
    gpu: Gpu,
    /// The masters here are newer than those on the device.
    is_stale: Cell<bool>,
}

/// A GPU's failure as the user's.
fn stage_error(error: CudaError) -> StageError {
    let fault = match &error {
        CudaError::Library { .. } => Fault::Environment,
        CudaError::Memory { .. } => Fault::Memory,
        CudaError::Input(_) => Fault::Input,
        _ => Fault::Internal,
    };
    let help = error.help();
    let plain = StageError::new(fault, error.to_string());
    match help {
        Some(help) => plain.help(help),
        None => plain,
    }
}

impl CudaLearner {
    /// Whether there is a GPU that this program can use.
    pub(crate) fn is_available() -> bool {
        Gpu::open(0, GpuDtype::F32).is_ok()
    }

    /// Loads the model, and the adapter to start from where there is one.
    pub(crate) fn load(
        params: &Params,
        folder: &Path,
        init_adapter: Option<&Path>,
    ) -> Result<Self, StageError> {
        if params.lora.dropout > 0.0 {
            return Err(StageError::input("`lora.dropout` is not available on a GPU yet")
                .help("set it to 0, or set `device: cpu`"));
        }
        let ordinal = if let Device::Cuda(ordinal) = params.device { ordinal } else { 0 };
        let dtype = match params.dtype {
            Dtype::F32 => GpuDtype::F32,
            Dtype::Auto | Dtype::Bf16 => GpuDtype::Bf16,
        };
        let mut gpu = Gpu::open(ordinal, dtype).map_err(stage_error)?;
        if params.dtype == Dtype::Auto && !gpu.has_bf16() {
            gpu = Gpu::open(ordinal, GpuDtype::F32).map_err(stage_error)?;
        } else if dtype == GpuDtype::Bf16 && !gpu.has_bf16() {
            return Err(StageError::input(format!("{} has no bf16", gpu.name()))
                .help("set `dtype: f32`, which is slower"));
        }
        let config = ModelConfig::read(&ModelFolder::open(folder)?)?;
        let wanted = params.lora_config();
        let adapter = match init_adapter {
            None => Adapter::fresh(&config, &wanted, params.seed)?,
            Some(init) => {
                let mut adapter = Adapter::load_peft(init, &Model::load(folder)?)?;
                check_same(params, &adapter)?;
                adapter.config = wanted;
                adapter
            }
        };
        let frozen = Frozen::load(&gpu, folder).map_err(stage_error)?;
        let lora = Lora::new(&gpu, &config, &adapter).map_err(stage_error)?;
        Ok(Self {
            adapter,
            config,
            activations: params.activations,
            step: None,
            lora: RefCell::new(lora),
            frozen,
            gpu,
            is_stale: Cell::new(false),
        })
    }

    /// The step, with the newest masters on the device.
    fn ready(&self) -> Result<&Step, StageError> {
        if self.is_stale.replace(false) {
            let mut lora = self.lora.borrow_mut();
            lora.write_values(&self.gpu, &self.adapter.values).map_err(stage_error)?;
        }
        self.step.as_ref().ok_or_else(|| StageError::internal("the GPU step was not prepared"))
    }
}

impl DecoderLearner for CudaLearner {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn backend(&self) -> (String, String) {
        ("cuda".to_owned(), self.gpu.name())
    }

    fn peak_device_bytes(&self) -> Option<u64> {
        Some(self.gpu.peak_bytes())
    }

    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError> {
        let adapter = Adapter { values: values.to_vec(), ..self.adapter.clone() };
        Ok(adapter.save_peft(folder, base)?)
    }
}

impl Learner for CudaLearner {
    fn values(&self) -> &[f32] {
        &self.adapter.values
    }

    fn values_mut(&mut self) -> &mut [f32] {
        self.is_stale.set(true);
        &mut self.adapter.values
    }

    fn tensors(&self) -> Vec<Range<usize>> {
        self.adapter.factors.iter().flat_map(|f| [f.a.clone(), f.b.clone()]).collect()
    }

    fn prepare(&mut self, tokens: usize) -> Result<(), StageError> {
        let lora = self.lora.borrow();
        let make = |activations| Step::new(&self.gpu, &self.frozen, &lora, tokens, activations);
        let step = match self.activations {
            params::Activations::Keep => make(Activations::Keep),
            params::Activations::Recompute => make(Activations::Recompute),
            params::Activations::Auto => match make(Activations::Keep) {
                Err(CudaError::Memory { .. }) => make(Activations::Recompute),
                other => other,
            },
        };
        self.step = Some(step.map_err(stage_error)?);
        Ok(())
    }

    fn loss_and_grad(
        &self,
        batch: MicroBatch<'_>,
        scale: f32,
        _dropout: DropoutKey,
        _grad: &mut [f32],
    ) -> Result<Loss, StageError> {
        let step = self.ready()?;
        let lora = self.lora.borrow();
        step.run(&self.gpu, &self.frozen, &lora, batch, scale).map_err(stage_error)?;
        let sum = step.take_loss(&self.gpu).map_err(stage_error)?;
        Ok(Loss { sum, targets: targets(batch) })
    }

    fn collect(&self, grad: &mut [f32]) -> Result<(), StageError> {
        let lora = self.lora.borrow();
        let own = lora.read_gradient(&self.gpu).map_err(stage_error)?;
        grad.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        lora.zero_grad(&self.gpu).map_err(stage_error)
    }

    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError> {
        let step = self.ready()?;
        let lora = self.lora.borrow();
        step.loss(&self.gpu, &self.frozen, &lora, batch).map_err(stage_error)?;
        let sum = step.take_loss(&self.gpu).map_err(stage_error)?;
        Ok(Loss { sum, targets: targets(batch) })
    }
}

fn targets(batch: MicroBatch<'_>) -> u64 {
    batch.targets.iter().filter(|t| **t != -100).count() as u64
}
