//! A decoder with its adapter on an NVIDIA GPU: nothing but tokens and losses leaves the device
//! between checkpoints.

use std::path::Path;
use std::time::Instant;

use checkpoint::{ModelConfig, ModelFolder};
use contract::{Reporter, StageError};
use cuda::{
    Activations, AdamSettings, CudaError, Device as Gpu, Dtype, Frozen, Lora, Optimizer, Step,
};
use model::{Adapter, DropoutKey, Loss, MicroBatch, Model};
use serde_json::Value;

use super::scaler::LossScaler;
use super::ways::{Way, first_fit, no_room, split, ways};
use super::{DecoderLearner, Learner, Longest, start};
use crate::optimizer::{OptimizerKind, dynamic_maps};
use crate::params::{self, Params};

/// A decoder with its adapter on a GPU. Buffers go before the device, so the order of the fields
/// matters.
pub(crate) struct CudaLearner {
    adapter: Adapter,
    config: ModelConfig,
    activations: params::Activations,
    settings: AdamSettings,
    scaler: LossScaler,
    prepared: Option<Prepared>,
    lora: Lora,
    frozen: Frozen,
    gpu: Gpu,
}

/// What depends on the size of the micro-batches.
struct Prepared {
    optimizer: Optimizer,
    step: Step,
    way: Way,
    /// Weights are decoded once.
    keeps_weights: bool,
    /// Of a micro-batch of the greatest size.
    seconds: f64,
    longest: Longest,
}

impl CudaLearner {
    /// Loads the model, and the adapter to start from where there is one.
    pub(crate) fn load(
        gpu: Gpu,
        params: &Params,
        folder: &Path,
        init_adapter: Option<&Path>,
    ) -> Result<Self, StageError> {
        if params.lora.dropout > 0.0 {
            return Err(StageError::input("`lora.dropout` is not available on a GPU yet")
                .help("set it to 0, or set `device: cpu`"));
        }
        if params.lora.use_dora {
            return Err(StageError::input("`lora.use_dora` is not available on a GPU yet")
                .help("remove it, or set `device: cpu`"));
        }
        let config = ModelConfig::read(&ModelFolder::open(folder)?)?;
        let adapter = match init_adapter {
            None => start::new_adapter(params, &config)?,
            Some(init) => {
                start::continued(params, Adapter::load_peft(init, &Model::load(folder)?)?)?
            }
        };
        let frozen = Frozen::load(&gpu, folder)?;
        let lora = Lora::new(&gpu, &config, &adapter)?;
        let adam = params.adam();
        let settings = AdamSettings {
            eight_bit: adam.kind == OptimizerKind::Adamw8bit,
            betas: adam.betas,
            eps: adam.eps,
            weight_decay: adam.weight_decay,
            clip: params.max_grad_norm,
        };
        let activations = params.activations;
        let scaler = LossScaler::new(gpu.dtype() == Dtype::F16);
        let prepared = None;
        Ok(Self { adapter, config, activations, settings, scaler, prepared, lora, frozen, gpu })
    }

    /// Makes ready for the first of the ways that fits.
    fn fit(&self, ways: &[Way], longest: Longest) -> Result<Prepared, CudaError> {
        first_fit(ways, |way, is_another_left| {
            self.gpu.reset_peak();
            let prepared = self.make(way, longest)?;
            // The last way may take what there is.
            let reserve = if is_another_left { self.gpu.check_reserve() } else { Ok(()) };
            match reserve.and_then(|()| self.rehearse(&prepared)) {
                Ok(seconds) => Ok(Prepared { seconds, ..prepared }),
                Err(error) if error.is_memory() => {
                    // Work under way reads and writes what is dropped.
                    self.gpu.drain()?;
                    drop(prepared);
                    self.lora.zero_grad(&self.gpu)?;
                    Err(error)
                }
                Err(error) => Err(error),
            }
        })
    }

    /// Buffers and states for one way.
    fn make(&self, way: Way, longest: Longest) -> Result<Prepared, CudaError> {
        let Way { activations, capacity } = way;
        let mut step = Step::new(&self.gpu, &self.frozen, &self.lora, capacity, activations)?;
        let tensors = self.adapter.tensors();
        let maps = dynamic_maps();
        let spare = Some(step.spare());
        let optimizer = Optimizer::new(&self.gpu, self.settings, &tensors, &maps, spare)?;
        let keeps_weights = activations == Activations::Keep
            && step.keep_weights(&self.gpu, &self.frozen, &self.lora)?;
        Ok(Prepared { optimizer, step, way, keeps_weights, seconds: 0.0, longest })
    }

    /// Runs a micro-batch of the greatest size as often as it takes until it runs as in training, and
    /// forgets it: the first time loads what is not loaded yet, the second records. Returns the seconds
    /// of the third.
    fn rehearse(&self, prepared: &Prepared) -> Result<f64, CudaError> {
        let (capacity, config) = (prepared.way.capacity, &self.config);
        // A row holds more tokens than attention may serve at once.
        let length = prepared.longest.sequence.max(1);
        let tokens: Vec<i32> = (0..capacity).map(|i| (i % config.vocab_size) as i32).collect();
        let mut bounds: Vec<i32> = (0..capacity).step_by(length).map(|i| i as i32).collect();
        bounds.push(capacity as i32);
        let batch = MicroBatch { tokens: &tokens, cu_seqlens: &bounds, targets: &tokens };
        let mut seconds = 0.0;
        for _ in 0..3 {
            let start = Instant::now();
            prepared.step.run(&self.gpu, &self.frozen, &self.lora, batch, 0.0)?;
            prepared.step.take_loss(&self.gpu)?;
            seconds = start.elapsed().as_secs_f64();
        }
        self.lora.zero_grad(&self.gpu)?;
        Ok(seconds)
    }

    /// Has as many tokens run at once as when a checkpoint was written: sums are made in that order,
    /// and the memory that is free now must not decide the result.
    fn return_to(&mut self, wanted: Way, reporter: &mut Reporter) -> Result<(), StageError> {
        let Some(Prepared { way: own, longest, .. }) = self.prepared else { return Ok(()) };
        if own.capacity == wanted.capacity {
            return Ok(());
        }
        self.prepared = None;
        let same = ways(self.activations, wanted.capacity, wanted.capacity);
        let prepared = match self.fit(&same, longest) {
            Err(lacking) if lacking.is_memory() => {
                let smaller = ways(self.activations, own.capacity, longest.row);
                let prepared = self
                    .fit(&smaller, longest)
                    .map_err(|error| no_room(error, self.activations, longest.row))?;
                reporter.warn(format!(
                    "the checkpoint was made with {} tokens at once (activations: {}), for which \
                     there is no memory now ({lacking}): resuming with {}, so that the result may \
                     differ in its last bits from that of an uninterrupted run",
                    wanted.capacity,
                    wanted.name(),
                    prepared.way.capacity,
                ));
                prepared
            }
            fitted => fitted?,
        };
        let way = prepared.way;
        reporter.log(format!("activations: {}, {} tokens at once", way.name(), way.capacity));
        self.prepared = Some(prepared);
        Ok(())
    }

    fn prepared(&self) -> Result<&Prepared, StageError> {
        self.prepared.as_ref().ok_or_else(|| StageError::internal("the GPU step was not prepared"))
    }
}

impl DecoderLearner for CudaLearner {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn backend(&self) -> (String, String) {
        ("cuda".to_owned(), self.gpu.name())
    }

    fn choices(&self) -> Vec<(&'static str, Value)> {
        let mut choices = vec![("peak_device_bytes", self.gpu.peak_bytes().into())];
        choices.extend(self.gpu.nvml_bytes().map(|bytes| ("nvml_device_bytes", bytes.into())));
        if let Some(prepared) = &self.prepared {
            choices.push(("activations", prepared.way.name().into()));
            choices.push(("micro_batch_tokens", prepared.way.capacity.into()));
            choices.push(("weights_decoded_once", prepared.keeps_weights.into()));
        }
        choices
    }

    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError> {
        let adapter = Adapter { values: values.to_vec(), ..self.adapter.clone() };
        Ok(adapter.save_peft(folder, base)?)
    }
}

impl Learner for CudaLearner {
    fn prepare(&mut self, longest: Longest, reporter: &mut Reporter) -> Result<(), StageError> {
        let Longest { batch, row, .. } = longest;
        let prepared = self
            .fit(&ways(self.activations, batch, row), longest)
            .map_err(|error| no_room(error, self.activations, row))?;
        let Prepared { way, keeps_weights, seconds, .. } = prepared;
        self.prepared = Some(prepared);
        let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
        let rate = way.capacity as f64 / seconds;
        let weights = if keeps_weights { ", weights decoded once" } else { "" };
        let whole = self.gpu.nvml_bytes().map(|b| format!(" (NVML: {:.2} GiB)", gib(b)));
        reporter.log(format!(
            "{}: training takes {:.2} GiB of {:.1} GiB{}; activations: {}{weights}, {} tokens at \
             once, about {rate:.0} tok/s",
            self.gpu.name(),
            gib(self.gpu.peak_bytes()),
            gib(self.gpu.total_bytes()?),
            whole.unwrap_or_default(),
            way.name(),
            way.capacity,
        ));
        Ok(())
    }

    fn seconds_per_token(&self) -> Option<f64> {
        let Prepared { way, seconds, .. } = self.prepared.as_ref()?;
        Some(seconds / way.capacity as f64)
    }

    fn micro_batch(
        &mut self,
        batch: MicroBatch<'_>,
        scale: f32,
        _dropout: DropoutKey,
    ) -> Result<(), StageError> {
        let prepared = self.prepared()?;
        let scale = scale * self.scaler.scale();
        Ok(split(batch, prepared.way.capacity, |part| {
            prepared.step.run(&self.gpu, &self.frozen, &self.lora, part, scale)
        })?)
    }

    fn gradient(&mut self) -> Result<(f64, f64), StageError> {
        let Prepared { step, optimizer, .. } = self.prepared()?;
        optimizer.collect(&self.gpu, &self.lora, self.scaler.scale())?;
        let loss = step.take_loss(&self.gpu)?;
        Ok((loss, f64::from(optimizer.read_norm(&self.gpu)?)))
    }

    fn overflowed(&mut self) -> Result<bool, StageError> {
        let is_skipped = self.scaler.backs_off();
        if is_skipped {
            self.lora.zero_grad(&self.gpu)?;
        }
        Ok(is_skipped)
    }

    fn update(&mut self, learning_rate: f64) -> Result<(), StageError> {
        self.scaler.succeeded();
        let Some(prepared) = &mut self.prepared else { return Ok(()) };
        Ok(prepared.optimizer.update(&self.gpu, &self.lora, learning_rate)?)
    }

    fn loss(&self, batch: MicroBatch<'_>) -> Result<Loss, StageError> {
        let prepared = self.prepared()?;
        let run =
            |part: MicroBatch<'_>| prepared.step.loss(&self.gpu, &self.frozen, &self.lora, part);
        split(batch, prepared.way.capacity, run)?;
        let sum = prepared.step.take_loss(&self.gpu)?;
        let targets = batch.targets.iter().filter(|t| **t != -100).count() as u64;
        Ok(Loss { sum, targets })
    }

    fn values(&self) -> Result<Vec<f32>, StageError> {
        Ok(self.lora.read_values(&self.gpu)?)
    }

    fn write_state(&self, out: &mut Vec<u8>) -> Result<(), StageError> {
        let (values, prepared) = (self.values()?, self.prepared()?);
        prepared.way.write(out);
        out.extend((values.len() as u64).to_le_bytes());
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.scaler.write(out);
        Ok(prepared.optimizer.write(&self.gpu, out)?)
    }

    fn read_state(&mut self, bytes: &[u8], reporter: &mut Reporter) -> Result<bool, StageError> {
        let Some((way, bytes)) = Way::read(bytes) else { return Ok(false) };
        let mut values = vec![0.0; self.adapter.values.len()];
        let Some(mut rest) = bytes.strip_prefix(&(values.len() as u64).to_le_bytes()) else {
            return Ok(false);
        };
        let Some(()) = crate::optimizer::read_f32(&mut values, &mut rest) else { return Ok(false) };
        let Some((scaler, rest)) = self.scaler.read(rest) else { return Ok(false) };
        let Some(Prepared { optimizer, longest, .. }) = &self.prepared else { return Ok(false) };
        let is_of_this_run = (longest.row..=longest.batch).contains(&way.capacity);
        if !is_of_this_run || !optimizer.accepts(rest) {
            return Ok(false);
        }
        self.return_to(way, reporter)?;
        let Some(prepared) = &mut self.prepared else { return Ok(false) };
        prepared.optimizer.read(&self.gpu, rest)?;
        self.scaler = scaler;
        self.lora.write_values(&self.gpu, &values)?;
        Ok(true)
    }
}
