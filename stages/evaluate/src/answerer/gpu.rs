//! A decoder on an NVIDIA GPU.

use std::path::Path;

use checkpoint::{ModelConfig, ModelFolder, Tokenizer};
use contract::StageError;
use cuda::{Device, Generator};
use model::{Adapter, GenerateOptions, Generated, LoraConfig};

use super::{Answerer, Codec};

/// A decoder on a GPU, with or without an adapter.
pub(crate) struct CudaAnswerer {
    tokenizer: Tokenizer,
    generator: Generator,
    max_positions: usize,
    name: String,
}

impl CudaAnswerer {
    /// Loads the model, and the adapter where there is one.
    pub(crate) fn load(
        gpu: Device,
        model: &Path,
        adapter: Option<&Path>,
    ) -> Result<Self, StageError> {
        let folder = ModelFolder::open(model)?;
        let config = ModelConfig::read(&folder)?;
        let adapter = match adapter {
            Some(adapter) => Adapter::load_peft_of(adapter, &config)?,
            None => {
                Adapter { config: LoraConfig::default(), factors: Vec::new(), values: Vec::new() }
            }
        };
        let name = gpu.name();
        Ok(Self {
            tokenizer: folder.tokenizer()?,
            generator: Generator::load(gpu, model, &adapter)?,
            max_positions: config.max_position_embeddings,
            name,
        })
    }
}

impl Answerer for CudaAnswerer {
    fn codec(&self) -> &dyn Codec {
        &self.tokenizer
    }

    fn max_positions(&self) -> usize {
        self.max_positions
    }

    fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), StageError> {
        Ok(self.generator.generate(prompts, options, done)?)
    }

    fn rows_at_once(&self) -> usize {
        64
    }

    fn product_rows(&self, batch_size: usize) -> Option<usize> {
        Some(self.generator.rows(batch_size))
    }

    /// Kernels are compiled when they are first used, and a prefill has its full size always.
    fn time_follows_tokens(&self) -> bool {
        false
    }

    fn peak_device_bytes(&self) -> Option<u64> {
        Some(self.generator.device().peak_bytes())
    }

    fn warnings(&self) -> Vec<String> {
        let warning = |rows| {
            format!(
                "the GPU had memory for no more than {rows} rows at once: rare tokens may differ from \
                 those of a run with more; `batch_size: {rows}` gives the same answers on every such GPU"
            )
        };
        self.generator.reduced_rows().map(warning).into_iter().collect()
    }

    fn backend(&self) -> (String, String) {
        ("cuda".to_owned(), self.name.clone())
    }
}
