//! How much work is to come and about how long it will take, said before it starts.
//!
//! How long answers will be is not known. The estimate takes them to be as long as the baseline's,
//! or else as long as the limit lets them be, and says so; when the first batch is answered, what
//! that took replaces it.

use std::time::Instant;

use contract::{Progress, Reporter, StageError};
use model::{GenerateOptions, Generated};

use crate::answerer::Answerer;

/// Tokens of each prompt that the probe reads.
const PROBE_TOKENS: usize = 16;
/// Tokens that the probe generates.
const PROBE_STEPS: usize = 8;

/// What is left to do.
pub(crate) struct Work<'a> {
    pub(crate) prompts: &'a [Vec<u32>],
    pub(crate) options: &'a GenerateOptions,
    /// Mean length of the baseline's answers, where there is one.
    pub(crate) usual_tokens: Option<f64>,
}

/// Seconds that one prompt token and one decoding step of a whole batch take.
struct Pace {
    prompt_token: f64,
    step: f64,
}

impl Work<'_> {
    /// How much there is, for people.
    pub(crate) fn amount(&self) -> String {
        let most = self.prompts.len() * self.options.max_new_tokens;
        format!("{} prompt tokens, at most {most} new ones", self.prompt_tokens())
    }

    /// Times a few short prompts where there is more than a batch to do and such few say something
    /// of the rest, and estimates the whole.
    pub(crate) fn estimate(
        &self,
        answerer: &dyn Answerer,
        reporter: &mut Reporter,
    ) -> Result<(), StageError> {
        let batch = self.options.batch_size;
        if self.prompts.len() <= batch || !answerer.time_follows_tokens() {
            return Ok(());
        }
        let seconds = self.seconds(&self.pace(answerer)?);
        let length = match self.usual_tokens {
            Some(_) => "if answers are as long as the baseline's".to_owned(),
            None => format!("at most, for answers of {} tokens", self.options.max_new_tokens),
        };
        let basis = format!("{length}; measured on {batch} short prompts");
        reporter.send(&Progress::Estimate { seconds: Some(seconds), bytes: None, basis });
        Ok(())
    }

    fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    fn seconds(&self, pace: &Pace) -> f64 {
        let limit = self.options.max_new_tokens as f64;
        let new_tokens = self.usual_tokens.unwrap_or(limit).min(limit);
        let steps = self.prompts.len() as f64 * new_tokens / self.options.batch_size as f64;
        self.prompt_tokens() as f64 * pace.prompt_token + steps * pace.step
    }

    fn pace(&self, answerer: &dyn Answerer) -> Result<Pace, StageError> {
        let heads = |most: usize| -> Vec<Vec<u32>> {
            let batch = self.prompts.iter().take(self.options.batch_size);
            batch.map(|tokens| tokens[..tokens.len().min(most)].to_vec()).collect()
        };
        let (one, some) = (heads(1), heads(PROBE_TOKENS));
        // The first use of the weights takes longer than any other.
        self.time(answerer, &one, 1)?;
        let steps = self.options.max_new_tokens.min(PROBE_STEPS);
        let step = self.time(answerer, &one, steps)? / steps as f64;
        let tokens: usize = some.iter().map(Vec::len).sum();
        Ok(Pace { prompt_token: self.time(answerer, &some, 1)? / tokens as f64, step })
    }

    fn time(
        &self,
        answerer: &dyn Answerer,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
    ) -> Result<f64, StageError> {
        let batch_size = self.options.batch_size;
        let options = GenerateOptions { max_new_tokens, end_tokens: Vec::new(), batch_size };
        let start = Instant::now();
        answerer.generate(prompts, &options, &mut |_: Generated| true)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_those_of_the_prompts_and_of_the_steps_of_a_batch() {
        let prompts = vec![vec![7; 30]; 8];
        let options = GenerateOptions { max_new_tokens: 10, end_tokens: Vec::new(), batch_size: 4 };
        let pace = Pace { prompt_token: 0.5, step: 2.0 };
        // 240 tokens at half a second; 8 answers of 10, 5 or at most 10 tokens, four a step.
        for (usual_tokens, seconds) in [(None, 160.0), (Some(5.0), 140.0), (Some(99.0), 160.0)] {
            let work = Work { prompts: &prompts, options: &options, usual_tokens };
            assert!((work.seconds(&pace) - seconds).abs() < 1e-9, "{usual_tokens:?}");
            assert_eq!(work.amount(), "240 prompt tokens, at most 80 new ones");
        }
    }
}
