//! Why training stops.

use contract::{ScratchError, StageError};

/// A run that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrainError {
    /// A token file without a row.
    #[error("input `{input}` has no rows")]
    NoRows { input: &'static str },
    /// A token file in which nothing counts.
    #[error("no token of input `{input}` counts in the loss")]
    NoTargets { input: &'static str },
    /// A segment beyond the model's context.
    #[error(
        "packed row {row} of input `{input}` has a segment of {length} tokens; the model takes at \
         most {limit}"
    )]
    TooLong { input: &'static str, row: usize, length: usize, limit: usize },
    /// A token that the model does not know.
    #[error(
        "packed row {row} of input `{input}` has the token id {token}; the model's vocabulary ends \
         at {vocabulary}"
    )]
    Vocabulary { input: &'static str, row: usize, token: i32, vocabulary: usize },
    /// NaN or infinity.
    #[error("the {what} became {value} at step {step}: the run diverged and nothing was published")]
    NotFinite { what: &'static str, value: f64, step: u64, learning_rate: f64, kept: u64 },
    /// A loss that stays far above what it was.
    #[error(
        "the loss rose to {loss:.3} at step {step}, far above its median of {median:.3}: the run \
         diverged and nothing was published"
    )]
    Spike { loss: f64, median: f64, step: u64, learning_rate: f64, kept: u64 },
    /// The model refused a batch.
    #[error(transparent)]
    Model(#[from] StageError),
    /// A checkpoint could not be written.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
}

impl From<TrainError> for StageError {
    fn from(error: TrainError) -> Self {
        let plain = Self::input(error.to_string());
        match error {
            TrainError::NoRows { .. } => plain.help("look at the statistics of the stage before"),
            TrainError::NoTargets { .. } => plain.help(
                "with `loss_on: response` every response may have been truncated away: raise \
                 `max_length` of the stage that makes the tokens",
            ),
            TrainError::TooLong { .. } => {
                plain.help("lower `max_length` of the stage that makes the tokens")
            }
            TrainError::Vocabulary { .. } => {
                plain.help("make the tokens with the tokenizer of the model that is trained")
            }
            TrainError::NotFinite { learning_rate, kept, .. }
            | TrainError::Spike { learning_rate, kept, .. } => {
                plain.help(diverged_help(learning_rate, kept))
            }
            TrainError::Model(error) => error,
            TrainError::Scratch(error) => {
                Self::io("write a checkpoint in", &error.path, &error.source)
            }
        }
    }
}

fn diverged_help(learning_rate: f64, kept: u64) -> String {
    let kept = match kept {
        0 => "no checkpoint had been written yet".to_owned(),
        step => format!("the last good checkpoint, of step {step}, is kept in the scratch folder"),
    };
    format!(
        "lower `learning_rate` (the step's was {learning_rate:.3e}) or lengthen `warmup_steps`; {kept}"
    )
}
