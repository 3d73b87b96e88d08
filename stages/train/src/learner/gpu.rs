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
use super::{DecoderLearner, Learner, start};
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
    activations: Activations,
    /// Tokens that run at once; longer micro-batches are split between sequences.
    capacity: usize,
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

    /// Buffers and states for micro-batches of that size.
    fn make(&self, activations: Activations, capacity: usize) -> Result<Prepared, CudaError> {
        let step = Step::new(&self.gpu, &self.frozen, &self.lora, capacity, activations)?;
        let tensors = self.adapter.tensors();
        let maps = dynamic_maps();
        let spare = Some(step.spare());
        let optimizer = Optimizer::new(&self.gpu, self.settings, &tensors, &maps, spare)?;
        Ok(Prepared { optimizer, step, activations, capacity })
    }

    /// Runs a micro-batch of the greatest size and forgets it: compiles what is not compiled yet.
    /// Returns its seconds.
    fn rehearse(&self, prepared: &Prepared, row: usize) -> Result<f64, CudaError> {
        let tokens: Vec<i32> =
            (0..prepared.capacity).map(|i| (i % self.config.vocab_size) as i32).collect();
        let mut bounds: Vec<i32> = (0..prepared.capacity).step_by(row).map(|i| i as i32).collect();
        bounds.push(prepared.capacity as i32);
        let batch = MicroBatch { tokens: &tokens, cu_seqlens: &bounds, targets: &tokens };
        let start = Instant::now();
        prepared.step.run(&self.gpu, &self.frozen, &self.lora, batch, 0.0)?;
        prepared.step.take_loss(&self.gpu)?;
        self.lora.zero_grad(&self.gpu)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn prepared(&self) -> Result<&Prepared, StageError> {
        self.prepared.as_ref().ok_or_else(|| StageError::internal("the GPU step was not prepared"))
    }
}

/// Ways to run micro-batches of `batch` tokens in rows of up to `row`, the fastest first.
fn ways(choice: params::Activations, batch: usize, row: usize) -> Vec<(Activations, usize)> {
    let activations: &[Activations] = match choice {
        params::Activations::Keep => &[Activations::Keep],
        params::Activations::Recompute => &[Activations::Recompute],
        params::Activations::Offload => &[Activations::Offload],
        params::Activations::Auto => {
            &[Activations::Keep, Activations::Recompute, Activations::Offload]
        }
    };
    let mut ways = Vec::new();
    for activations in activations {
        let mut capacity = batch;
        ways.push((*activations, capacity));
        while capacity > row {
            capacity = (capacity / 2).max(row);
            ways.push((*activations, capacity));
        }
    }
    ways
}

fn name(activations: Activations) -> &'static str {
    match activations {
        Activations::Keep => "keep",
        Activations::Recompute => "recompute",
        Activations::Offload => "offload",
    }
}

/// Cuts a micro-batch between sequences into parts of at most `capacity` tokens, and hands them on
/// with bounds of their own.
fn split<E>(
    batch: MicroBatch<'_>,
    capacity: usize,
    mut each: impl FnMut(MicroBatch<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let bounds = batch.cu_seqlens;
    let mut first = 0;
    while first + 1 < bounds.len() {
        let start = bounds[first];
        let fits = |last: &usize| (bounds[*last] - start) as usize <= capacity;
        let last = (first + 1..bounds.len()).take_while(fits).last().unwrap_or(first + 1);
        let own: Vec<i32> = bounds[first..=last].iter().map(|b| b - start).collect();
        let range = start as usize..bounds[last] as usize;
        each(MicroBatch {
            tokens: &batch.tokens[range.clone()],
            cu_seqlens: &own,
            targets: &batch.targets[range],
        })?;
        first = last;
    }
    Ok(())
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
            choices.push(("activations", name(prepared.activations).into()));
            choices.push(("micro_batch_tokens", prepared.capacity.into()));
        }
        choices
    }

    fn save(&self, values: &[f32], folder: &Path, base: &str) -> Result<(), StageError> {
        let adapter = Adapter { values: values.to_vec(), ..self.adapter.clone() };
        Ok(adapter.save_peft(folder, base)?)
    }
}

impl Learner for CudaLearner {
    fn prepare(
        &mut self,
        batch: usize,
        row: usize,
        reporter: &mut Reporter,
    ) -> Result<Option<f64>, StageError> {
        let mut fault = None;
        for (activations, capacity) in ways(self.activations, batch, row) {
            match self.make(activations, capacity) {
                Ok(prepared) => {
                    self.prepared = Some(prepared);
                    break;
                }
                Err(error @ CudaError::Memory { .. }) => fault = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        let Some(prepared) = &self.prepared else {
            let plain =
                fault.map_or_else(|| StageError::internal("no way to run"), StageError::from);
            return Err(plain.help(format!(
                "not even one row of {row} tokens fits: lower `max_length` of the stage that packs"
            )));
        };
        self.rehearse(prepared, row)?;
        let seconds = self.rehearse(prepared, row)?;
        let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
        let rate = prepared.capacity as f64 / seconds;
        let whole = self.gpu.nvml_bytes().map(|b| format!(" (NVML: {:.2} GiB)", gib(b)));
        reporter.log(format!(
            "{}: training takes {:.2} GiB of {:.1} GiB{}; activations: {}, {} tokens at once, \
             about {rate:.0} tok/s",
            self.gpu.name(),
            gib(self.gpu.peak_bytes()),
            gib(self.gpu.total_bytes()?),
            whole.unwrap_or_default(),
            name(prepared.activations),
            prepared.capacity,
        ));
        Ok(Some(1.0 / rate))
    }

    fn micro_batch(
        &mut self,
        batch: MicroBatch<'_>,
        scale: f32,
        _dropout: DropoutKey,
    ) -> Result<(), StageError> {
        let prepared = self.prepared()?;
        let scale = scale * self.scaler.scale();
        Ok(split(batch, prepared.capacity, |part| {
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
        split(batch, prepared.capacity, run)?;
        let sum = prepared.step.take_loss(&self.gpu)?;
        let targets = batch.targets.iter().filter(|t| **t != -100).count() as u64;
        Ok(Loss { sum, targets })
    }

    fn values(&self) -> Result<Vec<f32>, StageError> {
        Ok(self.lora.read_values(&self.gpu)?)
    }

    fn write_state(&self, out: &mut Vec<u8>) -> Result<(), StageError> {
        let values = self.values()?;
        out.extend((values.len() as u64).to_le_bytes());
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.scaler.write(out);
        Ok(self.prepared()?.optimizer.write(&self.gpu, out)?)
    }

    fn read_state(&mut self, bytes: &[u8]) -> Result<bool, StageError> {
        let mut values = vec![0.0; self.adapter.values.len()];
        let Some(mut rest) = bytes.strip_prefix(&(values.len() as u64).to_le_bytes()) else {
            return Ok(false);
        };
        let Some(prepared) = &mut self.prepared else { return Ok(false) };
        let Some(()) = crate::optimizer::read_f32(&mut values, &mut rest) else { return Ok(false) };
        let Some((scaler, rest)) = self.scaler.read(rest) else { return Ok(false) };
        if !prepared.optimizer.read(&self.gpu, rest)? {
            return Ok(false);
        }
        self.scaler = scaler;
        self.lora.write_values(&self.gpu, &values)?;
        Ok(true)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_micro_batch_are_whole_sequences_that_fit() {
        let tokens: Vec<i32> = (0..20).collect();
        let batch =
            MicroBatch { tokens: &tokens, cu_seqlens: &[0, 5, 8, 9, 17, 20], targets: &tokens };
        let mut parts = Vec::new();
        let each = |part: MicroBatch<'_>| -> Result<(), ()> {
            assert_eq!(part.tokens, part.targets);
            parts.push((part.tokens.to_vec(), part.cu_seqlens.to_vec()));
            Ok(())
        };
        split(batch, 9, each).unwrap();
        let expected: [(std::ops::Range<i32>, &[i32]); 3] =
            [(0..9, &[0, 5, 8, 9]), (9..17, &[0, 8]), (17..20, &[0, 3])];
        assert_eq!(parts.len(), expected.len());
        for ((tokens, bounds), (range, own)) in parts.iter().zip(expected) {
            assert_eq!((tokens, &bounds[..]), (&range.collect::<Vec<_>>(), own));
        }
    }

    #[test]
    fn what_is_smaller_comes_after_what_is_faster() {
        use Activations::{Keep, Offload, Recompute};
        let ways = ways(params::Activations::Auto, 5000, 2048);
        let expected = [
            (Keep, 5000),
            (Keep, 2500),
            (Keep, 2048),
            (Recompute, 5000),
            (Recompute, 2500),
            (Recompute, 2048),
            (Offload, 5000),
            (Offload, 2500),
            (Offload, 2048),
        ];
        assert_eq!(ways, expected);
    }
}
