//! What evaluation needs of a model: the one place where a device is chosen.

use std::path::Path;

use checkpoint::{ModelFolder, Tokenizer};
use contract::StageError;
use model::{Adapter, GenerateOptions, Generated, Model};

/// A model with its tokenizer.
pub(crate) trait Answerer {
    /// Token ids of a text that holds its own marks.
    fn encode(&self, text: &str) -> Result<Vec<u32>, StageError>;

    /// Text of token ids.
    fn decode(&self, tokens: &[u32]) -> Result<String, StageError>;

    /// Id of a token by its text.
    fn token_id(&self, token: &str) -> Option<u32>;

    /// Id that ends a text.
    fn end_id(&self) -> Option<u32>;

    /// Longest context in tokens.
    fn max_positions(&self) -> usize;

    /// Answers every prompt, calling `done` as answers finish, in any order, until it returns false.
    fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), StageError>;

    /// Backend and device, for provenance.
    fn backend(&self) -> (String, String);
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
        let model = Model::load(model)?;
        let adapter = adapter.map(|folder| Adapter::load_peft(folder, &model)).transpose()?;
        Ok(Self { tokenizer, model, adapter })
    }
}

impl Answerer for CpuAnswerer {
    fn encode(&self, text: &str) -> Result<Vec<u32>, StageError> {
        Ok(self.tokenizer.encode(text)?.ids)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, StageError> {
        Ok(self.tokenizer.decode(tokens)?)
    }

    fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.id(token)
    }

    fn end_id(&self) -> Option<u32> {
        self.tokenizer.eos()
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
