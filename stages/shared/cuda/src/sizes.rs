//! Sizes that the kernels serve: others would be cut off or read past, without a word.

use std::path::Path;

use checkpoint::{CheckpointError, ModelConfig, ModelFolder};

use crate::{CudaError, Dtype};

/// Elements that a thread takes at once.
fn vector(dtype: Dtype) -> usize {
    16 / dtype.size() as usize
}

/// A size, what it has to be a multiple of, and the most that it may be.
type Rule = (&'static str, usize, usize, usize);

/// Refuses a shape that layers cannot have: rows are taken 16 bytes at a time, so are the halves of a
/// head where it is rotated, and the slow attention has a thread for each element of a head.
pub(crate) fn check_layers(c: &ModelConfig, dtype: Dtype) -> Result<(), CudaError> {
    let vector = vector(dtype);
    check(
        dtype,
        &[
            ("hidden_size", c.hidden_size, vector, usize::MAX),
            ("intermediate_size", c.intermediate_size, vector, usize::MAX),
            ("head_dim", c.head_dim, 2 * vector, 256),
        ],
    )
}

/// Elements from one row of logits to the next: the loss takes them 16 bytes at a time, and many a
/// vocabulary has grown by a token.
pub(crate) fn logits_stride(c: &ModelConfig, dtype: Dtype) -> usize {
    c.vocab_size.next_multiple_of(vector(dtype))
}

/// Refuses a shape that decoding does not serve: the lanes of a warp share a head.
pub(crate) fn check_decoding(c: &ModelConfig, dtype: Dtype) -> Result<(), CudaError> {
    check(dtype, &[("head_dim", c.head_dim, 32, 256)])
}

/// Refuses a model folder that decoding does not serve; reads nothing but its config.
pub(crate) fn check_folder(folder: &Path, dtype: Dtype) -> Result<(), CudaError> {
    let wrong = |error: CheckpointError| CudaError::Input(error.to_string());
    let folder = ModelFolder::open(folder).map_err(wrong)?;
    check_decoding(&ModelConfig::read(&folder).map_err(wrong)?, dtype)
}

fn check(dtype: Dtype, rules: &[Rule]) -> Result<(), CudaError> {
    for (name, size, factor, most) in rules {
        let limit = if size > most {
            format!("no more than {most}")
        } else if !size.is_multiple_of(*factor) {
            format!("a multiple of {factor}")
        } else {
            continue;
        };
        return Err(CudaError::Input(format!(
            "the model's {name} is {size}, and the GPU's kernels need {limit} in {dtype:?}: \
             set `device: cpu`"
        )));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let folder = fixtures::own("tiny-models/llama/f32");
        ModelConfig::read(&ModelFolder::open(&folder).unwrap()).unwrap()
    }

    #[test]
    fn usual_sizes_pass_in_every_type() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for (head_dim, vocab_size) in [(32, 512), (64, 49_152), (128, 151_936), (256, 256_000)]
            {
                let config = ModelConfig { head_dim, vocab_size, ..config() };
                check_layers(&config, dtype).unwrap();
                assert_eq!(logits_stride(&config, dtype), vocab_size);
                check_decoding(&config, dtype).unwrap();
            }
        }
    }

    #[test]
    fn sizes_that_kernels_would_cut_off_are_refused() {
        let message = |checked: Result<(), CudaError>| checked.unwrap_err().to_string();
        let head = |head_dim| ModelConfig { head_dim, ..config() };
        // Half a head of 100 is no multiple of 16 bytes in either type; of 80 it is.
        assert!(message(check_layers(&head(100), Dtype::F32)).contains("head_dim is 100"));
        assert!(message(check_layers(&head(100), Dtype::Bf16)).contains("a multiple of 16"));
        check_layers(&head(80), Dtype::Bf16).unwrap();
        assert!(message(check_decoding(&head(80), Dtype::Bf16)).contains("a multiple of 32"));
        assert!(message(check_layers(&head(512), Dtype::F32)).contains("no more than 256"));

        let wide = ModelConfig { hidden_size: 900, ..config() };
        check_layers(&wide, Dtype::F32).unwrap();
        assert_eq!(
            message(check_layers(&wide, Dtype::F16)),
            "the model's hidden_size is 900, and the GPU's kernels need a multiple of 8 in F16: \
             set `device: cpu`"
        );
        let ffn = ModelConfig { intermediate_size: 11_004, ..config() };
        assert!(message(check_layers(&ffn, Dtype::Bf16)).contains("intermediate_size"));
    }

    #[test]
    fn a_folder_is_judged_by_its_config_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = std::fs::read(fixtures::own("tiny-models/llama/f32/config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config["head_dim"] = 80.into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let refused = check_folder(dir.path(), Dtype::Bf16).unwrap_err().to_string();
        assert!(refused.contains("head_dim is 80"), "{refused}");
    }

    #[test]
    fn rows_of_logits_start_at_whole_packs() {
        let resized = ModelConfig { vocab_size: 32_001, ..config() };
        let strides = [Dtype::F32, Dtype::Bf16, Dtype::F16].map(|t| logits_stride(&resized, t));
        assert_eq!(strides, [32_004, 32_008, 32_008]);
    }
}
