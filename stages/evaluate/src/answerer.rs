//! What evaluation needs of a model: the one place where a device is chosen.

#[cfg(feature = "cuda")]
mod gpu;
#[cfg(test)]
pub(crate) mod script;

use std::path::Path;

use checkpoint::{ModelFolder, Tokenizer};
use contract::{Reporter, StageError};
use model::{Adapter, GenerateOptions, Generated, Model};

use crate::evaluation::Load;
use crate::params::Params;

/// Texts as tokens and back.
pub(crate) trait Codec {
    /// Token ids of a text that holds its own marks.
    fn encode(&self, text: &str) -> Result<Vec<u32>, StageError>;

    /// Text of token ids.
    fn decode(&self, tokens: &[u32]) -> Result<String, StageError>;

    /// Id of a token by its text.
    fn token_id(&self, token: &str) -> Option<u32>;

    /// Id that ends a text.
    fn end_id(&self) -> Option<u32>;
}

/// A model with its tokenizer.
pub(crate) trait Answerer {
    /// Its tokenizer.
    fn codec(&self) -> &dyn Codec;

    /// Longest context in tokens.
    fn max_positions(&self) -> usize;

    /// Answers every prompt, calling `done` as answers finish, in any order, until it returns false.
    fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), StageError>;

    /// Rows to decode together where the params do not say.
    fn rows_at_once(&self) -> usize {
        16
    }

    /// Rows of products where `batch_size` rows were asked for, where their number may change an answer.
    fn product_rows(&self, _batch_size: usize) -> Option<usize> {
        None
    }

    /// Whether a few short prompts take the time of their tokens, so that they tell of the rest.
    fn time_follows_tokens(&self) -> bool {
        true
    }

    /// Most bytes of device memory held so far, where the device has its own.
    fn peak_device_bytes(&self) -> Option<u64> {
        None
    }

    /// What the user should know of how the answers came about.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Backend and device, for provenance.
    fn backend(&self) -> (String, String);
}

/// What loads a model on the device that the params ask for.
pub(crate) fn loader(
    params: &Params,
    reporter: &mut Reporter,
) -> Result<Box<Load<'static>>, StageError> {
    #[cfg(feature = "cuda")]
    {
        let (device, dtype) = (params.device, params.dtype);
        if let Some(gpu) = cuda::open(device, dtype, reporter)? {
            let gpu = std::cell::RefCell::new(Some(gpu));
            return Ok(Box::new(move |model, adapter| {
                let gpu = gpu.borrow_mut().take();
                let gpu = gpu.ok_or_else(|| StageError::internal("a model was loaded twice"))?;
                Ok(Box::new(gpu::CudaAnswerer::load(gpu, model, adapter)?))
            }));
        }
    }
    let _ = reporter;
    params.device.check_cpu(params.dtype, "generates")?;
    Ok(Box::new(|model, adapter| Ok(Box::new(CpuAnswerer::load(model, adapter)?))))
}

impl Codec for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<u32>, StageError> {
        Ok(self.encode(text)?.ids)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, StageError> {
        Ok(self.decode(tokens)?)
    }

    fn token_id(&self, token: &str) -> Option<u32> {
        self.id(token)
    }

    fn end_id(&self) -> Option<u32> {
        self.eos()
    }
}

/// A decoder on the CPU, with or without an adapter.
pub(crate) struct CpuAnswerer {
    tokenizer: Tokenizer,
    model: Model,
    adapter: Option<Adapter>,
}

impl CpuAnswerer {
    /// Loads the model, and the adapter where there is one.
    pub(crate) fn load(model: &Path, adapter: Option<&Path>) -> Result<Self, StageError> {
        let tokenizer = ModelFolder::open(model)?.tokenizer()?;
        let mut model = Model::load(model)?;
        let adapter = adapter.map(|folder| model.load_adapter(folder)).transpose()?;
        Ok(Self { tokenizer, model, adapter })
    }
}

impl Answerer for CpuAnswerer {
    fn codec(&self) -> &dyn Codec {
        &self.tokenizer
    }

    fn max_positions(&self) -> usize {
        self.model.max_positions()
    }

    fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), StageError> {
        Ok(self.model.generate(self.adapter.as_ref(), prompts, options, done)?)
    }

    fn backend(&self) -> (String, String) {
        self.model.backend()
    }
}
