//! Params of the stages that compute: where, and in which arithmetic.

use std::collections::BTreeMap;
use std::path::Path;

use contract::StageError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(extend("pattern" = "^(auto|cpu|cuda(:[0-9]+)?)$", "examples" = ["auto", "cpu", "cuda"]))]
pub enum DeviceChoice {
    /// A GPU where the host shows one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU: that of the number, else any that is free.
    Cuda(Option<usize>),
}

impl DeviceChoice {
    /// What a stage takes of the host: a GPU (`gpu:N` where the params name one by its number),
    /// else every core, since two such stages side by side would only slow each other down.
    /// `built_in`: it could work on a GPU.
    pub fn resources(self, built_in: bool) -> BTreeMap<String, u32> {
        let resource = match self {
            Self::Auto if built_in && sees_gpu() => "gpu".to_owned(),
            Self::Cuda(None) if built_in => "gpu".to_owned(),
            Self::Cuda(Some(number)) if built_in => format!("gpu:{number}"),
            _ => "cpu".to_owned(),
        };
        [(resource, 1)].into()
    }

    /// Refuses what the CPU does not do; `works` completes "the CPU", as in "trains".
    ///
    /// # Errors
    /// Says what the params ask for.
    pub fn check_cpu(self, dtype: DtypeChoice, works: &str) -> Result<(), StageError> {
        if let Self::Cuda(_) = self {
            return Err(StageError::input("this `pipe` was built without CUDA")
                .help("build it with `--features cuda`, or set `device: cpu`"));
        }
        if let DtypeChoice::Bf16 | DtypeChoice::F16 = dtype {
            return Err(StageError::input(format!("the CPU {works} in f32"))
                .help("set `dtype: auto`, or `device: cuda` where there is a GPU"));
        }
        Ok(())
    }

    /// What counts of the choice: `cuda` was once the name of the first GPU, and is still its identity.
    #[must_use]
    pub fn identity(self) -> Self {
        if self == Self::Cuda(Some(0)) { Self::Cuda(None) } else { self }
    }
}

/// Whether the host shows a GPU. Looking opens no device.
pub fn sees_gpu() -> bool {
    !hides_gpus() && Path::new("/dev/nvidiactl").exists()
}

/// Whether `CUDA_VISIBLE_DEVICES` hides every GPU.
pub fn hides_gpus() -> bool {
    hides_all(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())
}

/// CUDA ignores what comes after a name that is none.
fn hides_all(names: Option<&str>) -> bool {
    let first = names.map(|names| names.split(',').next().unwrap_or_default().trim());
    matches!(first, Some("" | "-1"))
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let gpu = |number: &str| number.parse().ok().map(|number| Self::Cuda(Some(number)));
        match text.as_str() {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(None)),
            other => other.strip_prefix("cuda:").and_then(gpu),
        }
        .ok_or_else(|| {
            format!("unknown device `{text}`, expected `auto`, `cpu`, `cuda` or `cuda:N`")
        })
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        match device {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda(None) => "cuda".to_owned(),
            DeviceChoice::Cuda(Some(number)) => format!("cuda:{number}"),
        }
    }
}

/// Arithmetic of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// The device's best: f32 on a CPU, bf16 on a GPU that has it, else f16.
    Auto,
    /// Single precision.
    F32,
    /// bfloat16, with masters of an adapter in training in f32.
    Bf16,
    /// 16-bit floats, with the residual stream and masters in f32, and a loss that is scaled.
    F16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_asks_for_that_gpu_and_none_for_any() {
        let choice = |text: &str| DeviceChoice::try_from(text.to_owned());
        for (text, resource, identity) in [
            ("cpu", "cpu", "cpu"),
            ("cuda", "gpu", "cuda"),
            ("cuda:0", "gpu:0", "cuda"),
            ("cuda:1", "gpu:1", "cuda:1"),
        ] {
            let Ok(device) = choice(text) else { panic!("{text}") };
            assert_eq!(String::from(device), text);
            assert_eq!(device.resources(true), [(resource.to_owned(), 1)].into());
            assert_eq!(device.resources(false), [("cpu".to_owned(), 1)].into());
            assert_eq!(String::from(device.identity()), identity);
        }
        assert!(choice("cuda:").is_err() && choice("cuda:x").is_err());
    }

    #[test]
    fn gpus_are_hidden_where_the_first_name_is_none() {
        for names in ["", " ", "-1", " -1 ", "-1,0", ",0"] {
            assert!(hides_all(Some(names)), "{names:?}");
        }
        for names in [None, Some("0"), Some(" 1"), Some("2,-1"), Some("GPU-5c")] {
            assert!(!hides_all(names), "{names:?}");
        }
    }
}
