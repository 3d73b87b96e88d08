//! A model for tests that knows its answers by heart. A token is a character.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use contract::StageError;
use model::{GenerateOptions, Generated};

use super::{Answerer, Codec};

/// What ends an answer.
const END: u32 = 3;

/// Answers by prompt; other prompts get an answer without end.
#[derive(Clone, Default)]
pub(crate) struct Script {
    pub(crate) answers: BTreeMap<String, String>,
    /// Prompts of the script in the order in which they were answered.
    pub(crate) answered: Rc<RefCell<Vec<String>>>,
    /// Prompts that were not of the script.
    pub(crate) others: Rc<Cell<usize>>,
    /// Answers after which it fails, as a killed process would.
    pub(crate) dies_after: Option<usize>,
    pub(crate) max_positions: usize,
    /// Name of the GPU that it says to be, else it is a CPU.
    pub(crate) gpu: Option<&'static str>,
}

impl Script {
    fn answer(&self, prompt: usize, tokens: &[u32], options: &GenerateOptions) -> Generated {
        let text: String = tokens.iter().filter_map(|t| char::from_u32(*t)).collect();
        let known = self.answers.get(&text).filter(|_| options.end_tokens.contains(&END));
        let Some(answer) = known else {
            self.others.set(self.others.get() + 1);
            let tokens = vec![u32::from('.'); options.max_new_tokens];
            return Generated { prompt, tokens, ended: false };
        };
        self.answered.borrow_mut().push(text);
        let mut tokens: Vec<u32> = answer.chars().map(u32::from).collect();
        // The end mark is a token too.
        let ended = tokens.len() < options.max_new_tokens;
        tokens.truncate(options.max_new_tokens);
        Generated { prompt, tokens, ended }
    }
}

impl Codec for Script {
    fn encode(&self, text: &str) -> Result<Vec<u32>, StageError> {
        Ok(text.chars().map(u32::from).collect())
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, StageError> {
        Ok(tokens.iter().filter_map(|t| char::from_u32(*t)).collect())
    }

    fn token_id(&self, token: &str) -> Option<u32> {
        (token == "<end>").then_some(END)
    }

    fn end_id(&self) -> Option<u32> {
        None
    }
}

impl Answerer for Script {
    fn codec(&self) -> &dyn Codec {
        self
    }

    fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Answers the rows of a batch in reverse, since any order is allowed.
    fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), StageError> {
        let all: Vec<usize> = (0..prompts.len()).collect();
        for batch in all.chunks(options.batch_size) {
            for &prompt in batch.iter().rev() {
                if self.dies_after.is_some_and(|most| self.answered.borrow().len() >= most) {
                    return Err(StageError::internal("killed"));
                }
                if !done(self.answer(prompt, &prompts[prompt], options)) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn product_rows(&self, batch_size: usize) -> Option<usize> {
        self.gpu.map(|_| batch_size)
    }

    fn backend(&self) -> (String, String) {
        ("script".to_owned(), self.gpu.unwrap_or("none").to_owned())
    }
}
