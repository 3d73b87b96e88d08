//! Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::json;

use crate::adapter::{Adapter, LoraConfig};
use crate::{Model, ModelError};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The fields of PEFT's LoRA configuration that change what the adapter computes.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    lora_dropout: f32,
    target_modules: Vec<String>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: HashMap<String, usize>,
    #[serde(default)]
    alpha_pattern: HashMap<String, f32>,
    #[serde(default)]
    bias: Option<String>,
}

impl Adapter {
    /// Writes a folder that PEFT loads. `base` is the value of `base_model_name_or_path`. The
    /// folder must not exist or be empty; factors are stored in f32.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the disk refuses.
    pub fn save_peft(&self, folder: &Path, base: &str) -> Result<(), ModelError> {
        fs::create_dir_all(folder).map_err(|e| ModelError::io("create", folder, e))?;
        let config = json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.config.r,
            "rank_pattern": {},
            "revision": null,
            "target_modules": self.config.targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.config.use_rslora,
        });
        let path = folder.join(CONFIG);
        let mut text = serde_json::to_vec_pretty(&config)
            .map_err(|e| ModelError::Input(format!("adapter configuration: {e}")))?;
        text.push(b'\n');
        fs::write(&path, text).map_err(|e| ModelError::io("write", &path, e))?;
        let path = folder.join(WEIGHTS);
        fs::write(&path, self.serialize()?).map_err(|e| ModelError::io("write", &path, e))
    }

    fn serialize(&self) -> Result<Vec<u8>, ModelError> {
        let r = self.config.r;
        let mut parts: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for f in &self.factors {
            let a = bytes(&self.values[f.a.clone()]);
            let b = bytes(&self.values[f.b.clone()]);
            parts.push((tensor_name(&f.name, "lora_A"), vec![r, f.inputs], a));
            parts.push((tensor_name(&f.name, "lora_B"), vec![f.outputs, r], b));
        }
        let fault = |e: safetensors::SafeTensorError| ModelError::Input(format!("adapter: {e}"));
        let views = parts
            .iter()
            .map(|(name, shape, data)| {
                let view = TensorView::new(Dtype::F32, shape.clone(), data).map_err(fault)?;
                Ok((name.as_str(), view))
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        // One key at most: the map has no order, and the file's bytes are its identity.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(views, Some(metadata)).map_err(fault)
    }

    /// Reads a PEFT folder for `model`.
    ///
    /// # Errors
    /// [`ModelError`] naming the field or tensor that is missing, misshapen or not supported
    /// (DoRA, rank patterns, trained biases or modules).
    pub fn load_peft(folder: &Path, model: &Model) -> Result<Self, ModelError> {
        let path = folder.join(CONFIG);
        let text = fs::read(&path).map_err(|e| ModelError::io("read", &path, e))?;
        let config: PeftConfig = serde_json::from_slice(&text)
            .map_err(|e| ModelError::Input(format!("{}: {e}", path.display())))?;
        config.refuse_unsupported(&path)?;
        let lora = LoraConfig {
            r: config.r,
            alpha: config.lora_alpha,
            dropout: config.lora_dropout,
            targets: config.target_modules,
            use_rslora: config.use_rslora,
        };
        let mut adapter = Self::zeros(model.config(), &lora)?;
        let path = folder.join(WEIGHTS);
        let raw = fs::read(&path).map_err(|e| ModelError::io("read", &path, e))?;
        let fault = |message: String| ModelError::Input(format!("{}: {message}", path.display()));
        let file = SafeTensors::deserialize(&raw).map_err(|e| fault(e.to_string()))?;
        let Self { factors, values, .. } = &mut adapter;
        let mut used = 0;
        for f in factors.iter() {
            for (which, range, shape) in
                [("lora_A", &f.a, [lora.r, f.inputs]), ("lora_B", &f.b, [f.outputs, lora.r])]
            {
                let name = tensor_name(&f.name, which);
                let view = file.tensor(&name).map_err(|e| fault(format!("{name}: {e}")))?;
                if view.shape() != shape {
                    let found = view.shape();
                    return Err(fault(format!("{name} is {found:?}, expected {shape:?}")));
                }
                let read = checkpoint::to_f32(view.dtype(), view.data())
                    .ok_or_else(|| fault(format!("{name} has type {:?}", view.dtype())))?;
                values[range.clone()].copy_from_slice(&read);
                used += 1;
            }
        }
        if file.len() != used {
            return Err(fault(format!("{} tensors, of which {used} are known", file.len())));
        }
        Ok(adapter)
    }
}

impl PeftConfig {
    fn refuse_unsupported(&self, path: &Path) -> Result<(), ModelError> {
        let biased = self.bias.as_deref().is_some_and(|b| b != "none");
        let saved = self.modules_to_save.as_ref().is_some_and(|m| !m.is_empty());
        let fault = if self.peft_type != "LORA" {
            format!("peft_type `{}`", self.peft_type)
        } else if self.use_dora {
            "use_dora".to_owned()
        } else if self.fan_in_fan_out {
            "fan_in_fan_out".to_owned()
        } else if biased {
            "a trained bias".to_owned()
        } else if saved {
            "modules_to_save".to_owned()
        } else if !self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty() {
            "rank_pattern or alpha_pattern".to_owned()
        } else {
            return Ok(());
        };
        Err(ModelError::Input(format!("{}: {fault} is not supported", path.display())))
    }
}

fn tensor_name(projection: &str, factor: &str) -> String {
    format!("base_model.model.{projection}.{factor}.weight")
}
